"""ChartQA: numbers may be 5 % off, words must be the same.

``reference`` is InternVL's: it hands answer and gold to the metric the wrong way round, so that the 5 % are of the
answer. ``robust`` takes them of the gold, and reads numbers with thousands' commas, currency signs and a full stop.
"""

from .common import by_name, check, each, percent, report
from .text import first_line

TOLERANCE = 0.05


def mark(rows, mode):
    """list[tuple]: The answer of every row, and whether it is close enough to one of its gold answers."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    gold = [row["gold"]] if isinstance(row["gold"], str) else row["gold"]
    if mode == "reference":
        parsed = row["prediction"].strip()
        return parsed, any(_close(answer, parsed) for answer in gold)
    parsed = _plain(first_line(row["prediction"]))
    return parsed, any(_close(parsed, _plain(answer)) for answer in gold)


def _close(text, base):
    """bool: Whether two texts are numbers no more than 5 % of the base apart, or the same words."""
    number, scale = to_number(text), to_number(base)
    if number is not None and scale:
        return abs(number - scale) / abs(scale) <= TOLERANCE
    return text.lower() == base.lower()


def to_number(text):
    """float | None: The number that a text is; ``5%`` is 0.05."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text):
    bare = text.strip().removesuffix(".").replace("$", "").replace("€", "").replace(",", "").strip()
    return bare if to_number(bare) is not None else text.strip().removesuffix(".")


def score(rows, mode="robust", strict=False):
    """Score ChartQA.

    Args:
        rows (list[dict]): Result rows; gold is a text or a list of texts, the category ``human`` or ``augmented``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`; ``accuracy`` of all rows, and ``mean`` over the categories.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    values = [value for _, value in marks]
    by = by_name([row["category"] for row in rows], values)
    scores = {"accuracy": percent(values), "mean": sum(part["accuracy"] for part in by.values()) / len(by)}
    return report(mode, rows, marks, "mean", scores, {"category": by})
