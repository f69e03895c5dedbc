"""The hybrid decoder: one class for the teacher, the linear and the hybrid student.

Axis letters: B batch, L length, D model width, V vocabulary, T tiles.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from ..ops.segments import number_segments, segment_starts
from .cache import HybridCache
from .configuration import HybridVLConfig
from .graphs import addresses, refuse, replay, was_refused
from .mixers import FP32_PARAMETERS, MIXERS, Mamba2Mixer
from .vision import PatchVision
from .vit import ViTVision

# Longer prompts are read in chunks of this many tokens.
PREFILL_CHUNK = 2048
# Room for new tokens is made in steps of so many.
ROOM = 256
# Shorter answers are not worth the capture of a CUDA graph.
GRAPH_TOKENS = 16

# A model's cache with its graphs. Not an attribute: graphs can be neither copied nor pickled.
_GRAPH_CACHES = weakref.WeakKeyDictionary()

FRONT_ENDS = {"patch": PatchVision, "vit": ViTVision}


class HybridRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary positions whose dynamic scaling follows the sequence at hand, whatever came before it.

    Frequencies stay fp32 when the model is cast: rounded to bf16, positions in the thousands are radians off.
    """

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            cast = getattr(self, name)
            if cast.dtype != before.dtype and not before.is_meta:
                setattr(self, name, before.to(cast.device))
        return self

    @torch.no_grad()
    def forward(self, x, position_ids):
        """cos and sin, each (B, L, P)."""
        if "dynamic" in self.rope_type and self.max_seq_len_cached != self.original_max_seq_len:
            # transformers would keep the frequencies of the longest sequence so far.
            self.inv_freq = self.original_inv_freq.to(x.device)
            self.max_seq_len_cached = self.original_max_seq_len
        return super().forward(x, position_ids)


class HybridRMSNorm(LlamaRMSNorm):
    """Root-mean-square norm; one kernel instead of eight where a GPU only evaluates."""

    def forward(self, hidden_states):
        """Normalise (..., D)."""
        plain = torch.is_grad_enabled() or not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype
        if plain:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class HybridDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mixer = MIXERS[config.layer_types[layer_idx]](config, layer_idx)
        self.in_embedding = layer_idx < config.num_embedding_layers
        self.mlp = LlamaMLP(config)
        eps = config.embedding_config().rms_norm_eps if self.in_embedding else config.rms_norm_eps
        self.input_layernorm = HybridRMSNorm(config.hidden_size, eps=eps)
        self.post_attention_layernorm = HybridRMSNorm(config.hidden_size, eps=eps)

    def mixer_context(self, context):
        """What this layer's mixer takes of :meth:`HybridDecoder.layer_context`."""
        context = dict(context)
        embedding_positions = context.pop("embedding_position_embeddings")
        if self.in_embedding and embedding_positions is not None:
            context["position_embeddings"] = embedding_positions
        return context

    def forward(self, hidden_states, **context):
        """Transform (B, L, D) to (B, L, D); ``context`` comes from :meth:`HybridDecoder.layer_context`."""
        context = self.mixer_context(context)
        hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), **context)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HybridVLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the model's parts."""

    config_class = HybridVLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):
            module.dt_bias.fill_(-6.9)  # softplus(-6.9) = 1e-3: near-perfect memory
            if module.mixer.learn_A:
                module.A_log.zero_()
            if module.mixer.use_D:
                module.D.fill_(1.0)
        elif isinstance(module, PatchVision):
            module.position_embedding.normal_(std=self.config.initializer_range)


