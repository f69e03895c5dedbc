"""MME: two questions on every image, 14 subtasks; accuracy plus the share of images with both right, in points.

``reference`` is InternVL's clean-up before the official calculation.py: images are consecutive pairs of rows, and of
an answer the first four characters count. ``robust`` pairs by image and wants a yes or a no.
"""

import re

from .common import check, each, report
from .text import yes_or_no

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
DROPPED = "dropped"  # a tab in the answer breaks the official result file, and its line is passed over
_CHINESE = re.compile("[\u4e00-\u9fa5]")


def mark(rows, mode):
    """list[tuple]: Yes, no or other of every row, and whether it is right."""
    read = first_letters if mode == "reference" else yes_or_no
    return each(rows, lambda row: _mark(row, read))


def _mark(row, read):
    parsed = read(row["prediction"])
    return parsed, parsed == row["gold"].lower()


def first_letters(text):
    """str: ``yes``, ``no``, ``other``, or ``dropped``, as the official kit reads an answer."""
    text = text.replace("\n", "").replace("\r", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    text = _CHINESE.sub("", text.lower().replace("true", "yes").replace("false", "no"))
    if "\t" in text:
        return DROPPED
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score(rows, mode="robust", strict=False):
    """Score MME.

    Args:
        rows (list[dict]): Result rows with gold ``Yes`` or ``No``, the subtask as ``category`` and, in meta, ``image``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`. ``perception`` and ``cognition`` are sums of at most 200 points a subtask, over the
        subtasks that there are; ``unpaired`` counts images with another number of questions than two, whose answers
        count for the accuracy only.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    tasks = {}
    for row, marked in zip(rows, marks):
        tasks.setdefault(row["category"], []).append((row, *marked))
    by, unpaired = {}, 0
    for name, group in tasks.items():
        images = _images(group, mode)
        whole = [image for image in images if len(image) == 2]
        unpaired += len(images) - len(whole)
        kept = [correct for _, parsed, correct in group if parsed != DROPPED]
        accuracy = sum(kept) / len(kept) if kept else 0.0
        # The official program has every image in the denominator.
        pairs = len(images) if mode == "reference" else len(whole)
        both = sum(all(image) for image in whole) / pairs if pairs else 0.0
        points = {"score": accuracy * 100 + both * 100, "accuracy": accuracy * 100, "accuracy+": both * 100}
        by[name] = {**points, "count": len(group)}
    scores = {
        "perception": sum(part["score"] for name, part in by.items() if name not in COGNITION),
        "cognition": sum(part["score"] for name, part in by.items() if name in COGNITION),
    }
    scores["total"] = scores["perception"] + scores["cognition"]
    return report(mode, rows, marks, "total", scores, {"subtask": by}, unpaired=unpaired)


def _images(group, mode):
    """list[list[bool]]: What is right, image by image."""
    right = [correct for _, _, correct in group]
    if mode == "reference":
        return [right[start : start + 2] for start in range(0, len(right), 2)]
    images = {}
    for row, _, correct in group:
        images.setdefault(row["meta"]["image"], []).append(correct)
    return list(images.values())
