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
