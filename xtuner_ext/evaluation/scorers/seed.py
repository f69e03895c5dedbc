"""SEED-Bench: multiple choice on images (types 1 to 9) and videos (types 10 to 12).

``reference`` is InternVL's calculation.py, for which the first character counts, and beside it the exact match of
InternVL's Acc@1 and of LLaVA; ``robust`` finds letters as :func:`strict_letter`. A type with nothing right has 0.
"""

from . import letters
from .common import by_name, check, each, percent, report

IMAGE_TYPES = range(1, 10)


def mark(rows, mode):
    """list[tuple]: The letter of every row, and whether it is right; an empty answer is ``IndexError`` in reference."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    if mode == "reference":
        parsed = row["prediction"][0] if row["prediction"] else letters.CRASH
    else:
        parsed = letters.strict_letter(row["prediction"], row["meta"]["options"])
    return parsed, parsed == row["gold"]


def score(rows, mode="robust", strict=False):
    """Score SEED-Bench.

    Args:
        rows (list[dict]): Result rows; gold is a letter, the category the name of the question type, meta holds
            ``options`` and perhaps ``type``, its number.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`; ``official_crashes`` counts answers that stop the official program.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    right = [correct for _, correct in marks]
    scores = {"total": percent(right)}
    numbers = [row["meta"].get("type") for row in rows]
    if any(number is not None for number in numbers):
        image = [value for value, number in zip(right, numbers) if number in IMAGE_TYPES]
        video = [value for value, number in zip(right, numbers) if number not in IMAGE_TYPES]
        scores |= {name: percent(part) for name, part in (("image", image), ("video", video)) if part}
    notes = {}
    if mode == "reference":
        scores["exact match"] = percent(row["prediction"] == row["gold"] for row in rows)
        notes["official_crashes"] = sum(parsed == letters.CRASH for parsed, _ in marks)
    by = {"type": by_name([row["category"] for row in rows], right)}
    return report(mode, rows, marks, "image" if "image" in scores else "total", scores, by, **notes)
