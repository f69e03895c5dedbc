"""GQA: exact answers, by type, and the official program's validity, plausibility, distribution and consistency.

``reference`` is the official eval.py behind InternVL's and LLaVA's conversion, which drops final full stops and
capitals of the prediction only; ``robust`` compares both sides without case, outer blanks and one full stop.
"""

from .common import by_name, check, each, percent, report
from .exact import exact_match

_LAST_STEPS = ("exist", "query: name", "choose name")


def mark(rows, mode):
    """list[tuple]: What was understood of every row, and whether it is right."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    if mode == "robust":
        return exact_match(row["prediction"], row["gold"])
    parsed = row["prediction"].rstrip(".").lower()
    return parsed, parsed == row["gold"]


def score(rows, mode="robust", strict=False, consistency=False):
    """Score GQA.

    Args:
        rows (list[dict]): Result rows; meta may hold ``question`` (without a prompt), ``types``, ``groups``,
            ``semantic``, ``entailed``, ``isBalanced``, ``valid`` and ``plausible`` of the official files, and what
            depends on them is left out where it does not.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing, as the official program does; it is wrong otherwise.
        consistency (bool): Whether entailed questions, which are rows too, are looked at.

    Returns:
        dict: See :func:`report`. The lower the distribution, the better.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    right = {str(row["id"]): correct for row, (_, correct) in zip(rows, marks)}
    kept = [(row, *marked) for row, marked in zip(rows, marks) if row["meta"].get("isBalanced", True)]
    values = [correct for _, _, correct in kept]
    metas = [row["meta"] for row, _, _ in kept]
    structural = [meta.get("types", {}).get("structural") for meta in metas]
    scores = {"accuracy": percent(values)}
    if any(structural):
        scores["binary"] = percent(v for v, kind in zip(values, structural) if kind is not None and kind != "query")
        scores["open"] = percent(v for v, kind in zip(values, structural) if kind == "query")
    choices = any("valid" in meta for meta in metas)
    if choices or mode == "reference":
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            scores[name] = percent(_belongs(parsed, meta.get(key), meta) for (_, parsed, _), meta in zip(kept, metas))
    if (distribution := _distribution(kept)) is not None:
        scores["distribution"] = distribution
    if consistency:
        scores["consistency"] = percent(_consistencies(kept, right))
    by = {
        "structural": by_name(structural, values),
        "semantic": by_name([meta.get("types", {}).get("semantic") for meta in metas], values),
        "steps": by_name([_steps(meta) for meta in metas], values),
        "words": by_name([_words(meta) for meta in metas], values),
    }
    return report(mode, rows, marks, "accuracy", scores, by, balanced=len(kept))


def _steps(meta):
    """int | None: Steps of reasoning without the last one, which only names."""
    if "semantic" not in meta:
        return None
    steps = (f"{step['operation']}: {step['argument']}" for step in meta["semantic"])
    return sum(not any(last in step for last in _LAST_STEPS) for step in steps)


def _words(meta):
    return len(meta["question"].split()) if "question" in meta else None


def _belongs(parsed, group, meta):
    if group is None:
        return False
    return parsed in (("color", "material", "shape") if "Common" in meta["types"]["detailed"] else group)


def _distribution(kept):
    """float | None: Chi square of predicted against true answers, averaged over groups by their size, by 100."""
    gold, said = {}, {}
    for row, parsed, _ in kept:
        group = row["meta"].get("groups", {}).get("global")
        if group is not None:
            counts = gold.setdefault(group, {})
            counts[row["gold"]] = counts.get(row["gold"], 0) + 1
            said[group, parsed] = said.get((group, parsed), 0) + 1
    total = weighted = 0
    for group, counts in gold.items():
        chi = sum(float(said.get((group, answer), 0) - count) ** 2 / count for answer, count in counts.items())
        size = sum(counts.values())
        weighted, total = weighted + chi * size, total + size
    return weighted / total / 100 if total else None


def _consistencies(kept, right):
    for row, _, correct in kept:
        entailed = [other for other in row["meta"].get("entailed", ()) if other != row["id"]]
        if correct and entailed:
            yield sum(right.get(str(other), False) for other in entailed) / len(entailed)
