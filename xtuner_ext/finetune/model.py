"""Supervised fine-tuning: of all weights, of chosen parts, or of adapters beside frozen, perhaps quantised ones."""

import json

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MessageHub

from ..convert import llama, qwen2
from ..convert.checkpoint import whole_folder
from ..convert.export import export_student, write_processor
from ..convert.llama import ATTENTION, MIXER
from ..convert.teacher import load_processor, resolve_folder, teacher_family
from ..data.dataset import samples_config
from ..data.masking import next_token_rows
from ..data.template_fit import detect_template, fit_template
from ..distill.base import HybridModel
from ..distill.teacher_cache import weights_digest
from ..errors import UserError
from ..ops.segments import number_segments
from .lora import add_lora, lora_config, write_adapter
from .losses import chunked_cross_entropy
from .parts import freeze_parts
from .quantization import quantise_language

# Exponent of a sample's trained tokens in the weight of each of them.
REDUCTIONS = {"token": 0.0, "square": -0.5, "sample": -1.0}


class SupervisedModel(HybridModel):
    """Cross-entropy on the answers.

    Args:
        llm (dict | nn.Module): A teacher or an exported student, or the config that loads it.
        lora (dict, optional): Adapters by part, such as ``dict(language=dict(r=16), vision=dict(r=8), dropout=0.05)``;
            see :func:`~xtuner_ext.finetune.lora.lora_config`. All other weights are then frozen unless ``freeze`` says
            otherwise.
        freeze (dict, optional): Bool by part, such as ``dict(vision=True, projector=False, unfreeze_vit_layers=2)``;
            see :func:`~xtuner_ext.finetune.parts.freeze_parts`. Without ``lora``, parts not named train.
        quantization (dict, optional): ``dict(bits=4, type="nf4", double_quant=True)`` keeps the decoder's frozen linear
            layers in 4 bits; or ``dict(bits=8)``.
        loss_reduction (str): What one trained token weighs: ``token`` 1, ``sample`` 1/n and ``square`` 1/sqrt(n) in
            a sample of n trained tokens. The loss is the weighted mean over all samples of one optimizer step, over
            its iterations and processes.
        use_activation_checkpointing (bool): Recompute activations layer by layer in the backward pass.
        trainable_dtype (str, optional): Such as ``"float32"``, for weights that train beside frozen bf16 ones under
            automatic mixed precision.
        seed (int): Of the adapters' first weights.
        data_preprocessor (dict, optional): MMEngine's.

    Raises:
        UserError: For settings that contradict each other or the model.
    """

    def __init__(
        self,
        llm,
        lora=None,
        freeze=None,
        quantization=None,
        loss_reduction="token",
        use_activation_checkpointing=False,
        trainable_dtype=None,
        seed=0,
        data_preprocessor=None,
    ):
        super().__init__(llm, data_preprocessor)
        if loss_reduction not in REDUCTIONS:
            raise UserError(f"model.loss_reduction is {loss_reduction!r}, expected one of {', '.join(REDUCTIONS)}")
        self.loss_reduction, self.step_weight = loss_reduction, None
        self.base_digest = weights_digest(self.llm)
        if lora is not None or freeze is not None:
            freeze_parts(self.llm, {} if freeze is None else freeze, default=lora is not None)
        # Before adapters make linear layers of their own.
        self.lora_config = None
        if lora is not None:
            base = llm.get("pretrained_model_name_or_path", "") if isinstance(llm, dict) else ""
            self.lora_config = lora_config(self.llm, lora, base)
        self.quantization = None if quantization is None else quantise_language(self.llm, quantization)
        if self.lora_config is not None:
            # The same whatever random numbers a runner has drawn before.
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                add_lora(self.llm, self.lora_config)
        self.settings = {"lora": _plain(lora), "freeze": _plain(freeze), "quantization": self.quantization}
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError("no parameter of the model trains, check model.freeze")
        if trainable_dtype is not None:
            self.cast_trainable(trainable_dtype)
        if use_activation_checkpointing:
            self.gradient_checkpointing_enable()

    def begin_step(self, batches):
        """Tell the model what one optimizer step consists of, before its first iteration.

        Args:
            batches (list[dict]): Of this process, as the dataloader gives them.
        """
        total = sum((self.token_weights(batch["data"])[1].sum() for batch in batches), torch.zeros(()))
        all_reduce(total)
        # What an iteration's share would be if all weighed the same: gradients are averaged over both.
        self.step_weight = total.item() / (len(batches) * get_world_size())

    def token_weights(self, data):
        """What each supervised position weighs.

        Args:
            data (dict): ``labels`` (B, L), and ``segment_ids`` (B, L) of packed rows.

        Returns:
            tuple[Tensor, Tensor]: Boolean (B, L), and the weights in fp32 of the positions where it is True.
        """
        rows = next_token_rows(data["labels"])
        segments = data.get("segment_ids")
        if segments is None:
            samples = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)[rows]
        else:
            # No sample's last token foretells the next sample.
            rows[:, :-1] &= segments[:, 1:] == segments[:, :-1]
            numbers = number_segments(segments)
            samples = (numbers + torch.arange(len(rows), device=rows.device)[:, None] * (numbers.max() + 1))[rows]
        counts = torch.bincount(samples) if len(samples) else samples
        return rows, counts[samples].float() ** REDUCTIONS[self.loss_reduction]

    def compute_loss(self, *, keys=None, **data):
        """Weighted cross-entropy.

        Args:
            keys (list, optional): Not used.
            **data (Tensor): See :meth:`forward`.

        Returns:
            dict: ``loss``, this process's share: the mean over iterations and processes is that of the optimizer step.
        """
        labels = data.pop("labels")
        rows, weights = self.token_weights({"labels": labels, **data})
        embeds = self.llm.embed(data.pop("input_ids"), data.pop("pixel_values", None))
        hidden = self.llm.model(inputs_embeds=embeds, **data).last_hidden_state[rows]
        targets = labels.roll(-1, 1)[rows]
        # Also where nothing is supervised this depends on every weight that trains.
        total = chunked_cross_entropy(hidden, self.llm.lm_head.weight, targets, weights)
        divisor = self.step_weight
        if divisor is None or not self.training:
            divisor = weights.sum()
            if self.training:
                all_reduce(divisor, op="mean")
            divisor = divisor.item()
        return {"loss": total / divisor if divisor else total}

    def parse_losses(self, losses):
        """tuple[Tensor, dict]: The loss to back-propagate, and what is logged, as means over the processes.

        Raises:
            UserError: When the loss is no finite number.
        """
        loss, logged = super().parse_losses(losses)
        logged = {name: value.detach().clone() for name, value in logged.items()}
        for value in logged.values():
            all_reduce(value, op="mean")
        if not torch.isfinite(logged["loss"]):
            raise UserError(f"the loss is {logged['loss'].item()} at iteration {_iteration()}")
        return loss, logged

    def describe(self):
        """dict: What makes a checkpoint of this run fit another run."""
        facts = {"layer_types": list(self.llm.config.layer_types), "base": self.base_digest}
        return {"kind": "supervised", **self.settings, **facts}

    def to_hf(self, cfg, save_dir, fp32=False, save_pretrained_kwargs=None, **_):
        """Write a PEFT adapter where there is one, else a whole model folder; called by ``xtuner convert pth_to_hf``.

        Args:
            cfg (Config): The training config; ``cfg.model.llm`` names the base model.
            save_dir (str): Folder to write.
            fp32 (bool): Store fp32 instead of bf16; adapters are stored as they were trained.
            save_pretrained_kwargs (dict, optional): ``max_shard_size``.

        Raises:
            UserError: When the config names no base model, or the written folder fails its check.
        """
        base = cfg.model.llm.get("pretrained_model_name_or_path")
        if base is None:
            raise UserError("model.llm names no pretrained_model_name_or_path, which the rest of the weights come from")
        # Of its own meta file's samples, whatever wraps them.
        remote = bool(samples_config(cfg.train_dataloader.dataset).processor.get("trust_remote_code"))
        if self.lora_config is not None:
            self._write_adapter(base, save_dir, remote)
            return
        state = {key.removeprefix("llm."): value for key, value in self.state_dict().items()}
        self.llm.config._attn_implementation = "sdpa"
        export_student(
            type(self.llm.config).from_dict(self.llm.config.to_dict()),
            state,
            teacher=base,
            out=save_dir,
            dtype=torch.float32 if fp32 else torch.bfloat16,
            max_shard_size=(save_pretrained_kwargs or {}).get("max_shard_size", "5GB"),
            recipe=self.describe(),
            # Quantised layers compute with other numbers than the folder's.
            trained_model=None if self.quantization else self.llm.float().eval(),
            trust_remote_code=remote,
        )

    def _write_adapter(self, base, out, trust_remote_code):
        processor = load_processor(base, trust_remote_code=trust_remote_code)
        name = self.llm.config.template or detect_template(processor.tokenizer)
        facts = {"base_model": str(base), "weights_digest": self.base_digest, "quantization": self.quantization}
        with whole_folder(out) as folder:
            # So that the base's own class takes the adapter too.
            names = (MIXER, ATTENTION) if teacher_family(resolve_folder(base)) in (llama, qwen2) else ()
            write_adapter(self.llm, self.lora_config, folder, facts, names)
            write_processor(processor, fit_template(name, processor.tokenizer) if name else None, folder)
            (folder / "README.md").write_text(_card(base, self.describe()), encoding="utf-8")


def _card(base, recipe):
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        "tags: [lora]",
        "---",
        "",
        f"# An adapter for {base}",
        "",
        "`xtuner-ext merge` makes one model folder of this adapter and its base model.",
        "",
        "```json",
        json.dumps(recipe, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _iteration():
    return MessageHub.get_current_instance().get_info("iter", 0) + 1


def _plain(settings):
    """Settings without the classes of MMEngine's configs, as checkpoints keep them."""
    if isinstance(settings, dict):
        return {key: _plain(value) for key, value in settings.items()}
    return [_plain(value) for value in settings] if isinstance(settings, (list, tuple)) else settings
