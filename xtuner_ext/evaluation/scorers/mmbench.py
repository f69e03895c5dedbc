"""MMBench and CCBench: multiple choice, every question also with its options rotated.

A question counts as right in the circular accuracy when all its forms are; the forms have its index plus multiples of
a million. ``reference`` finds letters as VLMEvalKit does without a judge; ``robust`` as :func:`strict_letter`. XTuner's
own mmbench reads letters by another rule, whose scores stand beside the reference ones under its name.
"""

from . import letters
from .common import by_name, check, each, percent, report

CIRCLE = 1_000_000
XTUNER = "XTuner's letters"


def mark(rows, mode):
    """list[tuple]: The letter of every row, and whether it is right."""
    find = letters.vlmevalkit if mode == "reference" else letters.strict_letter
    return each(rows, lambda row: _mark(row, find))


def _mark(row, find):
    parsed = find(row["prediction"], row["meta"]["options"])
    return parsed, row["gold"] is not None and parsed == row["gold"]


def score(rows, mode="robust", strict=False):
    """Score MMBench or CCBench.

    Args:
        rows (list[dict]): Result rows; gold is a letter, meta holds ``index``, ``options`` and perhaps
            ``l2-category`` and ``split``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`; ``circular`` over questions, ``vanilla`` of their first forms. Where no row has a
        gold letter, as in a test split, there are no scores.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    if all(row["gold"] is None for row in rows):
        return report(mode, rows, marks, None, {})
    scores, first, hits = _accuracies(rows, [correct for _, correct in marks])
    if mode == "reference":
        found = each(rows, lambda row: _mark(row, lambda text, _: letters.xtuner(text)))
        named, _, _ = _accuracies(rows, [correct for _, correct in found])
        scores |= {f"{name} ({XTUNER})": value for name, value in named.items()}
    by = {"category": by_name([row["category"] for row in first], hits)}
    for key in ("l2-category", "split"):
        by[key] = by_name([row["meta"].get(key) for row in first], hits)
    return report(mode, rows, marks, "circular", scores, by, questions=len(first))


def _accuracies(rows, right):
    """tuple: Scores, the first forms, and whether all forms of each are right."""
    forms = {}
    for row, correct in zip(rows, right):
        forms.setdefault(row["meta"]["index"] % CIRCLE, []).append(correct)
    first = [(row, correct) for row, correct in zip(rows, right) if row["meta"]["index"] < CIRCLE]
    hits = [all(forms[row["meta"]["index"]]) for row, _ in first]
    return {"circular": percent(hits), "vanilla": percent(c for _, c in first)}, [row for row, _ in first], hits
