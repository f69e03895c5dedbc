"""Three-stage distillation of an attention decoder into a linear or hybrid one.

Stage 1 aligns every new mixer with the attention beside it, training only what attention does not have.
Stage 2 does the same and trains q, k and v too. Stage 3 matches the next-token distributions end to end;
here layers may keep their attention. In stages 1 and 2 every layer is fed the teacher's own hidden states,
so one forward pass gives all targets and no layer's gradient reaches another.
"""

import contextlib
import functools
import importlib.util

import torch
from torch import nn
from xtuner.registry import BUILDER

from ..convert.seeding import Seeding, first_token_states, seed_mixer
from ..data.dataset import samples_config
from ..data.masking import next_token_rows
from ..errors import UserError
from ..modeling import Mamba2Mixer, PairedMixer, layer_types_from_attention
from ..modeling.configuration import MixerConfig, check_layer_types
from ..ops.segments import segment_starts
from .base import HybridModel
from .layer_selection import read_selection
from .local_backward import local_backward
from .losses import BACKENDS, check_backend, chunked_divergence, masked_error, token_errors
from .stages import describe, fingerprint, load_previous_stage
from .teacher_cache import TeacherCache, weights_digest
from .top_k import top_k_divergence

TRAINABLE = {
    # What attention does not have.
    "new": (
        *("conv1d.", "dt_proj.", "dt_bias", "A_log", "D", "q_norm.", "k_norm.", "g_proj.", "g_norm."),
        *("share_proj.", "sink_"),
    ),
    "mixers": ("q_proj.", "k_proj.", "v_proj."),
    "projections": ("q_proj.", "k_proj.", "v_proj.", "o_proj."),
}
SCOPES = ("new", "mixers", "projections", "all")
# Options of the losses with their defaults, and the words that some of them take.
ALIGNMENT = {"scale": 1000.0, "normalise": False, "after_projection": False}
DIVERGENCE = {
    **{"direction": "forward", "temperature": 1.0, "tokens": "answer", "reduction": "mean"},
    **{"chunk_rows": None, "backend": "auto"},
}
WORDS = {
    "direction": ("forward", "reverse", "js"),
    "tokens": ("answer", "all"),
    "reduction": ("mean", "batchmean"),
    "backend": BACKENDS,
}
PACKAGES = {"liger": "liger_kernel", "fla": "fla"}


