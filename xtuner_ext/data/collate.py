"""Samples to a padded batch."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .masking import IGNORE_INDEX

# What goes along with samples, for those who ask which they are.
FACTS = ("keys", "looked_at", "skipped")
# Samples of a row are numbered from 0.
PADDING_SEGMENT = -1


def conversation_collate(samples, pad_token_id=0):
    """Pad on the right and stack.

    Args:
        samples (list[dict]): ``input_ids`` (L,), ``labels`` (L,), ``pixel_values`` (T, 3, S, S), and
            ``segment_ids`` (L,) where samples are packed into rows; perhaps ``keys`` that name them, and the lines
            that were ``looked_at`` and ``skipped`` on the way to them.
        pad_token_id (int): Fills ``input_ids``; masked, so any id will do.

    Returns:
        dict: MMEngine's ``{"data": ..., "data_samples": ...}`` with ``input_ids``, ``labels`` and
        ``attention_mask`` (B, L) and the tiles of all samples, (T, 3, S, S); of packed rows also
        ``segment_ids`` (B, L), in which padding is a segment of its own. ``data_samples`` has the lists ``keys``,
        ``looked_at`` and ``skipped`` in reading order, and is None where samples have none of them.
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
    found = {name: [one for sample in samples for one in sample.get(name, ())] for name in FACTS}
    return {"data": data, "data_samples": found if any(found.values()) else None}
