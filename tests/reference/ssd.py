"""Step-by-step recurrences: the truth for `ssd` and `causal_conv`.

Axis letters: B batch, L length, H heads, G groups (of B and C), P head width, N state width,
W convolution width.
"""

import torch
import torch.nn.functional as F


def naive_ssd(x, dt, A, B, C, dt_bias=None, initial_state=None, segment_ids=None, dtype=None):
    """State-space recurrence, one token at a time; differentiable.

        delta_t = softplus(dt_t + dt_bias)
        S_t     = exp(delta_t A) S_{t-1} + delta_t x_t B_t^T
        y_t     = S_t C_t

    Args:
        x: (B, L, H, P).
        dt: (B, L, H), before bias and softplus.
        A: (H,), negative.
        B, C: (B, L, G, N); head h reads group h // (H / G).
        dt_bias: (H,) or None.
        initial_state: (B, H, P, N), the state before token 0, or None for zero.
        segment_ids: (B, L); where the id differs from the previous token's, the state
            starts from zero. Token 0 continues `initial_state`.
        dtype: in which to compute and return; None is x's.

    Returns:
        y (B, L, H, P) and the final state (B, H, P, N).
    """
    dtype = x.dtype if dtype is None else dtype
    x, dt, A, B, C = (value.to(dtype) for value in (x, dt, A, B, C))
    batch, length, heads, _ = x.shape
    group = [h // (heads // B.shape[2]) for h in range(heads)]
    B, C = B[:, :, group], C[:, :, group]  # (B, L, H, N)
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))

    state = x.new_zeros(batch, heads, x.shape[-1], B.shape[-1])
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(length):
        if segment_ids is not None and t > 0:
            starts = segment_ids[:, t] != segment_ids[:, t - 1]
            state = torch.where(starts[:, None, None, None], torch.zeros_like(state), state)
        decay = torch.exp(delta[:, t] * A)
        write = torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        state = decay[:, :, None, None] * state + write
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y, state


def naive_causal_conv(x, weight, bias=None, activation=None, segment_ids=None, initial_state=None):
    """Depthwise causal convolution, one token and one tap at a time; differentiable.

        y_t = activation(bias + sum_k weight[:, k] x_{t - (W - 1) + k})

    Args:
        x: (B, L, C).
        weight: (C, W); the last column weighs the current token.
        bias: (C,) or None.
        activation: None or "silu".
        segment_ids: (B, L); a tap on the far side of a change of id reads zero.
        initial_state: (B, C, W - 1), the inputs before position 0, oldest first; they
            belong to the segment of token 0. None for zero.

    Returns:
        y (B, L, C).
    """
    assert activation in (None, "silu"), activation
    batch, length, channels = x.shape
    width = weight.shape[1]
    rows = []
    for b in range(batch):
        tokens = []
        for t in range(length):
            total = x.new_zeros(channels) if bias is None else bias
            for k in range(width):
                s = t - (width - 1) + k
                if segment_ids is not None and _crosses_border(segment_ids[b], max(s, 0), t):
                    continue
                if s >= 0:
                    total = total + weight[:, k] * x[b, s]
                elif initial_state is not None:
                    total = total + weight[:, k] * initial_state[b, :, width - 1 + s]
            tokens.append(total if activation is None else F.silu(total))
        rows.append(torch.stack(tokens) if tokens else x[b])
    return torch.stack(rows)


def _crosses_border(ids, s, t):
    """Whether any token of s+1..t has another id than the token before it."""
    return any(ids[j] != ids[j - 1] for j in range(s + 1, t + 1))
