"""POPE: is there such an object; accuracy, precision, recall and F1 of "yes", by category.

``reference`` is the rule of POPE, InternVL and LLaVA: no where the first sentence has one of the words No, not, no,
yes in every other case. ``robust`` wants a yes or a no; an answer that says neither is wrong, and no yes.
"""

from .common import check, each, report
from .text import yes_or_no

NEGATIONS = {"No", "not", "no"}


def mark(rows, mode):
    """list[tuple]: Yes or no of every row, and whether it is right."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    parsed = first_sentence(row["prediction"]) if mode == "reference" else yes_or_no(row["prediction"])
    return parsed, parsed == ("no" if row["gold"] == "no" else "yes")


def first_sentence(text):
    """str: ``no`` or ``yes`` by the official rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NEGATIONS.intersection(words) else "yes"


def score(rows, mode="robust", strict=False):
    """Score POPE.

    Args:
        rows (list[dict]): Result rows with gold ``yes`` or ``no`` and a ``category``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`. ``macro_f1`` is the mean over categories (InternVL's "Overall F1"), ``f1`` that of
        all rows together (VLMEvalKit's and lmms-eval's). Where the official program divides by zero stands 0.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    groups = {}
    for row, marked in zip(rows, marks):
        groups.setdefault(row["category"], []).append((row["gold"], *marked))
    by = {name: _measures(group) for name, group in groups.items()}
    pooled = _measures([(row["gold"], *marked) for row, marked in zip(rows, marks)])
    pooled.pop("count")
    scores = {"macro_f1": sum(part["f1"] for part in by.values()) / len(by), **pooled}
    return report(mode, rows, marks, "macro_f1", scores, {"category": by})


def _measures(group):
    true_yes = sum(gold != "no" and said == "yes" for gold, said, _ in group)
    said_yes = sum(said == "yes" for _, said, _ in group)
    gold_yes = sum(gold != "no" for gold, _, _ in group)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / gold_yes if gold_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true_yes else 0.0
    accuracy = sum(correct for _, _, correct in group) / len(group)
    shares = {"f1": f1, "accuracy": accuracy, "precision": precision, "recall": recall}
    return {**{k: v * 100 for k, v in shares.items()}, "yes_ratio": said_yes / len(group) * 100, "count": len(group)}
