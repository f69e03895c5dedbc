"""ScienceQA: multiple choice, with images for a part.

``reference`` reads as InternVL's post_process, and beside it as LLaVA's; ``robust`` as :func:`strict_letter`.
InternVL's program stops at an answer of "(" and one more character: such a row is wrong, its letter is ``IndexError``,
and ``official_crashes`` counts them.
"""

from . import letters
from .common import by_name, check, each, percent, report

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
LLAVA = "LLaVA's letters"


def mark(rows, mode):
    """list[tuple]: The letter of every row, and whether it is right."""
    find = letters.internvl if mode == "reference" else letters.strict_letter
    return each(rows, lambda row: _mark(row, find))


def _mark(row, find):
    parsed = find(row["prediction"], row["meta"]["options"])
    return parsed, parsed == row["gold"]


def _llava(text, options):
    letter = letters.llava_scienceqa(text)
    return letter if letter in options else "FAILED"


def score(rows, mode="robust", strict=False):
    """Score ScienceQA.

    Args:
        rows (list[dict]): Result rows; gold is a letter, meta holds ``options``, ``image`` (whether there is one) and
            perhaps ``subject``, ``grade`` and ``hint`` of problems.json.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing. Otherwise it is wrong; LLaVA's program leaves it out of the
            accuracy of questions with images.

    Returns:
        dict: See :func:`report`; ``accuracy``, ``image_accuracy`` and groups by subject, context and grade.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    right = [correct for _, correct in marks]
    seen = [row["meta"]["image"] for row in rows]
    scores, notes = _accuracies(right, seen), {}
    if mode == "reference":
        found = [correct for _, correct in each(rows, lambda row: _mark(row, _llava))]
        answered = [image and row["prediction"] is not None for image, row in zip(seen, rows)]
        scores |= {f"{name} ({LLAVA})": value for name, value in _accuracies(found, answered).items()}
        notes["official_crashes"] = sum(parsed == letters.CRASH for parsed, _ in marks)
    by = {
        "subject": by_name([SUBJECTS.get(row["meta"].get("subject")) for row in rows], right),
        "context": by_name([_context(row["meta"]) for row in rows], right),
        "grade": by_name([_grade(row["meta"].get("grade")) for row in rows], right),
    }
    return report(mode, rows, marks, "accuracy", scores, by, **notes)


def _accuracies(right, seen):
    scores = {"accuracy": percent(right)}
    if any(seen):
        scores["image_accuracy"] = percent(value for value, image in zip(right, seen) if image)
    return scores


def _context(meta):
    if "hint" not in meta:
        return []
    return ["TXT"] * bool(meta["hint"]) + ["IMG"] * bool(meta["image"]) or ["NO"]


def _grade(grade):
    number = (grade or "").removeprefix("grade")
    return ("G1-6" if int(number) <= 6 else "G7-12") if number.isdecimal() and int(number) else None
