"""Rows of whole samples, so that a batch is not mostly padding."""

import logging

import numpy as np
import torch
from mmengine.logging import print_log
from torch.utils.data import Dataset

from ..errors import UserError
from .lengths import sample_lengths
from .masking import IGNORE_INDEX


class PackedDataset(Dataset):
    """Rows of up to ``row_length`` tokens, each of whole samples that do not see each other.

    Samples are placed by first-fit-decreasing on their true lengths, once; the rows are the same for every pass
    and every process, and the sampler shuffles them. A config wraps its dataset::

        train_dataloader = dict(
            batch_size=2,  # rows a process
            num_workers=4,
            dataset=dict(
                type=PackedDataset,
                dataset=dict(type=ConversationDataset, meta=..., processor=..., template=..., max_length=2048),
                row_length=2048,  # tokens
                cache_dir="work_dirs/lengths",
            ),
            sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
            collate_fn=dict(type=conversation_collate),
        )

    Losses are averaged over the tokens of the whole batch, as those of padded batches are: a sample weighs as much as
    it has tokens that count, whichever row it lies in. Only ``reduction="batchmean"`` divides by samples, and it counts
    the samples of a row, not the rows.

    Attention over packed rows needs ``attn_implementation`` "sdpa" or "eager".

    Args:
        dataset (ConversationDataset | dict): Samples, or the config that builds them.
        row_length (int): Most tokens of a row. A longer sample, like one longer than the dataset's own
            ``max_length``, is skipped and named in the log.
        seed (int): Decides which samples of one length go together, and the order of the rows.
        cache_dir (str, optional): Folder that keeps the counted lengths, see
            :func:`~xtuner_ext.data.lengths.sample_lengths`.

    Raises:
        UserError: For a row length below 1, no sample that fits, or samples that cannot be read.

    Attributes:
        lengths (ndarray): Tokens of every sample of ``dataset``.
        skipped (int): Samples that are in no row.
    """

    def __init__(self, dataset, row_length, seed=0, cache_dir=None):
        if row_length < 1:
            raise UserError(f"PackedDataset.row_length is {row_length}, expected at least 1 token")
        if isinstance(dataset, dict):
            from xtuner.registry import BUILDER

            dataset = BUILDER.build(dataset)
        self.dataset, self.row_length, self.cache_dir = dataset, row_length, cache_dir
        self.lengths = sample_lengths(dataset, cache_dir)
        longest = min(row_length, dataset.max_length)
        self._name_skipped(longest)
        kept = np.flatnonzero(self.lengths <= longest)
        self.skipped = len(self.lengths) - len(kept)
        if not len(kept):
            raise UserError(f"PackedDataset: every sample is longer than {longest} tokens")
        generator = np.random.default_rng(seed)
        kept = generator.permutation(kept)
        rows = first_fit_decreasing(self.lengths[kept], row_length)
        rows = generator.permutation(rows.max() + 1)[rows]
        self._samples = kept[np.argsort(rows, kind="stable")]
        self._ends = np.bincount(rows).cumsum()
        print_log(
            f"{len(kept):,} samples packed into {len(self):,} rows of {row_length} tokens, {self.fill:.1%} filled, "
            f"{self.skipped:,} longer samples skipped",
            logger="current",
        )

    def __len__(self):
        return len(self._ends)

    @property
    def fill(self):
        """float: Share of the rows' room that samples take."""
        return float(self.lengths[self._samples].sum() / (len(self) * self.row_length))

    def samples(self, row):
        """ndarray: Indices into ``dataset`` of a row's samples."""
        return self._samples[self._ends[row - 1] if row else 0 : self._ends[row]]

    def __getitem__(self, row):
        samples = [self._sample(int(index)) for index in self.samples(row)]
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        labels = torch.cat([sample["labels"] for sample in samples])
        # The token before it belongs to another sample.
        labels[lengths.cumsum(0) - lengths] = IGNORE_INDEX
        return {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
            "labels": labels,
            "segment_ids": torch.arange(len(samples)).repeat_interleave(lengths),
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "keys": [key for sample in samples for key in sample["keys"]],
        }

    def _sample(self, index):
        sample = self.dataset.encode(index)
        if sample is None or len(sample["input_ids"]) != self.lengths[index]:
            found = "more" if sample is None else len(sample["input_ids"])
            hint = f", clear {self.cache_dir}" if self.cache_dir is not None else ""
            raise UserError(
                f"{self.dataset.record(index).where}: {self.lengths[index]} tokens were counted, but now there are "
                f"{found}; an image has changed since{hint}"
            )
        return sample

    def _name_skipped(self, longest):
        named = set()
        for index in np.flatnonzero(self.lengths > longest):
            where = self.dataset.record(index).where
            if where not in named:
                message = f"{where}: {self.lengths[index]} tokens, more than the {longest} that a row takes: skipped"
                print_log(message, logger="current", level=logging.WARNING)
            named.add(where)


def first_fit_decreasing(lengths, row_length):
    """Place samples, the longest first, each into the first row that has room.

    Samples of one length are placed together: each distinct length looks once at every row, which adds up to
    no more than the rows' room in tokens.

    Args:
        lengths (ndarray): Tokens of every sample, (N,), from 1 to ``row_length``.
        row_length (int): Tokens that a row holds.

    Returns:
        ndarray: Row of every sample, (N,), numbered from 0 without gaps.
    """
    by_length = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[by_length], return_index=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    free, used = np.full(len(lengths), row_length, dtype=np.int64), 0
    for length, group in zip(-distinct, np.split(by_length, starts[1:])):
        # 1. Fill what earlier, longer samples left, row by row.
        fitting = np.flatnonzero(free[:used] >= length)
        room = free[fitting] // length
        enough = np.searchsorted(room.cumsum(), len(group)) + 1
        placed = np.repeat(fitting[:enough], room[:enough])[: len(group)]
        # 2. Open rows for the rest.
        rest = np.arange(len(group) - len(placed)) // (row_length // length)
        rows[group] = placed = np.concatenate([placed, used + rest])
        np.subtract.at(free, placed, length)
        used = max(used, int(placed.max()) + 1)
    return rows
