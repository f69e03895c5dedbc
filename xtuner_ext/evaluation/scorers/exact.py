"""Exact match, ignoring case, outer blanks and a final full stop."""


def normalise(text):
    """str: The form in which two answers are compared."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def exact_match(prediction, gold):
    """Compare two answers.

    Args:
        prediction (str): The model's words.
        gold (str): The expected words.

    Returns:
        tuple[str, bool]: What was understood, and whether it is right.
    """
    parsed = normalise(prediction)
    return parsed, parsed == normalise(gold)


def mark_rows(rows):
    """list[dict]: The rows with ``parsed`` and ``correct`` of :func:`exact_match`."""
    marks = [exact_match(row["prediction"], row["gold"]) for row in rows]
    return [{**row, "parsed": parsed, "correct": correct} for row, (parsed, correct) in zip(rows, marks)]


def score_rows(rows):
    """Accuracy, overall and by category.

    Args:
        rows (list[dict]): With ``correct`` and ``category``.

    Returns:
        dict: ``accuracy`` (share), ``count`` and ``by_category`` of the same two.
    """
    by_category = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row["correct"])
    return {
        "accuracy": _share([row["correct"] for row in rows]),
        "count": len(rows),
        "by_category": {
            name: {"accuracy": _share(values), "count": len(values)} for name, values in sorted(by_category.items())
        },
    }


def _share(values):
    return sum(values) / len(values) if values else 0.0
