"""One token of the causal convolution as one Triton kernel.

Axis letters: B batch, D channels, W kernel width.
"""

import torch

from .choice import on_own_device

try:
    import triton
    import triton.language as tl
except ImportError:
    # torch for CPUs comes without it.
    triton = None

# Channels that one program handles.
CHANNELS = 256


@on_own_device
def triton_conv_step(x, weight, bias, activation, state):
    """Convolve one token.

    Args:
        x (Tensor): (B, D).
        weight (Tensor): (D, W).
        bias (Tensor | None): (D,).
        activation (str | None): ``silu`` or None.
        state (Tensor): The W-1 inputs before this one, (B, D, W-1), of any strides; updated in place.

    Returns:
        Tensor: y (B, D) in x's dtype.
    """
    batch, channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _conv_step[(triton.cdiv(channels, CHANNELS), batch)](
        x,
        weight,
        weight if bias is None else bias,
        state,
        y,
        channels,
        *x.stride(),
        *weight.stride(),
        *state.stride(),
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=activation is not None,
        CHANNELS=CHANNELS,
    )
    return y


if triton is not None:

    @triton.jit
    def _conv_step(
        x,
        weight,
        bias,
        state,
        y,
        channels,
        x_row,
        x_channel,
        weight_channel,
        weight_tap,
        state_row,
        state_channel,
        state_tap,
        WIDTH: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        SILU: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        row = tl.program_id(1).to(tl.int64)
        inside = d < channels
        now = tl.load(x + row * x_row + d * x_channel, mask=inside, other=0.0)
        taps = weight + d * weight_channel
        total = now.to(tl.float32) * tl.load(taps + (WIDTH - 1) * weight_tap, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        past = state + row * state_row + d * state_channel
        for tap in tl.static_range(WIDTH - 1):
            held = tl.load(past + tap * state_tap, mask=inside, other=0.0)
            total += held.to(tl.float32) * tl.load(taps + tap * weight_tap, mask=inside, other=0.0).to(tl.float32)
            if tap > 0:
                tl.store(past + (tap - 1) * state_tap, held, mask=inside)
        tl.store(past + (WIDTH - 2) * state_tap, now.to(state.dtype.element_ty), mask=inside)
        if SILU:
            total = total / (1.0 + tl.exp(-total))
        tl.store(y + row * channels + d, total.to(y.dtype.element_ty), mask=inside)
