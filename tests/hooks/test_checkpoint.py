"""Checkpoints of several processes."""

from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook

from xtuner_ext.errors import UserError
from xtuner_ext.hooks import checkpoint


@pytest.mark.parametrize("others", [[4, 4], [4, 0]], ids=["same", "different"])
def test_processes_that_found_different_checkpoints_do_not_go_on(monkeypatch, others):
    monkeypatch.setattr(CheckpointHook, "before_train", lambda self, runner: None)
    monkeypatch.setattr(checkpoint, "all_gather_object", lambda value: others)
    hook, runner = checkpoint.SafeCheckpointHook(interval=1), SimpleNamespace(iter=4, work_dir="w")
    if others[0] == others[1]:
        hook.before_train(runner)
        return
    with pytest.raises(UserError, match="different iterations, 0 and 4: w must be a folder that all machines see"):
        hook.before_train(runner)


def runner_of(count, resume=True, total=16):
    """Four samples a process: a total of 16 is four iterations in one process and two in two."""
    loop = SimpleNamespace(count=count)
    return SimpleNamespace(
        cfg=dict(total_batch_size=total), train_loop=loop, model=SimpleNamespace(), work_dir="w", _resume=resume
    )


def test_iterations_of_another_length_are_not_gone_on_with(tmp_path):
    saved = {}
    first = runner_of(2)
    first.message_hub = SimpleNamespace(update_info=lambda *_: None)
    first.save_checkpoint = lambda *_, meta, **__: saved.update(meta=meta)
    first.work_dir = tmp_path
    hook = checkpoint.SafeCheckpointHook(interval=1)
    hook.file_backend, hook.out_dir, hook.file_client_args = SimpleNamespace(join_path="{}/{}".format), "w", None
    hook._save_checkpoint_with_step(first, 3, {})
    hook.after_load_checkpoint(runner_of(2), saved)
    # Weights to begin with are another thing, and so is a config that does not count in totals.
    hook.after_load_checkpoint(runner_of(4, resume=False), saved)
    hook.after_load_checkpoint(runner_of(4, total=None), saved)
    with pytest.raises(UserError, match="of 16 samples in 2 iterations, this run of 16 in 4: go on with as many"):
        hook.after_load_checkpoint(runner_of(4), saved)
