"""The learning rate against a written-out one."""

import math

import pytest
import torch
from mmengine.optim import OptimWrapper

from xtuner_ext.errors import UserError
from xtuner_ext.finetune.schedule import WarmupCosineLR


def rates(iterations, count=1, **options):
    weight = torch.nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=1.0), accumulative_counts=count)
    scheduler = WarmupCosineLR(wrapper, by_epoch=False, end=iterations, **options)
    found = []
    for _ in range(iterations):
        found.append(wrapper.param_groups[0]["lr"])
        wrapper.step()
        scheduler.step()
    return found


def test_warm_up_then_cosine():
    found = rates(10, warmup_ratio=0.3, eta_min=0.1)
    expected = [0.25, 0.5, 0.75] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert found == pytest.approx(expected)


def test_it_counts_optimizer_steps():
    found = rates(12, count=3, warmup_ratio=0.25)
    assert found == pytest.approx([rate for rate in rates(4, warmup_ratio=0.25) for _ in range(3)])


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_short_runs_move(iterations):
    assert all(rate > 0 for rate in rates(iterations, warmup_ratio=0.03))


def test_a_ratio_outside_is_refused():
    with pytest.raises(UserError, match="warmup_ratio is 3"):
        rates(4, warmup_ratio=3)


def test_a_run_that_became_longer_goes_on_along_its_new_curve():
    def begin(iterations):
        wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
        return wrapper, WarmupCosineLR(wrapper, by_epoch=False, end=iterations, warmup_ratio=0.25)

    (wrapper, short), (longer, scheduler) = begin(4), begin(8)
    for _ in range(4):
        wrapper.step()
        short.step()
    assert wrapper.param_groups[0]["lr"] == 0
    scheduler.load_state_dict(short.state_dict())
    found = []
    for _ in range(4):
        found.append(longer.param_groups[0]["lr"])
        longer.step()
        scheduler.step()
    assert found == pytest.approx(rates(8, warmup_ratio=0.25)[4:])