class DistillModel(HybridModel):
    """Teacher and student in one set of layers.

    Args:
        llm (dict | nn.Module): The teacher, or the config that loads it.
        stage (int): 1, 2 or 3.
        mixer (dict, optional): Fields of ``MixerConfig``.
        seeding (dict, optional): Fields of ``Seeding``.
        attention_layers (list[int] | str, optional): Layers that keep attention in stage 3, or the file that
            ``xtuner-ext select-layers`` wrote; none when absent.
        layer_types (list[str], optional): The same as one word per layer; overrides ``attention_layers``.
        trainable (str, optional): ``new``, ``mixers`` (new weights and q, k, v), ``projections`` (also the
            output projection) or ``all``; by default ``new`` in stage 1 and ``mixers`` after it. ``all`` is
            for stage 3 and loads a frozen teacher besides the student.
        alignment (dict, optional): Stages 1 and 2: ``scale`` and ``normalise`` of the layer loss, and
            ``after_projection`` to compare what the output projection makes of the heads.
        divergence (dict, optional): Stage 3: ``direction``, ``temperature``, ``tokens`` (``answer`` or
            ``all``), ``reduction`` (``mean`` over tokens or ``batchmean``), ``chunk_rows`` (None: as many as
            fit a fixed number of bytes) and ``backend`` (``auto``, ``torch``, ``liger`` or ``fla``).
        use_activation_checkpointing (bool): Stage 3: recompute the student's activations layer by layer in the
            backward pass instead of keeping them.
        trainable_dtype (str, optional): Such as ``"float32"``, for weights that train beside frozen bf16
            ones under automatic mixed precision; the teacher's own when absent. Decay rates and time-step
            biases are fp32 in any case.
        pretrained_pth (str, optional): Checkpoint of the stage before.
        teacher_cache (str, optional): Stage 3: folder that ``xtuner-ext cache-teacher`` wrote for this teacher, data
            and temperature. The teacher then does not run while training, and the loss is over its likeliest tokens
            and the rest.
        seed (int): Seed of new weights.
        data_preprocessor (dict, optional): MMEngine's.

    Raises:
        UserError: For settings that contradict each other or the teacher.
    """

    def __init__(
        self,
        llm,
        stage,
        mixer=None,
        seeding=None,
        attention_layers=None,
        layer_types=None,
        trainable=None,
        alignment=None,
        divergence=None,
        use_activation_checkpointing=False,
        trainable_dtype=None,
        pretrained_pth=None,
        teacher_cache=None,
        seed=0,
        data_preprocessor=None,
    ):
        super().__init__(llm, data_preprocessor)
        if stage not in (1, 2, 3):
            raise UserError(f"model.stage is {stage!r}, expected 1, 2 or 3")
        self.stage = stage
        self.trainable = trainable or ("new" if stage == 1 else "mixers")
        if self.trainable not in SCOPES or (self.trainable == "all" and stage != 3):
            raise UserError(f"model.trainable is {trainable!r}, expected one of {SCOPES}, 'all' only in stage 3")
        self.alignment = _options("alignment", ALIGNMENT, alignment)
        self.divergence = _options("divergence", DIVERGENCE, divergence)
        for key in ("temperature", "chunk_rows"):
            if self.divergence[key] is not None and not self.divergence[key] > 0:
                raise UserError(f"model.divergence.{key} is {self.divergence[key]}, expected more than 0")
        try:
            check_backend(*(self.divergence[key] for key in ("backend", "direction", "temperature")))
        except ValueError as error:
            raise UserError(f"model.divergence: {error}") from error
        if stage < 3 and use_activation_checkpointing:
            raise UserError("model.use_activation_checkpointing is for stage 3, others keep one layer's activations")
        if stage < 3 and self.trainable == "projections" and not self.alignment["after_projection"]:
            raise UserError("model.trainable 'projections' needs alignment.after_projection=True before stage 3")
        if stage < 3 and teacher_cache is not None:
            raise UserError(f"model.teacher_cache is {teacher_cache!r}, but only stage 3 compares next tokens")
        self.teacher_cache = teacher_cache
        self.teacher_digest = None if teacher_cache is None else weights_digest(self.llm)
        self.teacher_fingerprint = fingerprint(self.llm)
        self.student_config = self._student_config(mixer, attention_layers, layer_types)
        # Where the student changes what both would share, the teacher needs a copy of its own.
        self.teacher = BUILDER.build(llm) if self.trainable == "all" else None
        self._pair(Seeding.from_dict(seeding or {}), seed)
        self._freeze()
        if use_activation_checkpointing:
            self.gradient_checkpointing_enable()
        if trainable_dtype is not None:
            self.cast_trainable(trainable_dtype)
        if pretrained_pth is not None and not self.llm.lm_head.weight.is_meta:
            load_previous_stage(self, pretrained_pth)

    def compute_loss(self, input_ids, labels, attention_mask=None, pixel_values=None, segment_ids=None, keys=None):
        """Loss of one batch and what the log should show besides.

        Args:
            input_ids (Tensor): (B, L).
            labels (Tensor): (B, L), -100 where nothing is supervised.
            attention_mask (Tensor, optional): (B, L).
            pixel_values (Tensor, optional): (T, 3, S, S).
            segment_ids (Tensor, optional): (B, L) of packed rows.
            keys (list, optional): Names of the samples, which a teacher's cache is looked up by.

        Returns:
            dict[str, Tensor]: ``loss`` and measures.
        """
        inputs = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        if self.stage < 3:
            return self._alignment_loss(input_ids, pixel_values, inputs)
        return self._divergence_loss(input_ids, labels, pixel_values, inputs, keys)

    def check_data(self, dataset):
        """Refuse what would fail later; called before the first iteration.

        Training data must be in the teacher's cache, and what ``divergence.backend`` needs must be there. Conversion
        and estimates need neither.

        Args:
            dataset (Dataset): Of the run.

        Raises:
            UserError: Naming what was found and what was expected.
        """
        if self.teacher_cache is not None:
            self._cache.check_dataset(dataset)
        elif self.divergence["backend"] in PACKAGES:
            _check_machine(self.divergence["backend"])

    def describe(self):
        """dict: What a later stage needs to know to accept this one's checkpoint."""
        return describe(self)

    def student_state(self):
        """Weights that this model has trained, under the student's own names.

        Returns:
            dict[str, Tensor]: Keys of ``HybridVLForCausalLM``.
        """
        state = {key: tensor for key, tensor in self.state_dict().items() if key.startswith("llm.")}
        return {key.removeprefix("llm.").replace(".mixer.mamba.", ".mixer."): value for key, value in state.items()}

    def to_hf(self, cfg, save_dir, fp32=False, save_pretrained_kwargs=None, save_format="xtuner", **_):
        """Write the student as a complete model folder; called by ``xtuner convert pth_to_hf``.

        Args:
            cfg (Config): The training config; ``cfg.model.llm`` names the teacher.
            save_dir (str): Folder to write.
            fp32 (bool): Store fp32 instead of bf16.
            save_pretrained_kwargs (dict, optional): ``max_shard_size``.
            save_format (str): Accepted for XTuner's sake; there is one format.
        """
        from ..convert.export import export_student

        kwargs = save_pretrained_kwargs or {}
        processor = samples_config(cfg.train_dataloader.dataset).processor
        trained = None
        if not self.llm.lm_head.weight.is_meta:
            self._activate("linear_attention")
            # Flash attention takes neither fp32 nor a CPU.
            self.llm.config._attn_implementation = "sdpa"
            trained = self.llm.float().eval()
        export_student(
            self.student_config,
            self.student_state(),
            teacher=cfg.model.llm["pretrained_model_name_or_path"],
            out=save_dir,
            dtype=torch.float32 if fp32 else torch.bfloat16,
            max_shard_size=kwargs.get("max_shard_size", "5GB"),
            recipe=self.describe(),
            trained_model=trained,
            trust_remote_code=bool(processor.get("trust_remote_code")),
        )

    def _student_config(self, mixer, attention_layers, layer_types):
        config = type(self.llm.config).from_dict(self.llm.config.to_dict())
        try:
            config.mixer = vars(MixerConfig.from_dict(dict(mixer or {})))
            count = config.num_hidden_layers
            if layer_types is None:
                if isinstance(attention_layers, str):
                    attention_layers = read_selection(attention_layers)
                if not isinstance(attention_layers, (list, tuple, type(None))):
                    raise UserError(f"model.attention_layers is {attention_layers!r}, expected a list such as [0,4]")
                layer_types = layer_types_from_attention(list(attention_layers or []), count)
            check_layer_types(layer_types, count)
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        if self.stage < 3 and "full_attention" in layer_types:
            raise UserError("model.attention_layers belongs to stage 3: stages 1 and 2 align every layer")
        config.layer_types = list(layer_types)
        return config

    def _pair(self, seeding, seed):
        config, first = self.student_config, [None] * self.student_config.num_hidden_layers
        # Without a token that every sequence starts with, the sink starts at zero.
        if config.mixer_config.sink and config.bos_token_id is not None and not self.llm.lm_head.weight.is_meta:
            first = first_token_states(self.llm, config.bos_token_id)
        for index, layer in enumerate(self.llm.model.layers):
            if self.student_config.layer_types[index] == "full_attention":
                continue
            attention = layer.mixer
            mamba = Mamba2Mixer(self.student_config, index).to(attention.q_proj.weight.dtype)
            seed_mixer(mamba, attention, seeding, torch.Generator().manual_seed(seed * 10007 + index), first[index])
            if self.trainable in ("new", "mixers"):
                # Frozen on both sides: one copy serves teacher and student.
                mamba.o_proj = attention.o_proj
            if self.trainable == "new" and seeding.inherit_qkv:
                mamba.q_proj, mamba.k_proj, mamba.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
            layer.mixer = PairedMixer(nn.Identity() if self.trainable == "all" else attention, mamba)

    def _freeze(self):
        self.requires_grad_(False)
        if self.trainable == "all":
            self.llm.requires_grad_(True)
            return
        wanted = {*TRAINABLE["new"], *TRAINABLE[self.trainable]}
        for module in self.modules():
            if isinstance(module, Mamba2Mixer):
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name.startswith(tuple(wanted)))

    def _alignment_loss(self, input_ids, pixel_values, inputs):
        device = input_ids.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise UserError(
                f"optim_wrapper.dtype is float16, expected bfloat16: stage {self.stage} takes gradients before scaling"
            )
        decoder = self.llm.model
        # Attention's masks too, also after a measurement of the student.
        self.llm.config.layer_types = ["full_attention"] * len(decoder.layers)
        with torch.no_grad():
            embeds = self.llm.embed(input_ids, pixel_values)
        context = decoder.layer_context(embeds, **inputs)
        mask = context["token_mask"]
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        kinds = {"text": real}
        if self.llm.config.vision is not None:
            image = (input_ids == self.llm.config.image_token_id) & real
            kinds = {"image": image, "text": real & ~image}
        losses, measures, hidden = [], {}, embeds
        split = {kind: [] for kind in kinds}
        for index, layer in enumerate(decoder.layers):
            hidden, loss, measures[f"align/layer_{index:02d}"], by_kind = self.align_layer(
                layer, hidden, context, mask, kinds
            )
            losses.append(loss)
            for kind, value in by_kind.items():
                split[kind].append(value)
        for kind, values in split.items():
            measures[f"align/{kind}"] = torch.stack(values).mean()
        return {"loss": torch.stack(losses).sum(), **measures}

    def align_layer(self, layer, hidden, context, mask, kinds):
        """Run the teacher's layer and measure, and back-propagate, how far the new mixer is from its attention.

        Args:
            layer (HybridDecoderLayer): With a ``PairedMixer``.
            hidden (Tensor): The teacher's input of the layer, (B, L, D).
            context (dict): Of :meth:`HybridDecoder.layer_context`.
            mask (Tensor | None): Boolean (B, L), tokens that count; all when None.
            kinds (dict[str, Tensor]): Boolean (B, L), tokens to measure apart.

        Returns:
            tuple[Tensor, Tensor, Tensor, dict]: The teacher's output (B, L, D), or None where no layer reads it; this
            layer's share of the loss; the error, and the error of each kind.
        """
        after_projection, normalise = self.alignment["after_projection"], self.alignment["normalise"]
        weight = self.alignment["scale"] / len(self.llm.model.layers)
        pair, layer_inputs = layer.mixer, layer.mixer_context(context)
        with torch.no_grad():
            normed = layer.input_layernorm(hidden)
            if pair.mamba.q_proj is pair.attention.q_proj:
                layer_inputs["projected"] = pair.attention.project(normed)
            heads = pair.attention.head_outputs(normed, **layer_inputs)
            mixed = pair.attention.o_proj(heads.flatten(2))
        target = mixed[:, :, None] if after_projection else heads

        def align():
            if after_projection:
                prediction = pair.mamba(normed, **layer_inputs)[:, :, None]
            else:
                prediction = pair.mamba.head_outputs(normed, **layer_inputs)
            error, energy = token_errors(prediction, target)
            loss = masked_error(error, energy, mask, normalise)
            error = error.detach()
            by_kind = {kind: masked_error(error, energy, part, normalise) for kind, part in kinds.items()}
            return weight * loss, (loss.detach(), by_kind)

        loss, (error, by_kind) = local_backward(align, [p for p in pair.mamba.parameters() if p.requires_grad])
        if layer is self.llm.model.layers[-1]:
            return None, loss, error, by_kind
        with torch.no_grad():
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden, loss, error, by_kind

    def _divergence_loss(self, input_ids, labels, pixel_values, inputs, keys):
        rows = supervised_rows(input_ids, labels, inputs["attention_mask"], self.divergence["tokens"])
        options = {key: self.divergence[key] for key in ("direction", "temperature", "chunk_rows")}
        count = max(1, int(rows.sum()))
        divisor = count if self.divergence["reduction"] == "mean" else _count_samples(input_ids, **inputs)
        if self.teacher_cache is None:
            student, teacher = (states[rows] for states in self.final_states(input_ids, pixel_values, **inputs))
            targets = (teacher, self.teacher_head)
            options["backend"] = self.divergence["backend"]
            divergence = chunked_divergence
        else:
            student = self.student_states(input_ids, pixel_values, **inputs)[rows]
            targets, divergence = self._cached_targets(keys, student), top_k_divergence
        loss, agreed = divergence(student, self.llm.lm_head.weight, *targets, scale=1 / divisor, **options)
        measures = {"kl_per_token": loss.detach() * (divisor / count)}
        return {"loss": loss, **measures} if agreed is None else {"loss": loss, **measures, "agreement": agreed / count}

    @functools.cached_property
    def _cache(self):
        cache = TeacherCache(self.teacher_cache)
        wanted = {key: self.divergence[key] for key in ("tokens", "temperature")}
        cache.check_settings({"teacher": self.teacher_digest, **wanted})
        return cache

    def _cached_targets(self, keys, student):
        if keys is None:
            raise UserError(f"teacher cache {self.teacher_cache} needs samples with keys, as ConversationDataset gives them")
        targets = self._cache.targets(keys, student.device)
        if len(targets[0]) != len(student):
            raise UserError(
                f"teacher cache {self.teacher_cache} has {len(targets[0])} rows for a batch of {len(student)}: "
                "its data have changed since, make another cache"
            )
        return targets

    @property
    def teacher_head(self):
        """Tensor: The teacher's output embedding, (V, D)."""
        return (self.llm if self.teacher is None else self.teacher).lm_head.weight

    def final_states(self, input_ids, pixel_values=None, **inputs):
        """What both models make of a batch, before the output embedding.

        Args:
            input_ids (Tensor): (B, L).
            pixel_values (Tensor, optional): (T, 3, S, S).
            **inputs: ``attention_mask`` and ``segment_ids``, (B, L) or None.

        Returns:
            tuple[Tensor, Tensor]: Student's and teacher's normed hidden states, (B, L, D).
        """
        teacher = self.llm if self.teacher is None else self.teacher
        if self.teacher is None:
            self._activate("full_attention")
        with torch.no_grad():
            embeds = teacher.embed(input_ids, pixel_values)
            target = teacher.model(inputs_embeds=embeds, **inputs).last_hidden_state
        # Where both share an embedding it is frozen.
        return self.student_states(input_ids, pixel_values, embeds if self.teacher is None else None, **inputs), target

    def student_states(self, input_ids, pixel_values=None, embeds=None, **inputs):
        """What the student alone makes of a batch.

        Args:
            input_ids (Tensor): (B, L).
            pixel_values (Tensor, optional): (T, 3, S, S).
            embeds (Tensor, optional): (B, L, D), where they are known.
            **inputs: See :meth:`final_states`.

        Returns:
            Tensor: Normed hidden states, (B, L, D).
        """
        self._activate("linear_attention")
        if embeds is None:
            with contextlib.nullcontext() if self.trainable == "all" else torch.no_grad():
                embeds = self.llm.embed(input_ids, pixel_values)
        return self.llm.model(inputs_embeds=embeds, **inputs).last_hidden_state

    def _activate(self, word):
        for module in self.modules():
            if isinstance(module, PairedMixer):
                module.active = word
        # Masks and caches are made for the mixers that run.
        teacher = ["full_attention"] * len(self.student_config.layer_types)
        student = list(self.student_config.layer_types)
        self.llm.config.layer_types = teacher if word == "full_attention" else student


