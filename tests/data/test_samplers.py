"""The endless samplers: passes, ranks, resuming."""

import json
from itertools import islice

import numpy as np
import pytest

from xtuner_ext.data import samplers
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.lengths import sample_lengths
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.data.samplers import LengthGroupedSampler, ResumableInfiniteSampler
from xtuner_ext.errors import UserError

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


@pytest.fixture
def texts(tmp_path, digits_processor):
    """47 plain texts of many lengths, in no order."""
    words = np.random.default_rng(0).permutation(47) + 1
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": "7 " * int(count)}) for count in words))
    (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    return ConversationDataset(tmp_path / "d.json", digits_processor, "internlm2_chat")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_of_like_lengths_hold_every_sample_once_a_pass(texts, world, monkeypatch):
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(samplers, "get_dist_info", lambda: (rank, world))
        ranks.append(take(LengthGroupedSampler(texts, batch_size=4, batches=2, seed=0), 4 * 47))
    together = [index for turn in zip(*ranks) for index in turn]
    for start in range(0, len(together) - 46, 47):
        assert sorted(together[start : start + 47]) == list(range(47))
    lengths = sample_lengths(texts)
    spreads = [np.ptp(lengths[together[i : i + 4 * world]]) for i in range(0, len(together), 4 * world)]
    plain = take(ResumableInfiniteSampler(texts, seed=0), len(together))
    mixed = [np.ptp(lengths[plain[i : i + 4 * world]]) for i in range(0, len(together), 4 * world)]
    # Two batches are sorted into halves; only the batch between two passes stays mixed.
    assert np.median(spreads) < 0.75 * np.median(mixed)


def test_more_batches_make_batches_more_alike(texts):
    lengths = sample_lengths(texts)

    def spread(batches):
        order = take(LengthGroupedSampler(texts, batch_size=4, batches=batches, seed=0), 44)
        return np.mean([np.ptp(lengths[order[i : i + 4]]) for i in range(0, 44, 4)])

    assert spread(1) > 2 * spread(3) > 2 * spread(11)


@pytest.mark.parametrize("skipped", [1, 4, 46, 47, 95])
def test_grouped_order_resumes_at_any_place(texts, skipped):
    order = take(LengthGroupedSampler(texts, batch_size=4, seed=3), 150)
    resumed = LengthGroupedSampler(texts, batch_size=4, seed=3)
    resumed.skip(skipped)
    assert take(resumed, 150 - skipped) == order[skipped:]
    assert order[:47] != order[47:94]


def test_long_and_short_batches_take_turns(texts):
    lengths = sample_lengths(texts)
    order = take(LengthGroupedSampler(texts, batch_size=4, seed=0), 44)
    means = [lengths[order[i : i + 4]].mean() for i in range(0, 44, 4)]
    assert means != sorted(means)


def test_fewer_samples_than_a_batch_still_make_passes(texts):
    order = take(LengthGroupedSampler(texts, batch_size=100, seed=0), 94)
    assert sorted(order[:47]) == sorted(order[47:]) == list(range(47))


@pytest.mark.parametrize("option", ["batch_size", "batches"])
def test_grouping_by_nothing_is_named(texts, option):
    with pytest.raises(UserError, match=f"LengthGroupedSampler.{option} is 0, expected at least 1"):
        LengthGroupedSampler(texts, **{"batch_size": 4, option: 0})


class Mixed:
    """Samples 0 to 9 of a small dataset, 10 to 89 and 90 to 999 of larger ones, to be drawn 1 : 2 : 3."""

    mixture = ([np.arange(10), np.arange(10, 90), np.arange(90, 1000)], np.array([1.0, 2.0, 3.0]))

    def __len__(self):
        return 1000


def test_datasets_are_drawn_by_their_weights_and_used_up_before_they_begin_again():
    order = np.array(take(ResumableInfiniteSampler(Mixed(), seed=0), 30_000))
    for group, weight in zip(*Mixed.mixture):
        drawn = order[np.isin(order, group)]
        share = weight / 6
        # Within four standard deviations of the draws.
        assert abs(len(drawn) / 30_000 - share) < 4 * np.sqrt(share * (1 - share) / 30_000)
        counts = np.bincount(drawn, minlength=1000)[group]
        # Passes are shuffled on their own, so one may have begun a run through a group that the next goes on with.
        assert counts.max() - counts.min() <= 1
    # Mixed evenly, not one dataset after another.
    assert np.ptp([(order[start : start + 1000] < 10).mean() for start in range(0, 30_000, 1000)]) < 0.1


@pytest.mark.parametrize("taken", [0, 7, 999, 1000, 3456])
def test_a_mixture_resumes_at_any_place(taken):
    whole = take(ResumableInfiniteSampler(Mixed(), seed=2), taken + 1500)
    resumed = ResumableInfiniteSampler(Mixed(), seed=2)
    resumed.skip(taken)
    assert take(resumed, 1500) == whole[taken:]
    assert whole != take(ResumableInfiniteSampler(Mixed(), seed=3), taken + 1500)


def test_ranks_share_a_mixture(monkeypatch):
    single, parts = take(ResumableInfiniteSampler(Mixed(), seed=1), 3000), []
    for rank in range(3):
        monkeypatch.setattr(samplers, "get_dist_info", lambda rank=rank: (rank, 3))
        parts.append(take(ResumableInfiniteSampler(Mixed(), seed=1), 1000))
    assert [index for turn in zip(*parts, strict=True) for index in turn] == single


def test_a_mixture_in_order_is_refused():
    with pytest.raises(UserError, match="shuffle=False does not allow"):
        ResumableInfiniteSampler(Mixed(), shuffle=False)


@pytest.fixture
def unequal(tmp_path, digits_processor):
    """Function that opens 8 and 128 texts, mixed by square roots, 1 : 4."""
    for name, count in (("few", 8), ("many", 128)):
        lines = [json.dumps({"text": "7 " * (1 + n % 9)}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    meta = {name: {"annotation": f"{name}.jsonl"} for name in ("few", "many")}
    (tmp_path / "d.json").write_text(json.dumps(meta))
    return lambda mixing="sqrt": ConversationDataset(
        tmp_path / "d.json", digits_processor, "internlm2_chat", mixing=mixing
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_square_roots_of_lengths_weigh_datasets(unequal, grouped):
    dataset = unequal()
    sampler = LengthGroupedSampler(dataset, 4, seed=0) if grouped else ResumableInfiniteSampler(dataset, seed=0)
    order = np.array(take(sampler, 20 * 136))
    assert abs((order < 8).mean() - 0.2) < 0.03
    assert unequal("repeat").mixture is None


def test_rows_are_of_one_dataset_and_drawn_for_all_their_samples(unequal):
    packed = PackedDataset(unequal(), 40)
    rows = [packed.samples(row) for row in range(len(packed))]
    assert sorted(np.concatenate(rows)) == list(range(136))
    assert all(len(set(row < 8)) == 1 for row in rows)
    drawn = np.concatenate([rows[row] for row in take(ResumableInfiniteSampler(packed, seed=0), 3000)])
    assert abs((drawn < 8).mean() - 0.2) < 0.03


def test_another_mixing_is_named(unequal):
    with pytest.raises(UserError, match="mixing is 'log', expected one of repeat, sqrt"):
        unequal("log")
