"""Samples to a padded batch."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .masking import IGNORE_INDEX

# Samples of a row are numbered from 0.
PADDING_SEGMENT = -1


def conversation_collate(samples, pad_token_id=0):
    """Pad on the right and stack.

    Args:
        samples (list[dict]): ``input_ids`` (L,), ``labels`` (L,), ``pixel_values`` (T, 3, S, S), and
            ``segment_ids`` (L,) where samples are packed into rows; perhaps ``keys`` that name them.
        pad_token_id (int): Fills ``input_ids``; masked, so any id will do.

    Returns:
        dict: MMEngine's ``{"data": ..., "data_samples": ...}`` with ``input_ids``, ``labels`` and
        ``attention_mask`` (B, L) and the tiles of all samples, (T, 3, S, S); of packed rows also
        ``segment_ids`` (B, L), in which padding is a segment of its own. ``data_samples`` lists the samples' keys
        in reading order, None where they have none.
    """
    ids = [sample["input_ids"] for sample in samples]
    data = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }
    if "segment_ids" in samples[0]:
        segments = [sample["segment_ids"] for sample in samples]
        data["segment_ids"] = pad_sequence(segments, batch_first=True, padding_value=PADDING_SEGMENT)
    keys = [key for sample in samples for key in sample.get("keys", ())]
    return {"data": data, "data_samples": keys or None}
