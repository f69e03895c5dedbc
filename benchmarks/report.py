"""python benchmarks/report.py --decode ROWS.json --step ROWS.json --out docs/figures: draw the README's figures.

The rows are those that ``benchmarks/decode.py --rows`` and ``benchmarks/step.py --rows`` write.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

# Colours that differ in lightness too, after Okabe and Ito.
COLOURS = {"teacher": "#444444", "hybrid": "#0072B2", "linear": "#D55E00"}
CYCLE = ("#444444", "#D55E00", "#0072B2", "#009E73")
STYLE = {
    "font.size": 10, "font.family": "DejaVu Sans", "lines.linewidth": 1.6, "svg.fonttype": "path", "svg.hashsalt": "figures",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "xtick.color": "#555555", "ytick.color": "#555555", "axes.titlesize": 11, "axes.titlelocation": "left",
}


def parse_args():
    """argparse.Namespace: The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", type=Path, help="rows of benchmarks/decode.py")
    parser.add_argument("--step", type=Path, help="rows of benchmarks/step.py")
    parser.add_argument("--prefix", default="", help="in front of the files' names")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser.parse_args()


def main():
    """Draw what there are rows for."""
    args = parse_args()
    if not args.decode and not args.step:
        sys.exit("nothing to draw: name rows with --decode or --step")
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        if args.decode:
            rows = json.loads(args.decode.read_text())
            save(draw_latency(rows), args, "latency")
            save(draw_memory(rows), args, "memory")
        if args.step:
            save(draw_depth(json.loads(args.step.read_text())), args, "depth")


def save(figure, args, name):
    """Write a figure."""
    path = args.out / f"{args.prefix}{name}.{args.format}"
    # Without a date, so that the same rows give the same file.
    metadata = {"Date": None} if args.format == "svg" else None
    # Tight, as the lines' names stand outside of the axes.
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
    plt.close(figure)
    sys.stdout.write(f"{path}\n")


def draw_latency(rows):
    """Figure: Milliseconds a token against context length, of every model the fastest way and the teacher's default."""
    figure, axes = _axes(f"Time per token ({_where(rows)})", "tokens of context", "ms per token")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    for model in COLOURS:
        paths = list(dict.fromkeys(row["path"] for row in rows if row["model"] == model))
        # Students the fastest way; the teacher also as transformers decodes by default.
        for path in {paths[0] if model == "teacher" else paths[-1]: None, paths[-1]: None}:
            chosen = [row for row in rows if (row["model"], row["path"]) == (model, path)]
            x, y = [row["context"] for row in chosen], [1e3 * row["seconds"] for row in chosen]
            dashed = model == "teacher" and path != paths[-1]
            axes.plot(x, y, color=COLOURS[model], linestyle="--" if dashed else "-", marker="o", markersize=4)
            ends.append((y[-1], f"{model}, {path}", COLOURS[model]))
    _label(axes, ends, x[-1])
    _thousands(axes, sorted({row["context"] for row in rows}))
    _steps(axes)
    return figure


def draw_memory(rows):
    """Figure: Bytes of the cache against context length."""
    figure, axes = _axes(f"Cache of one sequence ({_where(rows)})", "tokens of context", "MiB")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    for model, colour in COLOURS.items():
        sizes = {row["context"]: row["cache_bytes"] / row["batch"] / 2**20 for row in rows if row["model"] == model}
        axes.plot(sizes.keys(), sizes.values(), color=colour, marker="o", markersize=4)
        ends.append((list(sizes.values())[-1], model, colour))
    _label(axes, ends, max(sizes))
    _thousands(axes, sorted(sizes))
    _steps(axes)
    return figure


def draw_depth(rows):
    """Figure: Peak bytes of a training step against the number of layers, a line per variant."""
    figure, axes = _axes("Memory of an alignment step", "layers", "MiB")
    ends = []
    for variant, colour in zip(dict.fromkeys(row["variant"] for row in rows), CYCLE):
        sizes = sorted((row["layers"], row["peak_bytes"] / 2**20) for row in rows if row["variant"] == variant)
        axes.plot(*zip(*sizes), color=colour, marker="o", markersize=4)
        ends.append((sizes[-1][1], variant, colour))
    axes.set_ylim(bottom=0)
    _label(axes, ends, max(row["layers"] for row in rows))
    axes.set_xticks(sorted({row["layers"] for row in rows}))
    return figure


def _where(rows):
    device = {"cpu": "one CPU thread", "cuda": "GPU"}[rows[0]["device"]]
    return f"{rows[0]['shape']} shape, {device}, batch {rows[0]['batch']}"


def _axes(title, x, y):
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_minor_locator(NullLocator())
    return figure, axes


def _thousands(axes, contexts):
    axes.set_xticks(contexts)
    # Names that would touch the one on their right are left out.
    apart = [context * 1.4 < after for context, after in zip(contexts, [*contexts[1:], 1e9])]
    names = [f"{context // 1024}K" if context >= 1024 else str(context) for context in contexts]
    axes.set_xticklabels([name if shown else "" for name, shown in zip(names, apart)])


def _steps(axes):
    """Ticks 1, 2, 5, 10, ... on the logarithmic y axis; powers of ten alone where there are many."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label(axes, ends, x):
    """Names at the lines' ends, moved apart where they would touch; ``ends`` holds (y, text, colour)."""
    axes.figure.canvas.draw()
    height, last = 13.0, -1e9
    for y, text, colour in sorted(ends):
        place = axes.transData.transform((x, y))
        last = max(place[1] * 72 / axes.figure.dpi, last + height)
        shift = last - place[1] * 72 / axes.figure.dpi
        away = dict(xytext=(8, shift), textcoords="offset points", va="center", annotation_clip=False)
        axes.annotate(text, (x, y), color=colour, **away)


if __name__ == "__main__":
    main()
