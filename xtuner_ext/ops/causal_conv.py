"""Depthwise causal convolution in front of the SSD scan.

Axis letters: B batch, L length, D channels, W kernel width.

    y_t = act( bias + sum_w weight[:, w] * x_{t - (W - 1) + w} )
"""

import torch

from .causal_conv_kernels import cuda_conv, fla_conv, native_conv
from .causal_conv_torch import torch_conv
from .choice import Backends, Kernel, recording, run_detached, up_to
from .segments import number_segments


def causal_conv(
    x,
    weight,
    bias=None,
    *,
    activation="silu",
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    backend="auto",
):
    """Convolve every channel with its own causal kernel.

    Args:
        x (Tensor): Inputs, (B, L, D).
        weight (Tensor): Kernels, (D, W); the last tap multiplies the current token.
        bias (Tensor, optional): (D,).
        activation (str | None): ``silu`` or None.
        segment_ids (Tensor, optional): Integers (B, L); taps do not cross a change.
        initial_state (Tensor, optional): The W-1 inputs before the first token, (B, D, W-1). They belong to its
            segment.
        return_final_state (bool): Also return the last W-1 inputs, (B, D, W-1).
        backend (str): ``torch``, ``native`` (our own Triton kernels), ``cuda`` (causal-conv1d), ``fla``
            (flash-linear-attention), ``tune`` or ``auto``: on CUDA the first of these kernels that is installed and
            agrees with torch, with ``tune`` the fastest such, timed once for every size of call; elsewhere torch. The
            environment variable XTUNER_EXT_CONV_BACKEND says what ``auto`` is.

    Returns:
        Tensor | tuple[Tensor, Tensor]: y (B, L, D); with ``return_final_state`` also the state.

    Raises:
        ValueError: For an unknown activation or backend, or a named one that cannot do what is asked.
        RuntimeError: For a named backend that does not agree with torch on this machine.
    """
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r} of causal_conv, expected 'silu' or None")
    if segment_ids is not None:
        segment_ids = number_segments(segment_ids)
    tensors = dict(x=x, weight=weight, bias=bias, initial_state=initial_state)
    options = dict(activation=activation, segment_ids=segment_ids)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    call = CONV.choose(
        backend,
        x,
        (weight.shape[1], bias is not None, segment_ids is not None, initial_state is not None, trains),
        _case(x, weight, segment_ids, trains),
        _refusals(x, weight, segment_ids),
        lambda implementation: run_detached(implementation, tensors, options, trains),
    )
    y = call(**tensors, **options)
    if not return_final_state:
        return y
    return y, _final_state(x, weight.shape[1], initial_state)


def _refusals(x, weight, segment_ids):
    """dict[str, str]: Why a kernel cannot do what a call asks, by its name."""
    refusals = {}
    if weight.shape[1] not in (2, 3, 4) or x.shape[2] % 8:
        refusals["cuda"] = (
            f"takes kernels of 2 to 4 taps and a number of channels that 8 divides, not {weight.shape[1]} taps and "
            f"{x.shape[2]} channels"
        )
    if segment_ids is not None and recording(x.device):
        refusals["fla"] = "counts the segments of packed rows, which cannot be recorded in a graph"
    return refusals


def _case(x, weight, segment_ids, trains):
    words = f"{x.shape[0]} x {up_to(x.shape[1])} tokens, {x.shape[2]} channels, {weight.shape[1]} taps"
    return words + (", packed" if segment_ids is not None else "") + (", with gradients" if trains else "")


def _probe(implementation, device, dtype, kind):
    """dict[str, Tensor]: Output, and where it trains gradients, of a convolution of 256 tokens."""
    width, with_bias, packed, with_state, trains = kind
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = dict(x=normal(2, 128, 64), weight=normal(64, width))
    if with_bias:
        tensors["bias"] = normal(64)
    if with_state:
        tensors["initial_state"] = normal(2, 64, width - 1)
    tensors = {name: t.requires_grad_(trains) for name, t in tensors.items()}
    ids = torch.tensor([[0] * 40 + [1] + [2] * 87, [0] * 100 + [1] * 28], device=device) if packed else None
    y = implementation(**{"bias": None, "initial_state": None, **tensors}, activation="silu", segment_ids=ids)
    if not trains:
        return {"y": y}
    gradients = torch.autograd.grad(y, list(tensors.values()), normal(*y.shape))
    return {"y": y, **dict(zip((f"gradient of {name}" for name in tensors), gradients))}


KERNELS = {
    "native": Kernel(native_conv, "triton", "triton"),
    "cuda": Kernel(cuda_conv, "causal-conv1d", "causal_conv1d"),
    "fla": Kernel(fla_conv, "flash-linear-attention", "fla"),
}
CONV = Backends("causal_conv", torch_conv, KERNELS, _probe, "XTUNER_EXT_CONV_BACKEND")


def _final_state(x, width, initial_state):
    tail = x[:, max(0, x.shape[1] - (width - 1)) :].transpose(1, 2)
    missing = width - 1 - tail.shape[-1]
    if missing > 0:
        past = x.new_zeros(x.shape[0], x.shape[2], missing)
        if initial_state is not None:
            past = initial_state.to(x.dtype)[..., -missing:]
        tail = torch.cat([past, tail], dim=-1)
    return tail
