"""The two sequence mixers, and the pair that a layer holds while it is distilled.

Axis letters: B batch, L length, D model width, H query heads, G key/value heads, P head width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from ..ops.causal_conv import causal_conv
from ..ops.causal_conv_step import causal_conv_step
from ..ops.decode_attention import decode_attention
from ..ops.ssd import ssd
from ..ops.ssd_step import ssd_step
from ..ops.window_attention import window_attention
from .cache import WINDOW


# Rounded to bf16 these would change decays by percents.
FP32_PARAMETERS = ("A_log", "dt_bias", "D")


class Attention(nn.Module):
    """Grouped-query softmax attention with rotary positions.

    Args:
        config (HybridVLConfig): Model configuration.
        layer_idx (int): Global layer index, the key into the cache.
    """

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        _add_projections(self, config)

    def project(self, hidden_states):
        """tuple[Tensor, Tensor, Tensor]: Queries, keys and values, heads side by side, (B, L, HP) and (B, L, GP)."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def head_outputs(
        self,
        hidden_states,
        *,
        position_embeddings,
        attention_mask=None,
        packing=None,
        projected=None,
        cache=None,
        step=None,
        **_,
    ):
        """Attend.

        Args:
            hidden_states (Tensor): Normalised layer input, (B, L, D).
            position_embeddings (tuple[Tensor, Tensor]): cos and sin, (B, L, P).
            attention_mask (Tensor, optional): Mask prepared by transformers for the attention backend.
            packing (dict, optional): Where packed samples begin, as flash attention takes it.
            projected (tuple, optional): What :meth:`project` gave before.
            cache (HybridCache, optional): Keys and values seen before; updated.
            step (DecodeStep, optional): Where the single token's key goes, inside of a CUDA graph.

        Returns:
            Tensor: Per-head outputs before the output projection, (B, L, H, P).
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (t.view(shape).transpose(1, 2) for t in projected or self.project(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if step is not None:
            layer = cache.layers[self.layer_idx]
            layer.write(step.position, key, value)
            mask, last = step.key_mask, step.position
            output = decode_attention(query[:, :, 0], layer.keys, layer.values, last, scale=self.scaling, mask=mask)
            return output[:, None]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if query.shape[2] == 1 and attention_mask is None and implementation == "sdpa" and not query.is_cuda:
            # The heads of a group stand where a sequence would: on a CPU enable_gqa repeats all keys.
            query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
            return F.scaled_dot_product_attention(query, key, value, scale=self.scaling).reshape(shape)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, **(packing or {})}
        output, _ = attend(self, query, key, value, attention_mask, **options)
        return output.reshape(shape)

    def forward(self, hidden_states, **context):
        """Mix tokens: (B, L, D) to (B, L, D)."""
        return self.o_proj(self.head_outputs(hidden_states, **context).flatten(2))


class Mamba2Mixer(nn.Module):
    """Mamba-2 mixer whose C, B, x and output projections are an attention's q, k, v and o.

    mmMamba (arXiv 2502.13145) section 3; the discretisation is the SSD one of Mamba-2. Decay
    rates and time-step biases stay fp32 when the model is cast.

    Args:
        config (HybridVLConfig): Model configuration; ``config.mixer`` shapes this module.
        layer_idx (int): Global layer index, the key into the cache.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer = mixer = config.mixer_config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        inner, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        # Order of the convolved channels: [v, k, q].
        self.split = [kv_width, kv_width, inner]
        _add_projections(self, config)
        if mixer.conv_kernel:
            self.conv1d = nn.Conv1d(sum(self.split), sum(self.split), mixer.conv_kernel, groups=sum(self.split))
        self.dt_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads, dtype=torch.float32))
        if mixer.learn_A:
            self.A_log = nn.Parameter(torch.zeros(self.num_heads, dtype=torch.float32))
        if mixer.use_D:
            self.D = nn.Parameter(torch.ones(self.num_heads, dtype=torch.float32))
        if mixer.qk_norm == "layernorm":
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        if mixer.gate:
            self.g_proj = nn.Linear(config.hidden_size, inner, bias=mixer.gate_bias)
            # One weight for all heads; eps is fixed by the reference, whatever the model's own.
            self.g_norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        if mixer.window:
            self.share_proj = nn.Linear(config.hidden_size, self.num_heads)
        if mixer.sink:
            self.sink_key = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim))
            self.sink_value = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim))

    def head_outputs(
        self,
        hidden_states,
        *,
        position_embeddings=None,
        position_ids=None,
        token_mask=None,
        segment_ids=None,
        projected=None,
        cache=None,
        **_,
    ):
        """Scan.

        Args:
            hidden_states (Tensor): Normalised layer input, (B, L, D).
            position_embeddings (tuple[Tensor, Tensor], optional): cos and sin, (B, L, P); for ``use_rope``
                and ``window``.
            position_ids (Tensor, optional): Integers (B, L); for ``sink``.
            token_mask (Tensor, optional): Boolean (B, L), False at padding.
            segment_ids (Tensor, optional): Integers (B, L) of packed rows.
            projected (tuple, optional): What the attention's ``project`` gave, where the projections are its own.
            cache (HybridCache, optional): States after the tokens seen before; updated.

        Returns:
            Tensor: Per-head outputs before the output projection, (B, L, H, P).
        """
        batch, length, _ = hidden_states.shape
        q, k, v = projected or (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        vkq = torch.cat([v, k, q], -1)
        exact = None
        if self.mixer.window:
            exact = self._attend(vkq, position_embeddings, position_ids, token_mask, segment_ids, cache)
        dt = self.dt_proj(hidden_states)
        if token_mask is not None:
            vkq = vkq * token_mask[..., None]
            dt = dt.masked_fill(~token_mask[..., None], -torch.inf)
        vkq = self._convolve(vkq, segment_ids, cache)
        v, kq = self._heads(vkq)
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        kq = self._normalise(kq)
        if self.mixer.use_rope:
            kq = _rotate(kq, *position_embeddings)
        k, q = kq.split([self.num_kv_heads, self.num_heads], dim=2)
        y = self._scan(v, dt, k, q, segment_ids, cache)
        if self.mixer.use_D:
            y = y + self.D[:, None].to(y.dtype) * v
        if self.mixer.gate:
            gate = self.g_proj(hidden_states).view(y.shape)
            # In y's own precision: under mixed precision an fp32 weight would leave the fused kernel.
            y = F.rms_norm(y, (self.head_dim,), self.g_norm.weight.to(y.dtype), self.g_norm.eps) * F.silu(gate)
        if exact is not None:
            # The softmax over the window forgets how much of the attention's weight lay outside of it.
            y = y + exact * torch.sigmoid(self.share_proj(hidden_states))[..., None]
        return y

    def forward(self, hidden_states, **context):
        """Mix tokens: (B, L, D) to (B, L, D)."""
        return self.o_proj(self.head_outputs(hidden_states, **context).flatten(2))

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).data for name in FP32_PARAMETERS if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype and before.is_meta == parameter.is_meta:
                parameter.data = before.to(parameter.device)
        return self

    def _attend(self, vkq, position_embeddings, position_ids, token_mask, segment_ids, cache):
        v, kq = self._heads(vkq)
        k, q = _rotate(kq, *position_embeddings).split([self.num_kv_heads, self.num_heads], dim=2)
        output, state = window_attention(
            q,
            k,
            v,
            window=self.mixer.window,
            token_mask=token_mask,
            segment_ids=segment_ids,
            # The first token has position 0, at which keys are not rotated.
            sink=(self.sink_key, self.sink_value) if self.mixer.sink else None,
            beyond=position_ids >= self.mixer.window if self.mixer.sink else None,
            past=None if cache is None else cache.layers[self.layer_idx].recurrent_states[WINDOW],
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx, state_idx=WINDOW)
        return output

    def _convolve(self, vkq, segment_ids, cache):
        activation = self.mixer.conv_activation
        if not self.mixer.conv_kernel:
            return F.silu(vkq) if activation else vkq
        # Under mixed precision an fp32 weight would promote the whole scan.
        weight, bias = self.conv1d.weight.squeeze(1).to(vkq.dtype), self.conv1d.bias.to(vkq.dtype)
        if cache is None:
            return causal_conv(vkq, weight, bias, activation=activation, segment_ids=segment_ids)
        state = cache.layers[self.layer_idx].conv_states[0]
        if state is not None and vkq.shape[1] == 1:
            # The cache keeps what it is given, so nothing is lost by writing there at once.
            options = dict(activation=activation, state=state, in_place=not torch.is_grad_enabled())
            output, state = causal_conv_step(vkq[:, 0], weight, bias, **options)
            output = output[:, None]
        else:
            output, state = causal_conv(
                vkq, weight, bias, activation=activation, initial_state=state, return_final_state=True
            )
        cache.update_conv_state(state, self.layer_idx)
        return output

    def _heads(self, vkq):
        """v (B, L, G, P), and k and q side by side, (B, L, G+H, P): what is done to both is done once."""
        heads = vkq.unflatten(-1, (-1, self.head_dim))
        return heads.split([self.num_kv_heads, self.num_kv_heads + self.num_heads], dim=2)

    def _normalise(self, kq):
        if self.mixer.qk_norm == "layernorm":
            k, q = kq.split([self.num_kv_heads, self.num_heads], dim=2)
            return torch.cat([self.k_norm(k), self.q_norm(q)], dim=2)
        if self.mixer.qk_norm == "l2":
            return F.normalize(kq, dim=-1, eps=1e-6)
        return kq

    def _scan(self, x, dt, B, C, segment_ids, cache):
        A = -torch.exp(self.A_log.float()) if self.mixer.learn_A else -torch.ones_like(self.dt_bias)
        if cache is None:
            return ssd(
                x, dt, A, B, C, dt_bias=self.dt_bias, chunk_size=self.mixer.chunk_size, segment_ids=segment_ids
            )
        state = cache.layers[self.layer_idx].recurrent_states[0]
        if state is not None and x.shape[1] == 1:
            options = dict(dt_bias=self.dt_bias, state=state, in_place=not torch.is_grad_enabled())
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **options)
            y = y[:, None]
        else:
            y, state = ssd(
                x,
                dt,
                A,
                B,
                C,
                dt_bias=self.dt_bias,
                chunk_size=self.mixer.chunk_size,
                initial_state=state,
                return_final_state=True,
            )
        cache.update_recurrent_state(state, self.layer_idx)
        return y


class PairedMixer(nn.Module):
    """A frozen attention and the Mamba-2 mixer that learns to replace it, in one layer.

    Args:
        attention (Attention): The teacher's mixer.
        mamba (Mamba2Mixer): The student's mixer.

    Attributes:
        active (str): Which of the two ``forward`` runs, a word of ``layer_types``.
    """

    def __init__(self, attention, mamba):
        super().__init__()
        self.attention = attention
        self.mamba = mamba
        self.active = "linear_attention"

    @property
    def mixer(self):
        """nn.Module: The active mixer."""
        return self.attention if self.active == "full_attention" else self.mamba

    def head_outputs(self, hidden_states, **context):
        """Per-head outputs of the active mixer, (B, L, H, P)."""
        return self.mixer.head_outputs(hidden_states, **context)

    def forward(self, hidden_states, **context):
        """Mix tokens with the active mixer: (B, L, D) to (B, L, D)."""
        return self.mixer(hidden_states, **context)


MIXERS = {"full_attention": Attention, "linear_attention": Mamba2Mixer}


def _rotate(heads, cos, sin):
    """Rotary positions for heads (B, L, H, P), from angles (B, L, P)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


def _add_projections(module, config):
    inner = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    module.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
    module.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
    module.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
    module.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
