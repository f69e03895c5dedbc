"""Depthwise causal convolution in front of the SSD scan.

Axis letters: B batch, L length, D channels, W kernel width.

    y_t = act( bias + sum_w weight[:, w] * x_{t - (W - 1) + w} )
"""

import importlib
import importlib.util

import torch
import torch.nn.functional as F

from .causal_conv_torch import torch_conv
from .ssd import number_segments

BACKENDS = ("auto", "torch", "cuda")


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
        initial_state (Tensor, optional): The W-1 inputs before the first token, (B, D, W-1).
        return_final_state (bool): Also return the last W-1 inputs, (B, D, W-1).
        backend (str): ``auto``, ``torch`` or ``cuda`` (causal-conv1d).

    Returns:
        Tensor | tuple[Tensor, Tensor]: y (B, L, D); with ``return_final_state`` also the state.

    Raises:
        ValueError: For an unknown activation or backend, or one that cannot do what is asked.
    """
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r} of causal_conv, expected 'silu' or None")
    if backend not in BACKENDS:
        raise ValueError(f"unknown causal_conv backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if segment_ids is not None:
        segment_ids = number_segments(segment_ids)
    # The kernel covers widths 2-4 and takes segment ids only without an initial state.
    plain = initial_state is None and weight.shape[1] in (2, 3, 4)
    if backend == "auto":
        available = x.is_cuda and plain and importlib.util.find_spec("causal_conv1d") is not None
        backend = "cuda" if available else "torch"
    if backend == "cuda":
        if not plain:
            raise ValueError("causal_conv backend 'cuda' takes no initial state and kernel widths 2, 3 and 4")
        y = _cuda_conv(x, weight, bias, activation, segment_ids)
    else:
        y = torch_conv(x, weight, bias, activation, segment_ids, initial_state)
    if not return_final_state:
        return y
    return y, _final_state(x, weight.shape[1], initial_state)


def causal_conv_step(x, weight, bias=None, *, activation="silu", state):
    """Convolve one token.

    Args:
        x (Tensor): (B, D).
        weight (Tensor): (D, W).
        bias (Tensor, optional): (D,).
        activation (str | None): ``silu`` or None.
        state (Tensor): The W-1 inputs before this one, (B, D, W-1).

    Returns:
        tuple[Tensor, Tensor]: y (B, D) and the new state (B, D, W-1).
    """
    window = torch.cat([state.to(x.dtype), x[..., None]], dim=-1)
    y = (window * weight).sum(-1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation else y), window[..., 1:]


def _cuda_conv(x, weight, bias, activation, segment_ids):
    kernel = importlib.import_module("causal_conv1d").causal_conv1d_fn
    seq_idx = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
    # With seq_idx the kernel asks for a channel-last tensor, which x.transpose already is.
    return kernel(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation=activation).transpose(1, 2)


def _final_state(x, width, initial_state):
    tail = x[:, max(0, x.shape[1] - (width - 1)) :].transpose(1, 2)
    missing = width - 1 - tail.shape[-1]
    if missing > 0:
        past = x.new_zeros(x.shape[0], x.shape[2], missing)
        if initial_state is not None:
            past = initial_state.to(x.dtype)[..., -missing:]
        tail = torch.cat([past, tail], dim=-1)
    return tail
