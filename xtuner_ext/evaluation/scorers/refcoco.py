"""RefCOCO, RefCOCO+, RefCOCOg: a box for an expression, right when it overlaps the true one by more than a half.

``reference`` is InternVL's: four numbers in square brackets, thousandths of the image where they add up to 4 or more
and shares of it otherwise, right from 0.5 on, in single precision. Beside it stands XTuner's eval_refcoco under its
name: whole hundredths of the image, areas that count border pixels. ``robust`` reads every usual way to write a box.
"""

import math
import re

import numpy as np

from ...errors import UserError
from .common import by_name, check, each, percent, report

XTUNER = "XTuner's boxes"
SCALES = {"unit": 1.0, "percent": 100.0, "thousand": 1000.0, "999": 999.0, "pixel": None}
HALF = 0.5
_BRACKETS = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = re.compile(rf"(?<![\d.]){_NUMBER}(?:[\s,;()\[\]<>{{}}]+{_NUMBER}){{3}}(?![\d.]*\d)")


def mark(rows, mode, box_format="auto"):
    """list[tuple]: The box of every row in pixels as far as it was understood, and whether it is right."""
    if mode == "reference":
        return each(rows, lambda row: _internvl(row["prediction"], row["meta"]))
    if box_format not in ("auto", *SCALES):
        raise UserError(f"box format is {box_format!r}, expected one of auto, {', '.join(SCALES)}")
    return each(rows, lambda row: _robust(row["prediction"], row["meta"], box_format))


def score(rows, mode="robust", strict=False, box_format="auto"):
    """Score expressions.

    Args:
        rows (list[dict]): Result rows; meta holds ``box`` ([x1, y1, x2, y2] in pixels), ``width`` and ``height``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.
        box_format (str): What robust takes the model's numbers as: ``unit`` (0 to 1), ``percent`` (0 to 100),
            ``thousand`` (0 to 1000), ``999`` (0 to 999), ``pixel``, or ``auto``: unit up to 1, percent when written as
            XTuner does, thousand up to 1000, pixel beyond.

    Returns:
        dict: See :func:`report`; ``official_crashes`` counts answers that stop XTuner's program.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode, box_format)
    right = [correct for _, correct in marks]
    scores, notes = {"accuracy": percent(right)}, {}
    if mode == "reference":
        found = each(rows, lambda row: _xtuner(row["prediction"], row["meta"]))
        scores[f"accuracy ({XTUNER})"] = percent(correct for _, correct in found)
        notes["official_crashes"] = sum(parsed == "crash" for parsed, _ in found)
    by = {"category": by_name([row["category"] for row in rows], right)}
    return report(mode, rows, marks, "accuracy", scores, by, **notes)


def overlap(one, other):
    """Intersection over union of two boxes.

    Args:
        one (np.ndarray): [x1, y1, x2, y2].
        other (np.ndarray): [x1, y1, x2, y2].

    Returns:
        float: From 0 to 1 for boxes with their corners in order; not a number for two without area.
    """
    with np.errstate(all="ignore"):
        width, height = np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0)
        shared = width * height
        union = np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared
        return float(shared / union)


def _internvl(text, meta):
    size = np.array([meta["width"], meta["height"]] * 2, dtype=np.float32)
    found = _BRACKETS.search(text)
    try:
        box = [float(number) for number in found.groups()] if found else [0.0] * 4
    except ValueError:
        found, box = None, [0.0] * 4
    with np.errstate(all="ignore"):
        box = np.array(box, dtype=np.float64).astype(np.float32)
        if box.sum() >= 4:
            box = box / np.float32(1000)
        box = box * size
    right = overlap(box, np.array(meta["box"], dtype=np.float32)) >= HALF
    return _listed(box) if found else None, right


def _listed(box):
    """list[float] | None: A box that JSON can hold."""
    return [float(edge) for edge in box] if np.isfinite(box).all() else None


def _xtuner(text, meta):
    x1, y1, x2, y2 = meta["box"]
    width, height = meta["width"], meta["height"]
    true = [int(edge * 100) for edge in (x1 / width, y1 / height, x2 / width, y2 / height)]
    try:
        box = [int(number) for number in re.findall(r"\d+", text)]
        if len(box) != 4:
            return None, False
        width = max(0, min(box[2], true[2]) - max(box[0], true[0]) + 1)
        height = max(0, min(box[3], true[3]) - max(box[1], true[1]) + 1)
        areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, true)]
        return box, width * height / (sum(areas) - width * height) > HALF
    except (ValueError, ZeroDivisionError, OverflowError):
        # More digits than Python takes, a box without area: the official program stops.
        return "crash", False


def _robust(text, meta, box_format):
    found = _FOUR.search(text)
    if not found:
        return None, False
    box = [float(number) for number in re.findall(_NUMBER, found[0])]
    if not all(map(math.isfinite, box)):
        return None, False
    scale = SCALES[_format(box, found[0]) if box_format == "auto" else box_format]
    size = [meta["width"], meta["height"]] * 2
    if scale is not None:
        box = [edge / scale * side for edge, side in zip(box, size)]
    # Corners in the other order are the same box.
    x1, x2, y1, y2 = *sorted(box[0::2]), *sorted(box[1::2])
    box = np.array([x1, y1, x2, y2])
    return _listed(box), overlap(box, np.array(meta["box"], dtype=float)) > HALF


def _format(box, text):
    if max(box) <= 1:
        return "unit"
    if ">" in text:
        return "percent"
    return "thousand" if max(box) <= 1000 else "pixel"
