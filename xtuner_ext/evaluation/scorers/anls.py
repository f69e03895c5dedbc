"""DocVQA and InfographicVQA: average normalised Levenshtein similarity, 0 below a half.

``reference`` is the challenge's own program, which takes lengths before outer and double blanks are dropped;
``robust`` takes them after, of the first line without "The answer is".
"""

from .common import by_name, check, each, meta, percent, report
from .text import first_line

THRESHOLD = 0.5


def mark(rows, mode):
    """list[tuple]: The compared form of every row, and its similarity to the nearest gold answer."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    text = first_line(row["prediction"]) if mode == "robust" else row["prediction"]
    gold = [row["gold"]] if isinstance(row["gold"], str) else row["gold"] or []
    likeness = max((similarity(text, answer, mode) for answer in gold), default=0.0)
    return _plain(text), likeness if likeness >= THRESHOLD else 0.0


def similarity(one, other, mode):
    """float: 1 less the edits by the longer length."""
    short, long = sorted((_plain(one), _plain(other)), key=len)
    # Letters such as ß grow in capitals, which the program takes the length of.
    length = len(long) if mode == "robust" else max(len(one.upper()), len(other.upper()))
    return 1 - (edits(short, long) / length if length else 0.0)


def _plain(text):
    return " ".join(text.strip().lower().split())


def edits(one, other):
    """int: Characters to insert, delete or replace to make one text the other."""
    row = list(range(len(one) + 1))
    for position, wanted in enumerate(other, start=1):
        before, row[0] = row[0], position
        for index, char in enumerate(one, start=1):
            before, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, before + (char != wanted))
    return row[-1]


def score(rows, mode="robust", strict=False):
    """Score document questions.

    Args:
        rows (list[dict]): Result rows; gold is a list of answers, None in a test split; meta may hold
            ``answer_type``, ``evidence`` and ``operation`` (lists).
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing, as the official program does.

    Returns:
        dict: See :func:`report`; without scores where there is no gold.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    if not any(row["gold"] for row in rows):
        return report(mode, rows, marks, None, {})
    values = [value for _, value in marks]
    by = {key: by_name(meta(rows, key), values) for key in ("answer_type", "evidence", "operation")}
    return report(mode, rows, marks, "anls", {"anls": percent(values)}, by)
