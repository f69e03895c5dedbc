"""The endless sampler: passes, ranks, resuming."""

from itertools import islice

import pytest

from xtuner_ext.data import samplers
from xtuner_ext.data.samplers import ResumableInfiniteSampler

DATA = range(10)


def take(sampler, count):
    return list(islice(sampler, count))


def test_every_pass_is_another_permutation():
    order = take(ResumableInfiniteSampler(DATA, seed=0), 40)
    passes = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(DATA) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_order_follows_the_seed():
    orders = [take(ResumableInfiniteSampler(DATA, seed=seed), 20) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_it_counts():
    assert take(ResumableInfiniteSampler(DATA, shuffle=False, seed=0), 12) == [*DATA, 0, 1]


@pytest.mark.parametrize("taken", [0, 3, 10, 27])
def test_skipping_equals_continuing(taken):
    whole = take(ResumableInfiniteSampler(DATA, seed=5), taken + 15)
    resumed = ResumableInfiniteSampler(DATA, seed=5)
    resumed.skip(taken)
    assert take(resumed, 15) == whole[taken:]


@pytest.mark.parametrize("size", [10, 11])
def test_ranks_share_the_passes(monkeypatch, size):
    single = take(ResumableInfiniteSampler(range(size), seed=3), 4 * size)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(samplers, "get_dist_info", lambda rank=rank: (rank, 2))
        sampler = ResumableInfiniteSampler(range(size), seed=3)
        assert len(sampler) == (size + 1) // 2
        parts.append(take(sampler, 2 * size))
        resumed = ResumableInfiniteSampler(range(size), seed=3)
        resumed.skip(size)
        assert take(resumed, size) == parts[-1][size:]
    assert [index for pair in zip(*parts, strict=True) for index in pair] == single


def test_seed_is_agreed_when_absent():
    assert sorted(take(ResumableInfiniteSampler(DATA), 10)) == list(DATA)