def supervised_rows(input_ids, labels, attention_mask, tokens):
    """Positions whose next-token distributions are compared.

    Args:
        input_ids (Tensor): (B, L).
        labels (Tensor): (B, L).
        attention_mask (Tensor, optional): (B, L).
        tokens (str): ``answer``, or ``all`` real ones.

    Returns:
        Tensor: Boolean (B, L).
    """
    if tokens == "all":
        return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return next_token_rows(labels)


def _count_samples(input_ids, attention_mask, segment_ids):
    if segment_ids is None:
        return len(input_ids)
    starts = segment_starts(segment_ids)
    return int((starts if attention_mask is None else starts & attention_mask.bool()).sum())


def _check_machine(backend):
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        raise UserError(f"model.divergence.backend is {backend!r}, whose package {PACKAGES[backend]} is not installed")
    if not torch.cuda.is_available():
        raise UserError(f"model.divergence.backend is {backend!r}, which needs a CUDA device and none is there")


def _options(name, defaults, given):
    options = {**defaults, **(given or {})}
    if unknown := sorted(set(options) - set(defaults)):
        raise UserError(f"unknown key model.{name}.{unknown[0]}, expected one of {', '.join(defaults)}")
    for key, words in WORDS.items():
        if key in options and options[key] not in words:
            raise UserError(f"model.{name}.{key} is {options[key]!r}, expected one of {', '.join(words)}")
    return options

