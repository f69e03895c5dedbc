"""Batch arithmetic that is right or refused."""

import pytest
from mmengine.config import Config

from xtuner_ext.errors import UserError
from xtuner_ext.finetune.batch import accumulation, derived_options, process_count


@pytest.mark.parametrize("total, per_device, processes, expected", [(16, 4, 2, 2), (16, 4, 1, 4), (512, 4, 1, 128)])
def test_golden(total, per_device, processes, expected):
    assert accumulation(total, per_device, processes) == expected


@pytest.mark.parametrize("numbers", [(4, 4, 2), (16, 5, 1), (0, 4, 1), (16, 4, 0), (16, 2.0, 1)])
def test_what_does_not_divide_is_refused(numbers):
    with pytest.raises(UserError, match="do not divide|a whole number from 1 up"):
        accumulation(*numbers)


def config(**changes):
    values = dict(
        total_batch_size=16,
        save_steps=200,
        train_dataloader=dict(batch_size=4, sampler=dict(total_batch_size=1)),
        optim_wrapper=dict(accumulative_counts=None),
        default_hooks=dict(checkpoint=dict(interval=-1)),
    )
    return Config({**values, **changes})


def test_what_follows_from_the_total():
    assert derived_options(config(), 2) == {
        "optim_wrapper.accumulative_counts": 2,
        "train_dataloader.sampler.total_batch_size": 16,
        "default_hooks.checkpoint.interval": 400,
    }
    assert derived_options(config(total_batch_size=None), 2) == {}


def test_a_stated_accumulation_must_agree():
    stated = config(optim_wrapper=dict(accumulative_counts=4))
    assert derived_options(stated, 1)["optim_wrapper.accumulative_counts"] == 4
    with pytest.raises(UserError, match="accumulative_counts is 4, but total_batch_size=16 makes it 2"):
        derived_options(stated, 2)


def test_launchers_announce_their_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert [process_count(launcher) for launcher in ("none", "pytorch", "slurm")] == [1, 8, 16]
