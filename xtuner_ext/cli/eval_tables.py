"""What `xtuner-ext eval` prints, and its comparison of scores."""

import json
import sys
from pathlib import Path

MOST_COLUMNS = 8  # of a table that is still easy to read
SHOWN = 20  # changed answers on a terminal; all are in the file


def print_scores(metrics):
    """Print the scores of annotated questions or a benchmark."""
    from .console import console

    out = console()
    if "reports" not in metrics:
        out.print(_accuracy_table(metrics))
        return
    reports = metrics["reports"]
    whom = metrics.get("model") or metrics["rows"]
    out.print(f"{whom} on {metrics['benchmark']}, {metrics['split']}", markup=False, highlight=False, soft_wrap=True)
    for table in _benchmark_tables(reports):
        out.print(table)
    report = next(iter(reports.values()))
    counts = [f"{report['count']} questions, {report['missing']} without an answer"]
    counts += [f"{part['unparsed']} not understood ({mode})" for mode, part in reports.items() if part["unparsed"]]
    out.print("; ".join(counts), highlight=False, soft_wrap=True)


def _table(title, first, others):
    from rich.table import Table

    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for column in others:
        table.add_column(column, justify="right")
    return table


def _accuracy_table(metrics):
    table = _table(f"{metrics['model']} on {metrics['data']}", "category", ("accuracy", "questions"))
    for name, score in metrics["by_category"].items():
        table.add_row(name, f"{score['accuracy']:.1%}", str(score["count"]))
    table.add_section()
    table.add_row("all", f"{metrics['accuracy']:.1%}", str(metrics["count"]))
    return table


def _benchmark_tables(reports):
    """list[Table]: The scores, then those of every grouping; modes stand side by side where they differ."""
    scores = {mode: {name: {"": value} for name, value in part["scores"].items()} for mode, part in reports.items()}
    tables = [_side_by_side("score", scores)]
    for grouping in dict.fromkeys(name for report in reports.values() for name in report["by"]):
        groups = {mode: part["by"].get(grouping, {}) for mode, part in reports.items()}
        table = _side_by_side(grouping, groups)
        if len(table.columns) <= MOST_COLUMNS:
            tables.append(table)
        else:
            tables += [_side_by_side(f"{grouping} ({mode})", {mode: group}) for mode, group in groups.items()]
    return tables


def _side_by_side(first, groups):
    """Table: One line a name, one column a measure; one a mode as well where the modes differ in it."""
    modes = list(groups)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    measures = list(dict.fromkeys(m for group in groups.values() for part in group.values() for m in part))
    measures = [measure for measure in measures if measure != "count"]

    def value(mode, name, measure):
        return groups[mode].get(name, {}).get(measure)

    columns = []
    for measure in measures:
        differs = any(value(mode, name, measure) != value(modes[0], name, measure) for mode in modes for name in names)
        columns += [(mode, measure) for mode in (modes if differs else modes[:1])]
    split = {measure for mode, measure in columns if mode != modes[0]}
    heads = [f"{measure} {mode}".strip() if measure in split else measure or "value" for mode, measure in columns]
    counted = any("count" in part for part in groups[modes[0]].values())
    table = _table(None, first, [*heads, *["questions"] * counted])
    for name in names:
        cells = [_number(value(mode, name, measure)) for mode, measure in columns]
        counts = [str(value(modes[0], name, "count") or "")] * counted
        table.add_row(str(name), *cells, *counts)
    return table


def _number(value):
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def list_benchmarks():
    """Print every benchmark with its splits, its answers' length and what must be where.

    Returns:
        int: Exit status.
    """
    from ..evaluation.benchmarks import BENCHMARKS
    from .console import console

    table = _table(None, "name", ())
    for column in ("splits", "files below --data"):
        table.add_column(column, overflow="fold")
    for name, bench in BENCHMARKS.items():
        table.add_row(name, ", ".join(bench.splits), "\n".join(bench.files))
    console().print(table)
    return 0


def compare_folders(args):
    """Print, and write where asked for, how the scores of several folders differ.

    Args:
        args (argparse.Namespace): ``compare``, ``out``, ``seed`` and ``json``.

    Returns:
        int: Exit status.

    Raises:
        UserError: For folders that are no scores, or of different questions.
    """
    from ..convert.checkpoint import whole_folder
    from ..errors import UserError
    from ..evaluation.paired import compare_scores
    from ..evaluation.rows import write_rows

    files = {"comparison.json", "changed.jsonl"}
    out = Path(args.out) if args.out else None
    if out and out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - files):
        raise UserError(f"{out} holds other files, expected a folder of an earlier comparison or a new one")
    result = compare_scores(args.compare, seed=args.seed or 0)
    if out:
        with whole_folder(out) as folder:
            write_rows(folder / "changed.jsonl", result["changed"])
            rest = {key: value for key, value in result.items() if key != "changed"}
            (folder / "comparison.json").write_text(json.dumps(rest, indent=2), encoding="utf-8")
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        _print_comparison(result)
    return 0


def _print_comparison(result):
    from .console import console

    out, settings = console(), result["settings"]
    table = _table(
        f"{result['count']} questions, 95% intervals of {settings['resamples']:,} paired resamples",
        "scores",
        ("mean", "headline", "difference", "interval", "better", "worse", "said otherwise", "p"),
    )
    steps = {step["folder"]: step for step in result["differences"]}
    for model in result["models"]:
        headline = "\n".join(
            f"{name} {value:.2f} ({mode})" for mode, found in model["headline"].items() for name, value in found.items()
        )
        step = steps.get(model["folder"])
        cells = [""] * 6
        if step:
            cells = [f"{step['difference']:+.2f}", f"{step['low']:+.2f} to {step['high']:+.2f}"]
            cells += [str(step[key]) for key in ("better", "worse", "changed")] + [f"{step['p']:.2g}"]
        table.add_row(model["folder"], f"{model['score']:.2f}", headline, *cells)
    out.print(table)
    marked = [c for c in result["changed"] if len({float(part["correct"]) for part in c["answers"].values()}) > 1]
    if not marked:
        return
    names = [model["folder"] for model in result["models"]]
    table = _table(f"{min(SHOWN, len(marked))} of {len(marked)} answers whose mark changed", "question", ())
    for column in ("gold", *names):
        table.add_column(column, overflow="fold")
    for change in marked[:SHOWN]:
        said = [f"{part['prediction']} ({float(part['correct']):g})" for part in change["answers"].values()]
        # Plain text: an answer may hold what rich takes for its own marks.
        cells = [f"{change['id']}: {change['question']}", str(change["gold"]), *said]
        table.add_row(*map(_plain, cells))
    out.print(table)


def _plain(text):
    from rich.text import Text

    return Text(text if len(text) <= 200 else f"{text[:200]}…")
