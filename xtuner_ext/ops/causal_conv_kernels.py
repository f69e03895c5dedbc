"""The causal convolution by kernels.

Axis letters: B batch, L length, D channels, W kernel width.
"""

import importlib

import torch
import torch.nn.functional as F

from .choice import on_own_device
from .segments import flat_segments

# Elements that 32-bit pointer arithmetic reaches.
INT32_ELEMENTS = 2**31 - 1


@on_own_device
def native_conv(x, weight, bias, activation, segment_ids, initial_state):
    """Our own in Triton; arguments and result are those of ``torch_conv``."""
    # Where there is no Triton, this module is imported all the same.
    from .causal_conv_native import native_conv as convolve

    return convolve(x, weight, bias, activation, segment_ids, initial_state)


def cuda_conv(x, weight, bias, activation, segment_ids, initial_state):
    """causal-conv1d's ``causal_conv1d_fn``; arguments and result are those of ``torch_conv``."""
    return in_pieces(_cuda, x, weight, bias, activation, segment_ids, initial_state)


def in_pieces(convolve, x, weight, bias, activation, segment_ids, initial_state):
    """Convolve rows, and then pieces of a row, one after the other where all at once would be too large.

    Args:
        convolve (Callable): Convolves what it is given at once.

    Returns:
        Tensor: (B, L, D).
    """
    batch, length, channels = x.shape
    before, most = weight.shape[1] - 1, INT32_ELEMENTS // channels
    if batch * length <= most:
        return convolve(x, weight, bias, activation, segment_ids, initial_state)
    shared, ys = (weight, bias, activation), []
    if batch > 1:
        rows = max(1, min(batch - 1, most // length))
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            ids, state = (None if t is None else t[part] for t in (segment_ids, initial_state))
            ys.append(in_pieces(convolve, x[part], *shared, ids, state))
        return torch.cat(ys)
    # Every piece but the first begins with the W - 1 tokens before it, whose outputs are dropped.
    for start in range(0, length, most - before):
        first = max(0, start - before)
        part = slice(first, start + most - before)
        ids = None if segment_ids is None else segment_ids[:, part]
        y = convolve(x[:, part], *shared, ids, initial_state if first == 0 else None)
        ys.append(y[:, start - first :])
    return torch.cat(ys, 1)


def _cuda(x, weight, bias, activation, segment_ids, initial_state):
    kernel = importlib.import_module("causal_conv1d").causal_conv1d_fn
    # Channels must lie together, which they do in x transposed, and so must those of the states.
    x = x.contiguous().transpose(1, 2)
    options = {}
    if initial_state is not None:
        options["initial_states"] = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    if segment_ids is not None:
        options["seq_idx"] = segment_ids.to(torch.int32).contiguous()
    return kernel(x, weight, bias, activation=activation, **options).transpose(1, 2)


def fla_conv(x, weight, bias, activation, segment_ids, initial_state):
    """flash-linear-attention's ``causal_conv1d``; arguments and result are those of ``torch_conv``.

    Its addresses have 64 bits.
    """
    try:
        kernel = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    except ModuleNotFoundError:
        # Until version 0.5.
        kernel = importlib.import_module("fla.modules.convolution").causal_conv1d
    shape, borders = x.shape, None
    # fla counts the current token among the W inputs of a state.
    state = None if initial_state is None else F.pad(initial_state.to(x.dtype), (1, 0))
    if segment_ids is not None:
        borders, first, _ = flat_segments(segment_ids)
        x = x.reshape(1, -1, shape[2])
        if state is not None:
            state = state.new_zeros(len(borders) - 1, *state.shape[1:]).index_copy(0, first, state)
    state = None if state is None else state.contiguous()
    y, _ = kernel(
        x.contiguous(), weight.contiguous(), bias, initial_state=state, activation=activation, cu_seqlens=borders
    )
    return y.view(shape)
