"""Intervals and tests of paired differences, against distributions known by hand."""

import math

import pytest

from xtuner_ext.evaluation.bootstrap import paired_bootstrap, sign_test


def test_the_interval_is_that_of_the_binomial_distribution():
    # A mean of 20 draws from ten ones and ten zeros: 2.5% of Binomial(20, 1/2) lie below 6, and above 14.
    assert paired_bootstrap([1] * 10 + [0] * 10, range(20)) == (0.3, 0.7)
    assert paired_bootstrap([1] * 10 + [0] * 10, range(20)) == paired_bootstrap([1] * 10 + [0] * 10, range(20))
    assert paired_bootstrap([0.5] * 7, range(7)) == (0.5, 0.5)


def test_questions_of_one_unit_are_drawn_together():
    # Two units of ten: all ones, all zeros, or half and half in every other draw.
    assert paired_bootstrap([1] * 10 + [0] * 10, ["a"] * 10 + [("b", 1)] * 10) == (0.0, 1.0)
    # One unit is always drawn.
    assert paired_bootstrap([1, 0, 0, 0], [0] * 4) == (0.25, 0.25)


def test_seeds_and_sizes_larger_than_a_chunk():
    values = [(number * 7919) % 3 - 1 for number in range(3000)]
    low, high = paired_bootstrap(values, range(3000))
    error = math.sqrt(sum(v * v for v in values) / 3000 / 3000)
    assert (low, high) == pytest.approx((-1.96 * error, 1.96 * error), abs=error / 5)
    few = [paired_bootstrap(values, range(3000), 50, seed) for seed in (0, 1)]
    assert few[0] != few[1]


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 8, 2 / 256), (8, 0, 2 / 256), (1, 3, 10 / 16), (0, 5000, 0.0)],
)
def test_sign_test(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)
