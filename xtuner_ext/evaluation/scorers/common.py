"""What every scorer of a benchmark shares: its two modes, and the form of its report."""

from ...errors import UserError

MODES = ("reference", "robust")


def check(rows, mode, strict=False):
    """Insist on a known mode and, where asked for, on an answer to every question.

    Args:
        rows (list[dict]): Result rows; ``prediction`` is None where a question was not answered.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Whether a missing answer is an error.

    Raises:
        UserError: For another mode, no rows, or a missing answer.
    """
    if mode not in MODES:
        raise UserError(f"scorer mode is {mode!r}, expected one of {', '.join(MODES)}")
    if not rows:
        raise UserError("there are no result rows to score, expected at least one")
    missing = [row["id"] for row in rows if row["prediction"] is None]
    if strict and missing:
        raise UserError(f"{len(missing)} of {len(rows)} questions have no answer, the first is {missing[0]!r}")


def each(rows, one):
    """list[tuple]: What ``one(row)`` says of every answered row, ``(None, False)`` of the others."""
    return [(None, False) if row["prediction"] is None else one(row) for row in rows]


def percent(values):
    """float: 100 times the mean, 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) * 100 if values else 0.0


def by_name(names, values):
    """Accuracy by name.

    Args:
        names (list): One name for each value, or a list of names; None leaves it out.
        values (list): Shares from 0 to 1.

    Returns:
        dict: ``{name: {"accuracy": percent, "count": int}}``, sorted by name.
    """
    found = {}
    for group, value in zip(names, values, strict=True):
        for name in group if isinstance(group, list) else [group]:
            if name is not None:
                found.setdefault(name, []).append(value)
    order = sorted(found, key=lambda name: (isinstance(name, str), name))
    return {str(name): {"accuracy": percent(found[name]), "count": len(found[name])} for name in order}


def report(mode, rows, marks, headline, scores, by=None, **notes):
    """Put a scorer's report together.

    Args:
        mode (str): ``reference`` or ``robust``.
        rows (list[dict]): Result rows.
        marks (list[tuple]): What was understood, and how right it is, of every row.
        headline (str): The score that stands for all.
        scores (dict): Percentages, but for MME's points.
        by (dict, optional): ``{grouping: {name: {"accuracy", "count"}}}``; empty groupings are left out.
        **notes: Further counts.

    Returns:
        dict: ``mode``, ``headline``, ``scores``, ``by``, ``count``, ``missing`` (questions without an answer, which
        are wrong), ``unparsed`` (answers that nothing could be read from, wrong as well) and the notes.
    """
    answered = [row["prediction"] is not None for row in rows]
    return {
        "mode": mode,
        "headline": headline,
        "scores": scores,
        "by": {name: groups for name, groups in (by or {}).items() if groups},
        "count": len(rows),
        "missing": answered.count(False),
        "unparsed": sum(there and parsed is None for there, (parsed, _) in zip(answered, marks)),
        **notes,
    }


def meta(rows, key):
    """list: One key of every row's meta, None where it is not there."""
    return [row["meta"].get(key) for row in rows]