class HybridDecoder(HybridVLPreTrainedModel):
    """Token embedding, the stack of layers, final norm.

    Args:
        config (HybridVLConfig): Model configuration.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HybridRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HybridRotaryEmbedding(config)
        if config.embedding_overrides:
            self.embedding_rotary_emb = HybridRotaryEmbedding(config.embedding_config())
        self.post_init()

    def layer_context(self, inputs_embeds, attention_mask=None, position_ids=None, segment_ids=None, cache=None):
        """Everything a layer needs besides its input.

        Args:
            inputs_embeds (Tensor): (B, L, D).
            attention_mask (Tensor, optional): (B, seen + L), 0 at padding.
            position_ids (Tensor, optional): (B, L); derived from the mask or segments when absent.
            segment_ids (Tensor, optional): (B, L) integers; packed samples do not see each other.
            cache (HybridCache, optional): Tokens seen before.

        Returns:
            dict: Keyword arguments of every layer.

        Raises:
            ValueError: For packed rows together with a cache.
        """
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        seen = 0 if cache is None else cache.get_seq_length()
        if segment_ids is not None and cache is not None:
            raise ValueError("segment_ids packs training rows and does not go with a decoding cache")
        if attention_mask is not None:
            # Without padding the backends take their faster unmasked path.
            attention_mask = None if attention_mask.all() else attention_mask
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, segment_ids, seen)
        packed, packing, key_mask = None, None, attention_mask
        if key_mask is not None and cache is None and (key_mask[:, 1:] <= key_mask[:, :-1]).all():
            # No token sees those after it: padding at the end of rows needs no mask, which only slows kernels down.
            key_mask = None
        if segment_ids is not None:
            groups = number_segments(segment_ids)
            if key_mask is not None:
                # Padding sees padding, so that no token sees nothing, for which some kernels give NaN.
                groups, key_mask = 2 * groups + key_mask.long(), None
            if "flash" in (self.config._attn_implementation or ""):
                packing = _flash_packing(groups)
            else:
                packed = _same_segment(groups)
        causal_mask = None
        # A single token sees every key that is there.
        alone = cache is not None and length == 1 and attention_mask is None
        if "full_attention" in self.config.layer_types and packing is None and not alone:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=key_mask,
                past_key_values=cache,
                position_ids=torch.arange(seen, seen + length, device=device)[None],
                and_mask_function=packed,
            )
        token_mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        angles, embedding_angles = self.angles(inputs_embeds, position_ids)
        return {
            "position_embeddings": angles,
            "embedding_position_embeddings": embedding_angles,
            "position_ids": position_ids,
            "attention_mask": causal_mask,
            "packing": packing,
            "token_mask": token_mask,
            "segment_ids": segment_ids,
            "cache": cache,
        }

    def angles(self, like, position_ids):
        """Rotary angles of every layer.

        Args:
            like (Tensor): Gives dtype and device.
            position_ids (Tensor): (B, L).

        Returns:
            tuple: (cos, sin), each (B, L, P), and the holistic embedding's own pair or None.
        """
        of_embedding = self.embedding_rotary_emb(like, position_ids) if self.config.embedding_overrides else None
        return self.rotary_emb(like, position_ids), of_embedding

    @property
    def has_dynamic_positions(self):
        """bool: Whether the frequencies depend on the largest position."""
        embeddings = [module for module in self.children() if isinstance(module, HybridRotaryEmbedding)]
        return any("dynamic" in module.rope_type for module in embeddings)

    def decode(self, inputs_embeds, cache, position_ids, angles=None, token_mask=None, step=None):
        """Read one token without looking at anything on the host, so that a CUDA graph can hold it.

        Args:
            inputs_embeds (Tensor): (B, 1, D).
            cache (HybridCache): Static; its tensors are updated, its tokens are not counted.
            position_ids (Tensor): (B, 1).
            angles (tuple, optional): What :meth:`angles` gives; derived from the positions when absent.
            token_mask (Tensor, optional): Boolean (B, 1), False at padding.
            step (DecodeStep): Where keys are written and which are seen.

        Returns:
            Tensor: (B, 1, D) after the final norm.
        """
        angles, embedding_angles = self.angles(inputs_embeds, position_ids) if angles is None else angles
        context = {
            "position_embeddings": angles,
            "embedding_position_embeddings": embedding_angles,
            "position_ids": position_ids,
            "token_mask": token_mask,
            "cache": cache,
            "step": step,
        }
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, **context)
        return self.norm(inputs_embeds)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        segment_ids=None,
        use_cache=None,
        output_hidden_states=None,
        **_,
    ):
        """Run the stack.

        Args:
            input_ids (Tensor, optional): (B, L); or pass ``inputs_embeds`` (B, L, D).
            attention_mask (Tensor, optional): (B, seen + L).
            position_ids (Tensor, optional): (B, L).
            past_key_values (HybridCache, optional): Updated in place.
            inputs_embeds (Tensor, optional): (B, L, D).
            segment_ids (Tensor, optional): (B, L).
            use_cache (bool, optional): Create and return a cache.
            output_hidden_states (bool, optional): Return every layer's input and the normed output.

        Returns:
            BaseModelOutputWithPast: ``last_hidden_state`` (B, L, D) after the final norm.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = HybridCache(self.config)
        context = self.layer_context(inputs_embeds, attention_mask, position_ids, segment_ids, past_key_values)
        hidden_states, kept = inputs_embeds, []
        for layer in self.layers:
            if output_hidden_states:
                kept.append(hidden_states)
            hidden_states = layer(hidden_states, **context)
        hidden_states = self.norm(hidden_states)
        if past_key_values is not None:
            past_key_values.seen_tokens += inputs_embeds.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*kept, hidden_states) if output_hidden_states else None,
        )


