"""Attention of one new token to keys and values in a buffer whose filled length only the device knows.

A CUDA graph replays the same launches for every length. The Triton kernel reads the length on the device and only
the filled keys; many programs share one head's keys and a second kernel joins their parts (Dao et al.,
"Flash-Decoding for long-context inference", 2023).

Axis letters: B batch, H query heads, G key/value heads, R = H/G query heads of a group, P head width, K room in keys.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "torch", "triton")

# Keys that a program of the Triton kernel reads at a time.
BLOCK = 64
# Programs that keep the largest GPUs busy, a few to a multiprocessor.
PROGRAMS = 512


def decode_attention(q, keys, values, last, *, scale, mask=None, backend="auto"):
    """Attend from one token to all keys up to and including its own.

    Args:
        q (Tensor): Queries, (B, H, P).
        keys (Tensor): (B, G, K, P) with G dividing H; what lies beyond ``last`` is not looked at.
        values (Tensor): (B, G, K, P).
        last (Tensor): Index of the token's own key, int64 (1,), on q's device.
        scale (float): Factor of the scores.
        mask (Tensor, optional): Boolean (B, K), False at keys that are padding.
        backend (str): ``auto``, ``torch`` or ``triton``.

    Returns:
        Tensor: (B, H, P).

    Raises:
        ValueError: For an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown decode_attention backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if q.is_cuda and _has_triton() else "torch"
    implementation = _triton_attention if backend == "triton" else _torch_attention
    return implementation(q, keys, values, last, scale, mask)


@functools.lru_cache(maxsize=None)
def _has_triton():
    return importlib.util.find_spec("triton") is not None


def _torch_attention(q, keys, values, last, scale, mask):
    """Readable twin: everything beyond the filled part is masked, but read."""
    visible = (torch.arange(keys.shape[2], device=q.device) <= last)[None]
    if mask is not None:
        visible = visible & mask
    # The heads of a group stand where a sequence would, so that keys need not be repeated.
    grouped = q.unflatten(1, (keys.shape[1], -1))
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None], scale=scale)
    return output.flatten(1, 2)


def _triton_attention(q, keys, values, last, scale, mask):
    from .decode_attention_triton import join_kernel, part_kernel

    batch, heads, width = q.shape
    groups = keys.shape[1]
    splits = 1
    while splits * 2 * batch * groups <= PROGRAMS and splits < 64:
        splits *= 2
    q = q.contiguous()
    # Of every split: the sum of weighted values, the largest score, the sum of weights.
    parts = torch.empty(batch * heads, splits, width, dtype=torch.float32, device=q.device)
    tops = torch.empty(batch * heads, splits, dtype=torch.float32, device=q.device)
    totals = torch.empty_like(tops)
    output = torch.empty_like(q)
    padded = max(16, 1 << (width - 1).bit_length())
    part_kernel[(batch * groups, splits)](
        q,
        keys,
        values,
        last,
        keys if mask is None else mask,
        parts,
        tops,
        totals,
        scale,
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if mask is None else mask.stride(0),
        GROUPS=groups,
        REPEATS=heads // groups,
        WIDTH=width,
        SPLITS=splits,
        # Matrix units multiply at least 16 rows.
        ROWS=max(16, 1 << (heads // groups - 1).bit_length()),
        PADDED=padded,
        BLOCK=BLOCK,
        MASKED=mask is not None,
        num_warps=4,
    )
    join_kernel[(batch * heads,)](parts, tops, totals, output, WIDTH=width, SPLITS=splits, PADDED=padded, num_warps=4)
    return output
