"""Scores of several models on the same questions, set against the first one's."""

import json
from pathlib import Path

from ..errors import UserError
from .bootstrap import paired_bootstrap, sign_test
from .scorers.mmbench import CIRCLE

# What must be equal for two evaluations to be comparable.
SAME = ("benchmark", "split", "mode")


def compare_scores(folders, resamples=10_000, seed=0):
    """Compare evaluations question by question.

    Args:
        folders (list[str]): Folders of scores; the others are set against the first.
        resamples (int): Of the bootstrap.
        seed (int): Of the bootstrap.

    Returns:
        dict: ``count``, ``models`` (``folder``, ``model``, ``score``, the mean of ``correct`` in percent, and
        ``headline``, the benchmark's own score by mode), ``differences`` of every other one (``folder``, points of
        ``difference`` with the 95% interval ``low`` to ``high``, ``better``, ``worse``, ``changed`` and the sign test's
        ``p``), and ``changed``: the questions of which not all models say the same.

    Raises:
        UserError: For fewer than two folders, missing or broken files, or different questions.
    """
    if len(folders) < 2:
        raise UserError(f"--compare got {len(folders)} folder, expected at least two folders of scores")
    if len(set(map(str, folders))) < len(folders):
        raise UserError("--compare got one folder twice, expected different ones")
    loaded = {str(folder): read_scores(folder) for folder in folders}
    first = str(folders[0])
    rows, metrics = loaded[first]
    units = [_unit(row, metrics) for row in rows]
    models, differences = [], []
    for name, (own, facts) in loaded.items():
        _check_same(first, rows, metrics, name, own, facts)
        models.append(
            {
                "folder": name,
                "model": facts.get("model") or facts.get("rows"),
                "score": 100 * sum(row["correct"] for row in own) / len(own),
                "headline": _headline(facts),
            }
        )
        if name != first:
            differences.append({"folder": name, **_difference(rows, own, units, resamples, seed)})
    changed = [_change(parts, list(loaded)) for parts in zip(*(own for own, _ in loaded.values()))]
    return {
        "count": len(rows),
        "models": models,
        "differences": differences,
        "settings": {"resamples": resamples, "seed": seed, "units": len(set(units))},
        "changed": [change for change in changed if change],
    }


def read_scores(folder):
    """Read a folder of scores.

    Args:
        folder (str | Path): With ``rows.jsonl`` and ``metrics.json``.

    Returns:
        tuple[list[dict], dict]: The rows and the metrics.

    Raises:
        UserError: For a missing or broken file.
    """
    from .benchmarks.files import read_json, read_lines, take

    folder = Path(folder)
    for name in ("rows.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, expected a folder that `xtuner-ext eval --out` wrote")
    rows = read_lines(folder / "rows.jsonl")
    for where, row in rows:
        for key in ("id", "question", "gold", "correct", "prediction", "category"):
            take(row, where, key)
    return [row for _, row in rows], read_json(folder / "metrics.json")


def _check_same(first, rows, metrics, name, own, facts):
    for key in SAME:
        if metrics.get(key) != facts.get(key):
            raise UserError(f"{first} has {key} {metrics.get(key)!r} and {name} {facts.get(key)!r}: not comparable")
    for one, other in zip(rows, own):
        for key in ("id", "question", "gold"):
            if one[key] != other[key]:
                raise UserError(
                    f"{first} and {name} answer different questions: {key} of {one['id']!r} is {one[key]!r} in the one "
                    f"and {other[key]!r} in the other"
                )
    if len(rows) != len(own):
        raise UserError(f"{first} has {len(rows)} answers and {name} has {len(own)}, expected the same questions")


def _headline(facts):
    reports = facts.get("reports") or {}
    return {
        mode: {report["headline"]: report["scores"][report["headline"]]}
        for mode, report in reports.items()
        if report["headline"] in report["scores"]
    }


def _difference(rows, own, units, resamples, seed):
    steps = [float(there["correct"]) - float(here["correct"]) for here, there in zip(rows, own)]
    better, worse = sum(step > 0 for step in steps), sum(step < 0 for step in steps)
    low, high = paired_bootstrap(steps, units, resamples, seed)
    return {
        "difference": 100 * sum(steps) / len(steps),
        "low": 100 * low,
        "high": 100 * high,
        "better": better,
        "worse": worse,
        "changed": sum(here["prediction"] != there["prediction"] for here, there in zip(rows, own)),
        "p": sign_test(better, worse),
    }


def _change(parts, names):
    """dict | None: What the models say to a question of which they do not say the same."""
    if all(part["prediction"] == parts[0]["prediction"] for part in parts):
        return None
    shared = {key: parts[0][key] for key in ("id", "category", "question", "gold")}
    said = {name: {key: part[key] for key in ("prediction", "correct")} for name, part in zip(names, parts)}
    return {**shared, "answers": said}


def _unit(row, metrics):
    """What a question stands or falls with: its rotated forms, its pair, its conversation."""
    meta = row.get("meta", {})
    if metrics.get("benchmark") in ("mmbench", "ccbench"):
        return meta["index"] % CIRCLE
    if metrics.get("benchmark") == "mme":
        return row["category"], meta["image"]
    return row["id"] if "benchmark" in metrics else (str(row["id"]).split("#")[0], str(meta.get("source")))