class HybridVLForCausalLM(HybridVLPreTrainedModel, GenerationMixin):
    """Decoder with language head and, when ``config.vision`` is set, an image front end.

    Args:
        config (HybridVLConfig): Model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = HybridDecoder(config)
        if config.vision is not None:
            self.vision = FRONT_ENDS[config.vision["front_end"]](config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """nn.Embedding: The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def embed(self, input_ids, pixel_values=None):
        """Token vectors with visual vectors written over the image tokens, in order.

        Args:
            input_ids (Tensor): (B, L).
            pixel_values (Tensor, optional): (T, 3, S, S), tiles of all rows in reading order.

        Returns:
            Tensor: (B, L, D).

        Raises:
            ValueError: When tiles and image tokens do not match.
        """
        embeds = self.model.embed_tokens(input_ids)
        if self.config.image_token_id is None or self.config.vision is None:
            if pixel_values is not None and pixel_values.shape[0]:
                raise ValueError("this model has no image front end, but pixel_values were passed")
            return embeds
        slots = input_ids == self.config.image_token_id
        wanted = int(slots.sum())
        if pixel_values is None or pixel_values.shape[0] == 0:
            if wanted:
                raise ValueError(f"the input has {wanted} image tokens, but no image was passed")
            if torch.is_grad_enabled() and self.training and any(p.requires_grad for p in self.vision.parameters()):
                # Data-parallel training waits for a gradient of every weight, also on a batch of text alone.
                size, channels = self.config.vision["image_size"], self.config.vision.get("num_channels", 3)
                embeds = embeds + 0 * self.vision(embeds.new_zeros(1, channels, size, size)).sum().to(embeds.dtype)
            return embeds
        visual = self.vision(pixel_values).flatten(0, 1).to(embeds.dtype)
        if visual.shape[0] != wanted:
            raise ValueError(f"{pixel_values.shape[0]} tiles give {visual.shape[0]} vectors for {wanted} image tokens")
        return embeds.masked_scatter(slots[..., None], visual)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        segment_ids=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Score tokens.

        Args:
            input_ids (Tensor, optional): (B, L); or pass ``inputs_embeds``.
            pixel_values (Tensor, optional): (T, 3, S, S).
            attention_mask (Tensor, optional): (B, seen + L), 0 at padding.
            position_ids (Tensor, optional): (B, L).
            past_key_values (HybridCache, optional): Tokens seen before; updated in place.
            inputs_embeds (Tensor, optional): (B, L, D).
            labels (Tensor, optional): (B, L), -100 where nothing is supervised; shifted inside.
            use_cache (bool, optional): Return a cache.
            logits_to_keep (int): Only the last n positions' logits; 0 keeps all.
            segment_ids (Tensor, optional): (B, L) integers of packed rows.
            output_hidden_states (bool, optional): Return every layer's input and the normed output.

        Returns:
            CausalLMOutputWithPast: ``logits`` (B, n, V) and, with labels, the mean token loss.
        """
        if (
            past_key_values is not None
            and past_key_values.cuda_graph
            and past_key_values.seen_tokens
            and inputs_embeds is None
            and labels is None
            and not output_hidden_states
            and not torch.is_grad_enabled()
            and input_ids.shape[1] == 1
        ):
            logits = replay(self, past_key_values, input_ids, position_ids, attention_mask)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        if inputs_embeds is None and past_key_values is not None and input_ids.shape[1] == 1:
            # A generated image token is an ordinary token; only prompts have slots to fill.
            inputs_embeds = self.model.embed_tokens(input_ids)
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segment_ids is None
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            segment_ids=segment_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if segment_ids is not None:
                # No sample's last token foretells the next sample.
                labels = labels.masked_fill(segment_starts(segment_ids), -100)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    @torch.no_grad()
    def prefill(self, input_ids, *, pixel_values=None, attention_mask=None, past_key_values=None, chunk_size=None):
        """Feed tokens into a cache without scoring them; activation memory follows the chunk size.

        A stream is read by calling this with the cache of the call before, for every frame or line of text:
        ``input_ids`` and ``pixel_values`` are the new ones alone. To ask something in between, let
        :meth:`generate` read the question from ``cache.copy()``.

        Args:
            input_ids (Tensor): New tokens, (B, L).
            pixel_values (Tensor, optional): Tiles of the new tokens.
            attention_mask (Tensor, optional): (B, seen + L).
            past_key_values (HybridCache, optional): Continued; a new one is made when absent.
            chunk_size (int, optional): Tokens per forward pass; ``PREFILL_CHUNK`` when absent.

        Returns:
            HybridCache: The cache after the new tokens.
        """
        cache = HybridCache(self.config) if past_key_values is None else past_key_values
        end = cache.get_seq_length()
        cache.reserve(end + input_ids.shape[1])
        for embeds in self._embed_chunks(input_ids, pixel_values, chunk_size or PREFILL_CHUNK):
            end += embeds.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :end]
            positions = None if mask is None else _positions_from_mask(mask)[:, -embeds.shape[1] :]
            self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return cache

    def _embed_chunks(self, input_ids, pixel_values, size):
        if pixel_values is not None and pixel_values.shape[0]:
            # A tile may lie across chunks.
            return self.embed(input_ids, pixel_values).split(size, dim=1)
        if self.config.image_token_id is not None and (input_ids == self.config.image_token_id).any():
            # Refused before any part of the tokens is read.
            self.embed(input_ids, pixel_values)
        return map(self.model.embed_tokens, input_ids.split(size, dim=1))

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        pixel_values=None,
        past_key_values=None,
        prefill_chunk_size=None,
        cuda_graph="auto",
        **kwargs,
    ):
        """Hugging Face ``generate``, plus images, chunked prefill, continued conversations and CUDA graphs.

        Args:
            input_ids (Tensor): The whole conversation so far, (B, L).
            pixel_values (Tensor, optional): Tiles of the tokens that the cache has not seen.
            past_key_values (HybridCache, optional): Cache of an earlier call; only newer tokens are read.
            prefill_chunk_size (int, optional): Tokens per forward pass while reading the prompt; prompts of more
                than ``PREFILL_CHUNK`` tokens are read in chunks of that size in any case.
            cuda_graph (bool | str): Replay the step of one token as a CUDA graph, captured once and kept with
                its cache for later calls with as many rows. ``auto`` does so on a GPU for answers that may be
                of ``GRAPH_TOKENS`` or more. Where there can be none (beams, growing keys, no GPU) decoding
                goes without; asked for by True, that is said once.
            **kwargs: As for :meth:`transformers.GenerationMixin.generate`.

        Returns:
            Tensor | ModelOutput: As for :meth:`transformers.GenerationMixin.generate`.
        """
        if self.config.image_token_id is not None:
            # A picture's slot is filled by the user, never written by the model.
            kwargs.setdefault("suppress_tokens", [self.config.image_token_id])
        if input_ids is None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None and past_key_values is None:
                # transformers' own cache holds keys and values alone.
                past_key_values, _ = self._decoding_cache(embeds[..., 0], None, False, kwargs)
            return super().generate(past_key_values=past_key_values, **kwargs)
        if kwargs.get("attention_mask") is None:
            # transformers would guess padding from the pad id, which may be an ordinary token.
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        cache, keep = self._decoding_cache(input_ids, past_key_values, cuda_graph, kwargs)
        new = input_ids[:, cache.get_seq_length() : -1]
        has_images = pixel_values is not None and pixel_values.shape[0] > 0
        if new.shape[1] and (has_images or prefill_chunk_size or new.shape[1] > PREFILL_CHUNK):
            self.prefill(
                new,
                pixel_values=pixel_values,
                attention_mask=kwargs["attention_mask"][:, :-1],
                past_key_values=cache,
                chunk_size=prefill_chunk_size,
            )
        output = super().generate(input_ids, past_key_values=cache, **kwargs)
        if keep:
            _GRAPH_CACHES[self] = cache, addresses(self)
        return output

    def _decoding_cache(self, input_ids, cache, cuda_graph, kwargs):
        """The cache to decode with, and whether to keep it for the next call, one per model."""

        def option(name):
            chosen = kwargs.get("generation_config") or self.generation_config
            return kwargs.get(name) if kwargs.get(name) is not None else getattr(chosen, name, None)

        batch, length = input_ids.shape
        tokens = option("max_new_tokens") or max((option("max_length") or 0) - length, 0) or ROOM
        if cache is None and (option("num_beams") or 1) > 1:
            # Beams swap whole rows at every token, of which there had better be no more than what was seen.
            cache = HybridCache(self.config)
        reason = "it was not asked for" if not cuda_graph else self._graph_refusal(cache)
        if cuda_graph == "auto" and tokens < GRAPH_TOKENS:
            reason = "the answer is short"
        if reason and cuda_graph is True:
            refuse(f"no CUDA graph: {reason}")
        # Whoever gets the cache back in the output keeps it, and several answers give it more rows.
        keep = cache is None and not reason and not option("return_dict_in_generate")
        keep = keep and (option("num_return_sequences") or 1) == 1
        if cache is None and reason:
            # Room for a long answer is made when it comes.
            cache = HybridCache(self.config, max_length=length + min(tokens, ROOM))
        elif cache is None:
            cache, weights = _GRAPH_CACHES.pop(self, (None, None)) if keep else (None, None)
            wanted = length + tokens
            fits = cache is not None and cache.rows == batch and (cache.max_length or wanted) >= wanted
            if not fits or weights != addresses(self):
                # Room in steps, so that a slightly longer prompt finds the graph of the one before.
                cache = HybridCache(self.config, max_length=-(-wanted // ROOM) * ROOM)
            cache.reset()
        cache.cuda_graph = not reason
        if cache.cuda_graph and cache.graphs:
            weights = addresses(self)
            cache.graphs = {key: graph for key, graph in cache.graphs.items() if graph.weights == weights}
        return cache, keep

    def _graph_refusal(self, cache):
        """str | None: Why single tokens can not be read by a CUDA graph."""
        if self.device.type != "cuda" or len({p.device for p in self.parameters()}) > 1:
            return "the model is not on one GPU"
        if cache is not None and not cache.is_static:
            return "the cache grows by concatenation, HybridCache(config, max_length=...) does not"
        if self.training:
            return "the model is in training mode"
        if was_refused(self):
            return "capturing its step has failed before"
        return None

    def _expand_inputs_for_generation(self, expand_size=1, past_key_values=None, **kwargs):
        # transformers reads prompts only after this point and leaves the cache alone; ours may be filled.
        if expand_size > 1 and past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, past_key_values=past_key_values, **kwargs
        )


def _positions(inputs_embeds, attention_mask, segment_ids, seen):
    batch, length = inputs_embeds.shape[:2]
    if segment_ids is not None:
        return _positions_from_segments(segment_ids)
    if attention_mask is not None:
        return _positions_from_mask(attention_mask)[:, -length:]
    return torch.arange(seen, seen + length, device=inputs_embeds.device).expand(batch, -1)


def _positions_from_mask(attention_mask):
    """Positions counted from the first real token, (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _positions_from_segments(segment_ids):
    """Positions that restart at every segment, (B, L)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    return index - torch.where(segment_starts(segment_ids), index, 0).cummax(dim=1).values


def _flash_packing(segment_ids):
    """Segments of all rows end to end, as flash attention's kernel for unequal lengths takes them."""
    starts = segment_starts(segment_ids).flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=segment_ids.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _same_segment(segment_ids):
    def visible(batch_idx, head_idx, q_idx, kv_idx):
        return segment_ids[batch_idx, q_idx] == segment_ids[batch_idx, kv_idx]

    return visible
