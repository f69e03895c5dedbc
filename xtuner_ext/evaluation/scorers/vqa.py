"""VQAv2, TextVQA, OKVQA, VizWiz: an answer against those of ten people.

Text is compared as on the EvalAI server. An answer that k of n people gave scores the mean, over leaving out one
person each time, of min(1, its other givers / 3): for ten people 0, .3, .6, .9, 1. ``robust`` first takes the first
line without "The answer is", and with three people or fewer any of their answers is right.
"""

from .common import by_name, check, each, meta, percent, report
from .text import evalai, first_line

FEW = 3


def mark(rows, mode):
    """list[tuple]: The compared form of every row, and its share of agreement from 0 to 1."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    gold = row["gold"] or []
    people = [evalai(answer) for answer in ([gold] if isinstance(gold, str) else gold)]
    parsed = evalai(first_line(row["prediction"]) if mode == "robust" else row["prediction"])
    if mode == "robust" and len(people) <= FEW:
        return parsed, float(parsed in people)
    return parsed, agreement(parsed, people)


def agreement(answer, people):
    """float: Share from 0 to 1 of an answer, given those of people in the same form."""
    givers = people.count(answer)
    if not givers:
        return 0.0
    return sum(min(1, (givers - (other == answer)) / 3) for other in people) / len(people)


def score(rows, mode="robust", strict=False):
    """Score visual question answering.

    Args:
        rows (list[dict]): Result rows; gold is a list of people's answers, None in a test split; meta may hold
            ``question_type`` and ``answer_type``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`; without scores where there is no gold.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    if not any(row["gold"] for row in rows):
        return report(mode, rows, marks, None, {})
    values = [value for _, value in marks]
    by = {key: by_name(meta(rows, key), values) for key in ("answer_type", "question_type")}
    return report(mode, rows, marks, "accuracy", {"accuracy": percent(values)}, by)
