"""One token of the SSD recurrence as one Triton kernel: the state is read once and written once.

Axis letters: B batch, H heads, G groups, P head width, N state width.
"""

import torch

from .choice import on_own_device

try:
    import triton
    import triton.language as tl
except ImportError:
    # torch for CPUs comes without it.
    triton = None

# Numbers of the state that one program holds.
TILE = 4096


@on_own_device
def triton_step(x, dt, A, B, C, dt_bias, state):
    """Advance the recurrence by one token.

    Args:
        x (Tensor): (B, H, P).
        dt (Tensor): (B, H).
        A (Tensor): (H,).
        B (Tensor): (B, G, N).
        C (Tensor): (B, G', N).
        dt_bias (Tensor | None): (H,).
        state (Tensor): (B, H, P, N), contiguous fp32; updated in place.

    Returns:
        Tensor: y (B, H, P) in x's dtype.
    """
    batch, heads, width = x.shape
    state_width = state.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, B, C = (t if t.stride(2) == 1 else t.contiguous() for t in (x, B, C))
    columns = triton.next_power_of_2(state_width)
    rows = max(1, min(triton.next_power_of_2(width), TILE // columns))
    grid = (batch * heads, triton.cdiv(width, rows))
    _step[grid](
        x,
        dt,
        A.contiguous(),
        B,
        C,
        A if dt_bias is None else dt_bias.contiguous(),
        state,
        y,
        heads,
        width,
        state_width,
        heads // B.shape[1],
        heads // C.shape[1],
        x.stride(0),
        x.stride(1),
        dt.stride(0),
        dt.stride(1),
        B.stride(0),
        B.stride(1),
        C.stride(0),
        C.stride(1),
        HAS_BIAS=dt_bias is not None,
        ROWS=rows,
        COLUMNS=columns,
    )
    return y


if triton is not None:

    @triton.jit
    def _step(
        x,
        dt,
        A,
        B,
        C,
        dt_bias,
        state,
        y,
        heads,
        width,
        state_width,
        heads_by_group_B,
        heads_by_group_C,
        x_row,
        x_head,
        dt_row,
        dt_head,
        B_row,
        B_group,
        C_row,
        C_group,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        index = tl.program_id(0).to(tl.int64)
        row, head = index // heads, index % heads
        p = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        n = tl.arange(0, COLUMNS)
        p_in, n_in = p < width, n < state_width

        raw = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(dt_bias + head).to(tl.float32)
        # log(1 + e) loses the digits of a small e, for which the series is exact.
        e = tl.exp(-tl.abs(raw))
        delta = tl.maximum(raw, 0.0) + tl.where(e < 0.01, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))
        decay = tl.exp(delta * tl.load(A + head).to(tl.float32))

        write = delta * tl.load(x + row * x_row + head * x_head + p, mask=p_in, other=0.0).to(tl.float32)
        b = tl.load(B + row * B_row + head // heads_by_group_B * B_group + n, mask=n_in, other=0.0).to(tl.float32)
        c = tl.load(C + row * C_row + head // heads_by_group_C * C_group + n, mask=n_in, other=0.0).to(tl.float32)
        at = state + index * width * state_width + p[:, None] * state_width + n[None, :]
        inside = p_in[:, None] & n_in[None, :]
        new = decay * tl.load(at, mask=inside, other=0.0) + write[:, None] * b[None, :]
        tl.store(at, new, mask=inside)
        out = tl.sum(new * c[None, :], axis=1)
        tl.store(y + index * width + p, out.to(y.dtype.element_ty), mask=p_in)
