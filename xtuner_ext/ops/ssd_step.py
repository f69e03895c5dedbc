"""One token of the SSD recurrence, for decoding.

Axis letters: B batch, H heads, G groups, P head width, N state width.

Decoding is bound by reading and writing the state, so no copy of it is made beside the one that is returned, and none
at all with ``in_place``. Nothing here waits for a result, so a CUDA graph can record it once it has run.
"""

import torch

from .choice import Backends, Kernel
from .ssd_step_triton import triton_step
from .ssd_torch import time_steps


def ssd_step(x, dt, A, B, C, *, dt_bias=None, state, in_place=False, backend="auto"):
    """Advance the recurrence by one token.

    Args:
        x (Tensor): (B, H, P).
        dt (Tensor): (B, H).
        A (Tensor): (H,), fp32.
        B (Tensor): (B, G, N).
        C (Tensor): (B, G', N).
        dt_bias (Tensor, optional): (H,).
        state (Tensor): (B, H, P, N), fp32.
        in_place (bool): Write the new state over ``state``, which must be contiguous fp32 and carry no gradient.
        backend (str): ``torch``, ``triton`` or ``auto``: on CUDA triton where it works and no gradient is asked for,
            elsewhere torch. The environment variable XTUNER_EXT_SSD_STEP_BACKEND says what ``auto`` is.

    Returns:
        tuple[Tensor, Tensor]: y (B, H, P) in x's dtype and the new state in fp32; with ``in_place`` that is ``state``.

    Raises:
        ValueError: For an unknown backend, a named one that cannot do what is asked, or a state that cannot be
            written over.
        RuntimeError: For a named backend that does not agree with torch on this machine.
    """
    given = (x, dt, A, B, C, dt_bias, state)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if in_place and (trains or state.dtype != torch.float32 or not state.is_contiguous()):
        raise ValueError("ssd_step: only a contiguous fp32 state outside of training can be written over")
    if trains:
        if backend not in ("auto", "torch"):
            raise ValueError(f"ssd_step backend {backend!r} gives no gradients: use 'torch'")
        return _differentiable_step(*given)
    call = STEP.choose(backend, x, (x.shape[2], B.shape[2]), "one token", {}, _no_tuning)
    if not in_place:
        state = state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return call(x, dt, A, B, C, dt_bias, state), state


def _no_tuning(implementation):
    """Nothing to tune: the kernel has one setting."""


def _torch_step(x, dt, A, B, C, dt_bias, state):
    """Tensor: y (B, H, P); ``state`` is updated in place."""
    batch, heads, width = x.shape
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        delta = time_steps(dt, dt_bias)
        B, C = (_by_head(t, heads) for t in (B, C))
        state.mul_(torch.exp(delta * A)[..., None, None])
        state.addcmul_((delta[..., None] * x.float())[..., None], B[:, :, None])
        # A row times a matrix: a matrix times a column is the same numbers at a tenth of the speed on a CPU.
        y = torch.bmm(C.flatten(0, 1)[:, None], state.flatten(0, 1).mT)
    return y.view(batch, heads, width).to(x.dtype)


def _differentiable_step(x, dt, A, B, C, dt_bias, state):
    delta = time_steps(dt, dt_bias)
    B, C = (_by_head(t, x.shape[1]) for t in (B, C))
    decay = torch.exp(delta * A)[..., None, None]
    state = decay * state.float() + (delta[..., None] * x.float())[..., None] * B[:, :, None]
    return (state * C[:, :, None]).sum(-1).to(x.dtype), state


def _by_head(t, heads):
    t = t.float()
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def _probe(implementation, device, dtype, kind):
    """dict[str, Tensor]: Outputs of one step of four heads in two groups."""
    width, state_width = kind
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, dt, B, C = (normal(3, *shape, dtype=dtype) for shape in ((4, width), (4,), (2, state_width), (4, state_width)))
    state = normal(3, 4, width, state_width)
    y = implementation(x, dt, -normal(4).exp(), B, C, normal(4), state)
    return {"y": y, "state": state}


STEP = Backends(
    "ssd_step", _torch_step, {"triton": Kernel(triton_step, "triton", "triton")}, _probe, "XTUNER_EXT_SSD_STEP_BACKEND"
)
