"""Measures on held-out samples while a student trains, by training token."""

import contextlib
import json
import time
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from xtuner.registry import BUILDER

from ..compat import replace_file
from ..data.collate import conversation_collate
from ..data.dataset import samples_config
from ..data.masking import next_token_rows
from ..errors import UserError

# Kept in checkpoints.
TOKENS_SEEN, SECONDS = "tokens_seen", "seconds_trained"


class HeldOutHook(Hook):
    """Compares student and teacher on held-out samples and appends the measures to ``held_out.jsonl``.

    Each line holds ``iter``, ``tokens`` (all that this stage has trained on, padding not counted), ``seconds`` of
    training without the measuring itself and without what an interruption lost, and the measures of
    :class:`~xtuner_ext.evaluation.fidelity.Tally`. The dataset is the training one with another meta file; samples are
    never packed here.

    Args:
        meta (str): Meta JSON of held-out samples.
        interval (int): Iterations between measurements; the first and the last are always made.
        limit (int): Samples, spread evenly over the data.
        batch_size (int): Samples per forward pass.

    Raises:
        UserError: For a number below 1.
    """

    # Before the checkpoint, which keeps the count of tokens.
    priority = "LOW"

    def __init__(self, meta, interval=50, limit=64, batch_size=8):
        for name, value in (("interval", interval), ("limit", limit), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"HeldOutHook.{name} is {value}, expected at least 1")
        self.meta, self.interval, self.limit, self.batch_size = meta, interval, limit, batch_size
        self.batches, self.started = None, 0.0

    def before_train(self, runner):
        """Load the samples; measure the start, unless this is a resumed run."""
        dataset = BUILDER.build({**samples_config(runner.cfg.train_dataloader.dataset), "meta": self.meta})
        count = min(self.limit, len(dataset))
        chosen = [index * len(dataset) // count for index in range(count)]
        self.batches = [
            conversation_collate([dataset[i] for i in chosen[start : start + self.batch_size]])["data"]
            for start in range(0, count, self.batch_size)
        ]
        self.path = Path(runner.work_dir) / "held_out.jsonl"
        self._forget_after(runner.iter)
        hub = runner.message_hub
        if runner.iter == 0:
            hub.update_info(TOKENS_SEEN, 0)
            hub.update_info(SECONDS, 0.0)
            self._measure(runner)
        self.started = time.monotonic() - hub.get_info(SECONDS, 0.0)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count tokens; measure at the interval and at the end."""
        done, hub = runner.iter + 1, runner.message_hub
        tokens = data_batch["data"]["attention_mask"].sum()
        all_reduce(tokens)
        hub.update_info(TOKENS_SEEN, hub.get_info(TOKENS_SEEN, 0) + int(tokens))
        hub.update_info(SECONDS, time.monotonic() - self.started)
        if done % self.interval == 0 or done == runner.max_iters:
            self._measure(runner, done)
            self.started = time.monotonic() - hub.get_info(SECONDS)

    @master_only
    def _forget_after(self, iteration):
        # Measured after the checkpoint that this run goes on from, or by an earlier run.
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A killed run may have left half a line.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if iteration and json.loads(line)["iter"] <= iteration]
            replace_file(self.path, "".join(kept).encode())

    @torch.no_grad()
    def _measure(self, runner, done=0):
        from ..evaluation.fidelity import Tally

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        # MMEngine's wrapper of DeepSpeed cannot be called itself.
        forward = runner.model if callable(runner.model) else runner.model.model
        training = model.training
        model.eval()
        total = Tally()
        # In all processes, as each may hold a part of the weights.
        for batch in self.batches:
            data = {key: value.to(model.llm.device) for key, value in batch.items()}
            with _precision(runner.optim_wrapper, model):
                total.add(forward(data, mode=_compare))
        model.train(training)
        if is_main_process():
            self._record(runner, done, total.measures())

    def _record(self, runner, done, measures):
        line = {
            "iter": done,
            "tokens": runner.message_hub.get_info(TOKENS_SEEN, 0),
            "seconds": round(runner.message_hub.get_info(SECONDS), 1),
            **{key: measures[key] for key in ("kl", "agreement", "perplexity", "teacher_perplexity")},
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        curves = {f"held_out/{key}": line[key] for key in ("kl", "agreement", "perplexity")}
        runner.visualizer.add_scalars(curves, step=done)
        print_log(
            f"held out after {line['tokens']:,} tokens: KL {line['kl']:.4f}, same first word {line['agreement']:.1%}, "
            f"perplexity {line['perplexity']:.2f} (teacher {line['teacher_perplexity']:.2f})",
            logger="current",
        )


def _compare(model, labels, **inputs):
    from ..evaluation.fidelity import tally_rows

    rows = next_token_rows(labels)
    student, teacher = model.final_states(**inputs)
    targets = labels.roll(-1, 1)[rows]
    return tally_rows(student[rows], model.llm.lm_head.weight, teacher[rows], model.teacher_head, targets)


def _precision(optim_wrapper, model):
    # DeepSpeed's wrapper has no such context: its engine makes it.
    context = getattr(optim_wrapper, "optim_context", None)
    return contextlib.nullcontext() if context is None else context(model)
