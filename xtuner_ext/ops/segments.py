"""Segments of packed rows: samples that lie behind one another in a row and must not mix."""

import torch.nn.functional as F


def number_segments(segment_ids):
    """Number the segments of every row 0, 1, 2, ..., so that an id that comes back joins nothing.

    Args:
        segment_ids (Tensor): Integers (B, L); a segment starts where they change.

    Returns:
        Tensor: (B, L), int64.
    """
    return segment_starts(segment_ids).cumsum(-1) - 1


def segment_starts(segment_ids):
    """Tensor: Boolean (B, L), True at the first token of every segment of ``segment_ids`` (B, L)."""
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return starts[:, : segment_ids.shape[1]]


def flat_segments(segment_ids):
    """Describe the segments of all rows laid end to end, as kernels for rows of different lengths want them.

    Args:
        segment_ids (Tensor): Numbered segments, (B, L).

    Returns:
        tuple[Tensor, Tensor, Tensor]: Where segments begin in the B L tokens and, last, where they end, (S + 1,) in
        int32; which of the S segments is the first and which the last of every row, (B,) each.
    """
    starts = segment_starts(segment_ids).flatten().nonzero().flatten()
    ends = F.pad(starts, (0, 1), value=segment_ids.numel()).int()
    last = (segment_ids[:, -1] + 1).cumsum(0) - 1
    return ends, last - segment_ids[:, -1], last
