"""Rows of whole samples, so that a batch is not mostly padding."""

import logging

import numpy as np
import torch
from mmengine.logging import print_log
from torch.utils.data import Dataset

from ..errors import BadSample, UserError
from .ledger import Ledger
from .lengths import UNKNOWN, sample_lengths
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
            ``max_length``, is skipped and named in the log. So is a bad one where the dataset leaves such out; one that
            turns out to be bad when its row is read leaves a gap.
        seed (int): Decides which samples of one length go together, and the order of the rows.
        cache_dir (str, optional): Folder that keeps the counted lengths, see
            :func:`~xtuner_ext.data.lengths.sample_lengths`.

    Raises:
        UserError: For a row length below 1, no sample that fits, or samples that cannot be read, where the dataset
            allows none or fewer of them.

    Attributes:
        lengths (ndarray): Tokens of every sample of ``dataset``.
        skipped (int): Samples that are in no row.
        bad (list[Skipped]): Lines that are in no row because they were bad before.
        mixture (tuple | None): See :attr:`~xtuner_ext.data.dataset.ConversationDataset.mixture`; of rows, which are of
            one source each if there is one.
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
        fits = (self.lengths <= longest) & (self.lengths != UNKNOWN)
        self.bad = self._name_skipped(np.flatnonzero(~fits), longest)
        kept = np.flatnonzero(fits)
        self.skipped = len(self.lengths) - len(kept)
        if not len(kept):
            raise UserError(f"PackedDataset: every sample is longer than {longest} tokens")
        generator = np.random.default_rng(seed)
        kept = generator.permutation(kept)
        if dataset.mixture is None:
            rows = first_fit_decreasing(self.lengths[kept], row_length)
        else:
            rows = self._rows_by_source(kept)
        rows = generator.permutation(rows.max() + 1)[rows]
        order = np.argsort(rows, kind="stable")
        self._samples = kept[order]
        self._ends = np.bincount(rows).cumsum()
        self.mixture = None if dataset.mixture is None else self._mixture()
        print_log(
            f"{len(kept):,} samples packed into {len(self):,} rows of {row_length} tokens, {self.fill:.1%} filled, "
            f"{self.skipped:,} longer samples skipped",
            logger="current",
        )

    def _rows_by_source(self, kept):
        sources, rows, used = self.dataset.index[kept, 0], np.empty(len(kept), dtype=np.int64), 0
        for source in np.unique(sources):
            mine = sources == source
            rows[mine] = used + first_fit_decreasing(self.lengths[kept[mine]], self.row_length)
            used = rows[mine].max() + 1
        return rows

    def _mixture(self):
        sources = self.dataset.index[self._samples[self._ends - 1], 0]
        groups = [np.flatnonzero(sources == source) for source in np.unique(sources)]
        counts = np.bincount(self.dataset.index[self._samples, 0])
        # A row is drawn for all of its samples at once.
        weights = [len(group) / np.sqrt(counts[source]) for source, group in zip(np.unique(sources), groups)]
        return groups, np.array(weights)

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
        skipped, looked_at = [], []
        for step in range(len(self)):
            samples = []
            for index in self.samples((row + step) % len(self)):
                sample, bad = self._sample(int(index))
                looked_at.append(tuple(self.dataset.index[index].tolist()))
                if sample is None:
                    skipped.append(bad)
                else:
                    samples.append(sample)
            if samples:
                break
        else:
            raise UserError(f"PackedDataset: every sample is bad; the first is {skipped[0].message}")
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
            "looked_at": looked_at,
            "skipped": skipped,
        }

    def _sample(self, index):
        sample, bad = self.dataset.attempt(index)
        if bad is not None and bad.reason != "too_long":
            return None, bad
        if sample is None or len(sample["input_ids"]) != self.lengths[index]:
            found = "more" if sample is None else len(sample["input_ids"])
            hint = f", clear {self.cache_dir}" if self.cache_dir is not None else ""
            raise UserError(
                f"{self.dataset.record(index).where}: {self.lengths[index]} tokens were counted, but now there are "
                f"{found}; an image has changed since{hint}"
            )
        return sample, None

    def _name_skipped(self, indices, longest):
        dataset, ledger = self.dataset, Ledger(self.dataset.max_bad_fraction)
        ledger.add(dataset.bad)
        before = len(ledger)
        lines, first = np.unique(dataset.index[indices], axis=0, return_index=True)
        for (source, line), index in zip(lines.tolist(), indices[first]):
            try:
                # Counted once more only if it is bad, to say why.
                length = self.lengths[index] if self.lengths[index] != UNKNOWN else dataset.count_tokens(source, line)
                where = dataset.record(index).where
                raise BadSample(f"{where}: {length} tokens, more than the {longest} that a row takes", "too_long")
            except BadSample as error:
                ledger.add([dataset.skipped(source, line, error)])
                if dataset.max_bad_fraction is None:
                    print_log(f"{error}: skipped", logger="current", level=logging.WARNING)
        if len(ledger) > before:
            print_log(f"lines are left out: {ledger.summary()}", logger="current", level=logging.WARNING)
        ledger.check(len(ledger) / dataset.line_count, f"{dataset.line_count:,} lines")
        return ledger.entries


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
