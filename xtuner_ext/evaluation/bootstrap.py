"""How sure a difference between two models is that answered the same questions."""

import numpy as np

CHUNK = 2**22  # drawn numbers held at a time


def paired_bootstrap(differences, units, resamples=10_000, seed=0):
    """Percentile interval of a mean difference, with whole units drawn anew.

    Args:
        differences (list[float]): One a question.
        units (list): What each question belongs to; questions of one unit are drawn together.
        resamples (int): How often to draw.
        seed (int): Of the draws.

    Returns:
        tuple[float, float]: The middle 95% of the resampled means lie between these.
    """
    _, index = np.unique([repr(unit) for unit in units], return_inverse=True)
    sums, counts = np.bincount(index, weights=differences), np.bincount(index)
    draw, size, means = np.random.default_rng(seed), len(sums), []
    rows = max(1, CHUNK // size)
    for start in range(0, resamples, rows):
        chosen = draw.integers(size, size=(min(rows, resamples - start), size))
        means.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def sign_test(better, worse):
    """Exact two-sided McNemar test: how likely so uneven a change is where both directions are.

    Args:
        better (int): Questions that changed for the better.
        worse (int): Questions that changed for the worse.

    Returns:
        float: 1 when nothing changed.
    """
    total, term, tail = better + worse, 1, 0
    for number in range(min(better, worse) + 1):
        tail += term
        term = term * (total - number) // (number + 1)
    return min(1.0, 2 * tail / 2**total)
