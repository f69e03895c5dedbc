"""The SSD scan by kernels, in pieces where the 32-bit addresses of other packages' would not reach.

Axis letters: B batch, L length, H heads, G groups, P head width, N state width, Q chunk length.
"""

import importlib

import torch

from .choice import import_part, on_own_device
from .segments import flat_segments
from .ssd_torch import LOG2_E, STRONGEST_DECAY, time_steps

# Elements that 32-bit pointer arithmetic reaches, and chunks that one axis of a CUDA grid holds.
INT32_ELEMENTS = 2**31 - 1
GRID_CHUNKS = 2**16 - 1

FLA_CHUNK = 64


@on_own_device
def native_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state):
    """Our own in Triton, whose blocks have their own size; arguments and results are those of ``torch_ssd``."""
    # Where there is no Triton, this module is imported all the same.
    from .ssd_native import native_ssd as scan

    return scan(x, dt, A, B, C, dt_bias=dt_bias, segment_ids=segment_ids, initial_state=initial_state)


def triton_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state):
    """mamba-ssm's ``mamba_chunk_scan_combined``; arguments and results are those of ``torch_ssd``."""
    chunk_size = max(chunk_size, 16)
    heads, width, state_width = x.shape[2], x.shape[3], B.shape[3]
    # Elements by token of the largest tensors, given and in between: B and C by head, the states, C B^T.
    by_token = heads * max(width, state_width, -(-width * state_width // chunk_size), chunk_size)
    return in_pieces(_triton, by_token, chunk_size, x, dt, A, B, C, dt_bias, segment_ids, initial_state)


def fla_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state):
    """flash-linear-attention's ``chunk_simple_gla``; arguments and results are those of ``torch_ssd``."""
    by_token = x.shape[2] * max(x.shape[3], B.shape[3], -(-x.shape[3] * B.shape[3] // FLA_CHUNK))
    return in_pieces(_fla, by_token, FLA_CHUNK, x, dt, A, B, C, dt_bias, segment_ids, initial_state)


def in_pieces(scan, by_token, chunk_size, x, dt, A, B, C, dt_bias, segment_ids, initial_state):
    """Scan rows, and then pieces of a row, one after the other where all at once would be too large.

    Args:
        scan (Callable): Scans what it is given at once.
        by_token (int): Elements by token of the largest tensor that ``scan`` addresses.
        chunk_size (int): Tokens in a chunk of ``scan``.

    Returns:
        tuple[Tensor, Tensor]: y (B, L, H, P) and the final state (B, H, P, N) in fp32.
    """
    batch, length = x.shape[:2]
    chunks, most = -(-length // chunk_size), min(INT32_ELEMENTS // (by_token * chunk_size), GRID_CHUNKS)
    if batch * chunks <= most or (batch == 1 and chunks == 1):
        return scan(x, dt, A, B, C, dt_bias, chunk_size, segment_ids, initial_state)
    whole = (scan, by_token, chunk_size)
    if batch > 1:
        rows = max(1, min(batch - 1, most // chunks))
        parts = zip(*(_split(t, rows, 0) for t in (x, dt, B, C, segment_ids, initial_state)))
        done = [in_pieces(*whole, x, dt, A, B, C, dt_bias, ids, state) for x, dt, B, C, ids, state in parts]
        ys, states = zip(*done)
        return torch.cat(ys), torch.cat(states)
    ys, state, before = [], initial_state, None
    for x, dt, B, C, ids in zip(*(_split(t, max(1, most) * chunk_size, 1) for t in (x, dt, B, C, segment_ids))):
        if ids is not None:
            if before is not None:
                state = state * (ids[:, 0] == before)[:, None, None, None]
            before, ids = ids[:, -1], ids - ids[:, :1]
        y, state = in_pieces(*whole, x, dt, A, B, C, dt_bias, ids, state)
        ys.append(y)
    return torch.cat(ys, 1), state


def _triton(x, dt, A, B, C, dt_bias, chunk_size, segment_ids, initial_state):
    kernel = import_part("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # The kernel takes one group count for B and C.
    if B.shape[2] != C.shape[2]:
        B, C = (_repeat_groups(t, x.shape[2]) for t in (B, C))
    y, state = kernel(
        x.contiguous(),
        dt.contiguous(),
        A.float(),
        B.contiguous(),
        C.contiguous(),
        chunk_size,
        dt_bias=None if dt_bias is None else dt_bias.float(),
        dt_softplus=True,
        seq_idx=None if segment_ids is None else segment_ids.to(torch.int32).contiguous(),
        initial_states=initial_state,
        return_final_states=True,
    )
    return y, state.float()


def _fla(x, dt, A, B, C, dt_bias, chunk_size, segment_ids, initial_state):
    kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    batch, length, heads, _ = x.shape
    delta = time_steps(dt, dt_bias)
    log_decay = (delta * A.float()).clamp(STRONGEST_DECAY / LOG2_E, 0)
    sequences = [_repeat_groups(C, heads), _repeat_groups(B, heads), x * delta[..., None].to(x.dtype), log_decay]
    # fla keeps its states as (B, H, N, P).
    state = None if initial_state is None else initial_state.float().transpose(-1, -2)
    borders = last = None
    if segment_ids is not None:
        # All rows end to end, every segment a sequence with a state of its own.
        borders, first, last = flat_segments(segment_ids)
        chunks = batch * -(-length // chunk_size)
        if (len(borders) - 1) * heads * x.shape[3] * B.shape[3] > INT32_ELEMENTS and chunks > 1:
            by_token = INT32_ELEMENTS // (chunk_size * (chunks // 2))
            return in_pieces(_fla, by_token, chunk_size, x, dt, A, B, C, dt_bias, segment_ids, initial_state)
        sequences = [t.reshape(1, batch * length, *t.shape[2:]) for t in sequences]
        if state is not None:
            state = state.new_zeros(len(borders) - 1, *state.shape[1:]).index_copy(0, first, state)
    q, k, v, g = (t.contiguous() for t in sequences)
    state = None if state is None else state.contiguous()
    y, state = kernel(q, k, v, g=g, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=borders)
    state = state if last is None else state[last]
    return y.view(x.shape), state.transpose(-1, -2).float()


def _split(t, size, dim):
    """Iterable[Tensor | None]: Pieces along an axis."""
    if t is None:
        return iter(lambda: None, 0)
    return t.split(size, dim)


def _repeat_groups(t, heads):
    """Tensor: (B, L, G, N) as (B, L, H, N)."""
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2)
