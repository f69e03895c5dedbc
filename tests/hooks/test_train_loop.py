"""Iterations of the training loop, counted in optimizer steps."""

from types import SimpleNamespace

import pytest
from mmengine.config import Config
from torch.utils.data import DataLoader

from xtuner_ext.errors import UserError
from xtuner_ext.hooks import ResumableTrainLoop


def loop(samples=12, batch_size=4, count=1, total=None, deepspeed=False, **length):
    config = Config(dict(optim_wrapper=dict(accumulative_counts=None if deepspeed else count), total_batch_size=total))
    if deepspeed:
        config.strategy = dict(gradient_accumulation_steps=count)
    runner = SimpleNamespace(cfg=config)
    return ResumableTrainLoop(runner, DataLoader(range(samples), batch_size=batch_size), **length)


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize(
    "samples, count, epochs, expected", [(12, 1, 1, 3), (12, 4, 1, 4), (13, 2, 1, 4), (12, 3, 2, 6), (12, 2, 0.5, 2)]
)
def test_epochs_are_whole_optimizer_steps(samples, count, epochs, expected, deepspeed):
    assert loop(samples, count=count, max_epochs=epochs, deepspeed=deepspeed).max_iters == expected


def test_iterations_are_taken_as_they_are():
    assert loop(count=4, max_iters=7).max_iters == 7


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_stated_total_batch_must_be_what_runs(deepspeed):
    assert loop(count=4, total=16, max_iters=4, deepspeed=deepspeed).max_iters == 4
    with pytest.raises(UserError, match="total_batch_size=16 needs 4 iterations of 4 samples x 1 processes"):
        loop(count=2, total=16, max_iters=4, deepspeed=deepspeed)
    with pytest.raises(UserError, match="do not divide"):
        loop(batch_size=5, count=2, total=16, max_iters=4, deepspeed=deepspeed)
