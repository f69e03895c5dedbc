"""One token of the causal convolution, for decoding.

Axis letters: B batch, D channels, W kernel width.
"""

import torch
import torch.nn.functional as F

from .causal_conv_step_triton import triton_conv_step
from .choice import Backends, Kernel


def causal_conv_step(x, weight, bias=None, *, activation="silu", state, in_place=False, backend="auto"):
    """Convolve one token.

    Args:
        x (Tensor): (B, D).
        weight (Tensor): (D, W).
        bias (Tensor, optional): (D,).
        activation (str | None): ``silu`` or None.
        state (Tensor): The W-1 inputs before this one, (B, D, W-1).
        in_place (bool): Write the new state over ``state``, which must carry no gradient.
        backend (str): ``torch``, ``triton`` or ``auto``: on CUDA triton where it works and no gradient is asked for,
            elsewhere torch. The environment variable XTUNER_EXT_CONV_STEP_BACKEND says what ``auto`` is.

    Returns:
        tuple[Tensor, Tensor]: y (B, D) and the new state (B, D, W-1) in x's dtype; with ``in_place`` that is
        ``state``, in its own.

    Raises:
        ValueError: For an unknown backend, a named one that cannot do what is asked, or a state that trains and
            cannot be written over.
        RuntimeError: For a named backend that does not agree with torch on this machine.
    """
    given = (x, weight, bias, state)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if trains and in_place:
        raise ValueError("causal_conv_step: a state cannot be written over in training")
    if trains or weight.shape[1] < 2:
        if backend not in ("auto", "torch"):
            raise ValueError(f"causal_conv_step backend {backend!r} takes two taps or more and gives no gradients")
        y = _convolve(x, weight, bias, activation, state)
        new = _shift(x, state)
        return y, (state.copy_(new) if in_place else new)
    call = STEP.choose(backend, x, (weight.shape[1], bias is not None), "one token", {}, _no_tuning)
    if not in_place:
        state = state.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return call(x, weight, bias, activation, state), state


def _no_tuning(implementation):
    """Nothing to tune: the kernel has one setting."""


def _torch_step(x, weight, bias, activation, state):
    """Tensor: y (B, D); ``state`` is updated in place."""
    y = _convolve(x, weight, bias, activation, state)
    state.copy_(_shift(x, state))
    return y


def _convolve(x, weight, bias, activation, state):
    y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for tap in range(weight.shape[1] - 1):
        y = torch.addcmul(y, state[..., tap].to(x.dtype), weight[:, tap])
    return F.silu(y) if activation else y


def _shift(x, state):
    return torch.cat([state.to(x.dtype), x[..., None]], dim=-1)[..., 1:]


def _probe(implementation, device, dtype, kind):
    """dict[str, Tensor]: Outputs of one step of two rows."""
    width, with_bias = kind
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, state = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((2, 300), (300, width), (300,), (2, 300, width - 1))
    )
    y = implementation(x, weight, bias if with_bias else None, "silu", state)
    return {"y": y, "state": state}


STEP = Backends(
    "causal_conv_step",
    _torch_step,
    {"triton": Kernel(triton_conv_step, "triton", "triton")},
    _probe,
    "XTUNER_EXT_CONV_STEP_BACKEND",
)
