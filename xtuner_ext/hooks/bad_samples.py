"""Keeps the ledger of the samples that a run left out."""

import json
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process, master_only
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import print_log

from ..compat import replace_file
from ..data.ledger import Ledger, Skipped
from ..errors import UserError

# Kept in checkpoints.
LOOKED_AT, WRITTEN = "lines_looked_at", "bad_samples_written"
# Fewer say little about the share of bad ones.
FEWEST = 100


class BadSampleHook(Hook):
    """Writes every bad sample once to ``bad_samples.jsonl`` and stops the run above the dataset's ``max_bad_fraction``.

    Lines are ``{"dataset", "file", "line", "reason", "message"}``. What was skipped travels with the batch that it was
    skipped for, so batches that workers prepared and nobody trained on do not count, and the processes tell each other
    what they met: at every ``interval``, before every checkpoint and at the end. A resumed run goes on from the lines
    that there were at its checkpoint.

    The share of bad samples is that of the lines when the files were opened, and among the others that of the distinct
    ones looked at in training, once there are 100 or the run ends.

    Args:
        interval (int, optional): Iterations between looks, at which changed counts are logged; the logger's by default.

    Raises:
        UserError: For a number below 1.
    """

    # Before the checkpoint, which keeps what was looked at.
    priority = "LOW"

    def __init__(self, interval=None):
        if interval is not None and interval < 1:
            raise UserError(f"BadSampleHook.interval is {interval}, expected at least 1")
        self.interval, self.pending = interval, ([], [])

    def before_train(self, runner):
        """Note what was bad when the dataset was opened; on resume, also what was bad before."""
        packed = single = runner.train_dataloader.dataset
        while hasattr(single, "dataset"):
            single = single.dataset
        self.path = Path(runner.work_dir) / "bad_samples.jsonl"
        self.ledger = Ledger(getattr(single, "max_bad_fraction", None))
        counts = [len(annotations) for _, annotations in getattr(single, "sources", [])]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        kept = [self._kept(runner)]
        broadcast_object_list(kept)
        self.ledger.add(kept[0])
        at_opening = Ledger()
        at_opening.add(getattr(packed, "bad", []))
        self.opening_share = len(at_opening) / max(1, int(self.starts[-1]))
        self.opened = len(at_opening)
        self.seen = self._looked_at_before(runner)
        self.pending = [], list(at_opening.entries) if is_main_process() else []
        if self.interval is None:
            self.interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 10)
        self._exchange(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Note what was skipped for this batch."""
        facts = data_batch.get("data_samples") if isinstance(data_batch, dict) else None
        if isinstance(facts, dict):
            self.pending[0].extend(facts.get("looked_at", ()))
            self.pending[1].extend(facts.get("skipped", ()))
        if self.every_n_train_iters(runner, self.interval) or _saves(runner):
            self._exchange(runner)

    def after_train(self, runner):
        """Check and log the whole run."""
        self._exchange(runner)
        self._check(fewest=1)
        looked_at = int(self.seen.sum())
        summary = f": {self.ledger.summary()} ({self.path})" if len(self.ledger) else ""
        print_log(f"{len(self.ledger):,} bad samples, {looked_at:,} lines looked at{summary}", logger="current")

    def _exchange(self, runner):
        gathered = all_gather_object(self.pending)
        self.pending = [], []
        before = len(self.ledger)
        for looked_at, skipped in gathered:
            if looked_at:
                source, line = np.array(looked_at).T
                self.seen[self.starts[source] + line] = True
            self._write(self.ledger.add(Skipped(*entry) for entry in skipped))
        hub = runner.message_hub
        hub.update_info(WRITTEN, len(self.ledger))
        hub.update_info(LOOKED_AT, torch.from_numpy(np.packbits(self.seen)))
        if len(self.ledger) > before:
            print_log(f"{len(self.ledger):,} bad samples: {self.ledger.summary()}", logger="current")
        self._check()

    def _check(self, fewest=FEWEST):
        looked_at = int(self.seen.sum())
        if looked_at >= fewest:
            share = self.opening_share + (1 - self.opening_share) * (len(self.ledger) - self.opened) / looked_at
            self.ledger.check(share, f"{looked_at:,} samples")

    @master_only
    def _write(self, entries):
        if entries:
            text = "".join(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in entries)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)

    def _kept(self, runner):
        """list[Skipped]: Of an earlier run, what it knew at the checkpoint that this run goes on from."""
        if not is_main_process() or not self.path.is_file():
            return []
        count = runner.message_hub.get_info(WRITTEN, 0) if runner.iter else 0
        # What follows the last end of a line is half a line that a killed run left.
        lines = self.path.read_bytes().split(b"\n")[:-1][:count]
        replace_file(self.path, b"".join(line + b"\n" for line in lines))
        return [Skipped(**json.loads(line)) for line in lines]

    def _looked_at_before(self, runner):
        total = int(self.starts[-1])
        bits = runner.message_hub.get_info(LOOKED_AT) if runner.iter else None
        if bits is None or len(bits) != -(-total // 8):
            return np.zeros(total, dtype=bool)
        return np.unpackbits(np.asarray(bits), count=total).astype(bool)


def _saves(runner):
    """bool: Whether a checkpoint is written after this iteration."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    last = runner.iter + 1 == runner.max_iters
    return last or any(not hook.by_epoch and hook.every_n_train_iters(runner, hook.interval) for hook in hooks)
