"""The Mamba-2 mixer that takes attention's place, written out: the truth for the student layer.

Axis letters: B batch, L length, D model width, H query heads, G key/value heads, P head width
(also the state width).
"""

import torch
import torch.nn.functional as F

from tests.reference.ssd import naive_causal_conv, naive_ssd


def mixer_param_shapes(hidden_size, heads, kv_heads):
    """Every tensor of one mixer with its shape."""
    head_dim = hidden_size // heads
    channels = (heads + 2 * kv_heads) * head_dim
    return {
        "q_proj.weight": (heads * head_dim, hidden_size),
        "k_proj.weight": (kv_heads * head_dim, hidden_size),
        "v_proj.weight": (kv_heads * head_dim, hidden_size),
        "o_proj.weight": (hidden_size, heads * head_dim),
        "conv1d.weight": (channels, 1, 2),
        "conv1d.bias": (channels,),
        "in_proj.weight": (heads, hidden_size),
        "dt_bias": (heads,),
        "A_log_bias": (heads,),
        "g_proj.weight": (heads * head_dim, hidden_size),
        "g_norm.weight": (head_dim,),
    }


def naive_mamba_mixer(params, u, heads, kv_heads, eps=1e-5, segment_ids=None):
    """Mixer with the reference flags: convolution, gate norm and A on; D and q/k norm off.

        z  = [v | k | q] = u [Wv | Wk | Wq]^T
        z' = SiLU(conv(z)), then key/value head h // (H / G) serves head h
        y  = ssd(x=v', dt=u W_dt^T, A=-exp(A_log_bias), B=k', C=q', dt_bias)
        o  = RMSNorm_P(y) * g_norm * SiLU(u Wg^T)
        out = o Wo^T

    Args:
        params: tensors named as in `mixer_param_shapes`.
        u: (B, L, D), the layer's normed input.
        heads: H.
        kv_heads: G.
        eps: of the gate norm.
        segment_ids: (B, L) or None.

    Returns:
        o (B, L, H, P), the head outputs before the output projection, and out (B, L, D).
    """
    kv_width = params["v_proj.weight"].shape[0]
    head_dim = kv_width // kv_heads
    kv_head = [h // (heads // kv_heads) for h in range(heads)]

    v, k, q = (u @ params[name + "_proj.weight"].T for name in "vkq")
    z = torch.cat([v, k, q], dim=-1)
    z = naive_causal_conv(z, params["conv1d.weight"][:, 0], params["conv1d.bias"], "silu", segment_ids)
    v, k, q = z.split([kv_width, kv_width, heads * head_dim], dim=-1)
    v = v.unflatten(-1, (kv_heads, head_dim))[:, :, kv_head]
    k = k.unflatten(-1, (kv_heads, head_dim))[:, :, kv_head]
    q = q.unflatten(-1, (heads, head_dim))

    dt = u @ params["in_proj.weight"].T
    A = -torch.exp(params["A_log_bias"])
    y, _ = naive_ssd(v, dt, A, k, q, params["dt_bias"], segment_ids=segment_ids)

    gate = (u @ params["g_proj.weight"].T).unflatten(-1, (heads, head_dim))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * params["g_norm.weight"]
    head_outputs = y * F.silu(gate)
    return head_outputs, head_outputs.flatten(2) @ params["o_proj.weight"].T
