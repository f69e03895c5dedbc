"""Checkpoints whose last good one is never at risk."""

import os.path as osp

from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import put_text
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper

from ..errors import UserError


class SafeCheckpointHook(CheckpointHook):
    """MMEngine's hook with the order turned round: write, move the pointer, only then delete.

    Files appear under their final name when they are complete (``compat.write_files_atomically``).

    What the model says of itself (``describe()``) is kept as ``meta["distill"]``, where the next stage
    looks before it loads. ``meta["step"]`` is what an optimizer step consisted of, which iterations are counted by.

    Arguments are those of :class:`mmengine.hooks.CheckpointHook`.
    """

    def before_train(self, runner):
        """Refuse to go on where processes of several machines found different checkpoints."""
        super().before_train(runner)
        if len(found := sorted(set(all_gather_object(runner.iter)))) > 1:
            raise UserError(
                f"the processes would go on from different iterations, {found[0]} and {found[-1]}: "
                f"{runner.work_dir} must be a folder that all machines see"
            )

    def after_load_checkpoint(self, runner, checkpoint):
        """Refuse to go on from another configuration's checkpoint, which MMEngine would load in part."""
        found = checkpoint.get("meta", {}).get("distill")
        ours = describe(runner.model)
        if found and ours:
            different = [key for key in ours if found.get(key) != ours[key]]
            if different:
                raise UserError(
                    f"the checkpoint in {runner.work_dir} was made with another {different[0]}: found "
                    f"{found.get(different[0])}, expected {ours[different[0]]}; choose another --work-dir"
                )
        was, now = checkpoint.get("meta", {}).get("step"), _step(runner)
        if runner._resume and was and now and was != now:
            raise UserError(
                f"the checkpoint in {runner.work_dir} has optimizer steps of {was[0]} samples in {was[1]} iterations, "
                f"this run of {now[0]} in {now[1]}: go on with as many processes and the same batch sizes, or choose "
                "another --work-dir"
            )

    def _save_checkpoint_with_step(self, runner, step, meta):
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        surplus = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            while len(self.keep_ckpt_ids) >= self.max_keep_ckpts:
                surplus.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta={**meta, "distill": describe(runner.model), "step": _step(runner)},
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        put_text(self.last_ckpt, osp.join(runner.work_dir, "last_checkpoint"))
        for old in surplus:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                # DeepSpeed's checkpoints are folders.
                self.file_backend.rmtree(path)


def _step(runner):
    # Only where a config states the total do iterations follow from the number of processes.
    total = runner.cfg.get("total_batch_size")
    return None if total is None else [total, getattr(runner.train_loop, "count", None)]


def describe(model):
    """dict: What a model says of itself, empty for one that says nothing."""
    model = model.module if is_model_wrapper(model) else model
    return getattr(model, "describe", dict)()
