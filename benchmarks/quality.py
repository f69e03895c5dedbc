"""python benchmarks/quality.py --teacher smollm2 --tokens 150000: how much of a teacher each recipe keeps.

Trains mmMamba's recipe (``reference``) and ours (``improved``) for the same number of training tokens over stages
1 to 3, as linear students and as hybrids that keep attention in a quarter of the layers, and prints what
held-out samples say. The same command runs on a CPU and on a GPU; NPROC_PER_NODE=8 in front of it takes eight.
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training import REPOSITORY, collect, held_out, machine, select_layers, train

# Iterations of each project's configs give the split of the tokens over the stages.
RECIPES = {"reference": "mmmamba/{teacher}/reference", "improved": "mmmamba/{teacher}"}
STAGES = ("stage1", "stage2", "stage3_linear")
BAR = 0.8


def main():
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=("digits", "smollm2"), default="smollm2")
    parser.add_argument("--tokens", type=int, default=150_000, help="training tokens a student has seen at the end")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="recipes trained at the same time, a thread each if several")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "work_dirs" / "quality")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    counts = {recipe: iterations(args, recipe) for recipe in RECIPES}
    with ThreadPoolExecutor(args.jobs) as pool:
        keys = [(recipe, seed) for seed in range(args.seeds) for recipe in RECIPES]
        runs = {key: pool.submit(run_recipe, args, *key, counts[key[0]]) for key in keys}
        collect(pool, runs.values())
    results = {}
    for (recipe, _), run in sorted(runs.items(), key=lambda item: list(RECIPES).index(item[0][0])):
        for student, measures in run.result().items():
            results.setdefault((recipe, student), []).append(measures)
    print_table(results, args)
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(results)}))


def run_recipe(args, recipe, seed, counts):
    """Train one recipe's students.

    Args:
        args (argparse.Namespace): See :func:`main`.
        recipe (str): Key of :data:`RECIPES`.
        seed (int): Of data order and new weights.
        counts (dict[str, int]): Iterations of every stage.

    Returns:
        dict[str, list[dict]]: Student to its measures by training token, those of stages 1 and 2 included.
    """
    project = RECIPES[recipe].format(teacher=args.teacher)
    base = args.work_dir / args.teacher / str(args.tokens) / recipe / str(seed)
    for stage in STAGES[:2]:
        train(f"{project}/{stage}", base / stage, counts[stage], seed=seed)
    checkpoint = base / "stage2" / f"iter_{counts['stage2']}.pth"
    keep, layers = quarter_of(checkpoint)
    placements = {"linear": [], "hybrid, every fourth": list(range(0, layers, 4))}
    if recipe == "improved":
        placements["hybrid, selected"] = select_layers(f"{project}/stage2", checkpoint, keep, base / "attention_layers.json")
    curves = {}
    for student, kept in placements.items():
        work_dir = base / ("stage3_" + student.replace(", ", "_").replace(" ", "_"))
        options = {"model.attention_layers": str(kept).replace(" ", "")}
        train(f"{project}/stage3_linear", work_dir, counts["stage3_linear"], options, seed)
        curves[student] = joined([held_out(base / "stage1"), held_out(base / "stage2"), held_out(work_dir)])
    return curves


def iterations(args, recipe):
    """dict[str, int]: Iterations of every stage, in the proportions of the shipped configs."""
    from xtuner_ext.cli.config_options import load_config

    project = REPOSITORY / "projects" / RECIPES[recipe].format(teacher=args.teacher)
    configs = {stage: load_config(str(project / f"{stage}.py"), []) for stage in STAGES}
    shipped = {stage: config.train_cfg.max_iters for stage, config in configs.items()}
    total = args.tokens / tokens_per_iteration(configs["stage1"]) / sum(shipped.values())
    return {stage: max(1, round(total * count)) for stage, count in shipped.items()}


def tokens_per_iteration(config):
    """float: Real tokens of a batch, measured on samples spread over the training data."""
    from xtuner.registry import BUILDER

    from xtuner_ext.cli.train import prepare_data

    prepare_data(config)
    dataset = BUILDER.build(config.train_dataloader.dataset)
    chosen = range(0, len(dataset), max(1, len(dataset) // 256))
    processes = int(os.environ.get("NPROC_PER_NODE", 1))
    return processes * config.train_dataloader.batch_size * statistics.mean(len(dataset[index]["input_ids"]) for index in chosen)


def quarter_of(checkpoint):
    """tuple[int, int]: Layers that a 1:3 hybrid keeps, and all layers."""
    from xtuner_ext.distill.stages import read_checkpoint

    layers = len(read_checkpoint(str(checkpoint))[1]["layer_types"])
    return -(-layers // 4), layers


def joined(curves):
    """list[dict]: Measures of consecutive stages with tokens and seconds counted from the first one's start."""
    rows, tokens, seconds = [], 0, 0.0
    for curve in curves:
        rows += [{**row, "tokens": row["tokens"] + tokens, "seconds": row["seconds"] + seconds} for row in curve]
        tokens, seconds = rows[-1]["tokens"], rows[-1]["seconds"]
    return rows


def at(curve, key, limit):
    """dict: The last measures within a budget of ``tokens`` or ``seconds``."""
    return [row for row in curve if row[key] <= limit][-1]


def print_table(results, args):
    """Print one Markdown row per recipe and student."""
    seconds = min(curve[-1]["seconds"] for curves in results.values() for curve in curves)
    print("| recipe | student | KL | same first word | perplexity | minutes | KL after the fastest run's time |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (recipe, student), curves in results.items():
        last = [curve[-1] for curve in curves]
        kl, agreement, perplexity = (statistics.mean(row[key] for row in last) for key in ("kl", "agreement", "perplexity"))
        minutes = statistics.mean(row["seconds"] for row in last) / 60
        timed = statistics.mean(at(curve, "seconds", seconds)["kl"] for curve in curves)
        print(f"| {recipe} | {student} | {kl:.4f} | {agreement:.1%} | {perplexity:.2f} | {minutes:.1f} | {timed:.4f} |")
    curve = next(iter(results.values()))[0]
    print(
        f"\n{args.teacher}: {curve[-1]['tokens']:,} training tokens a student, teacher's perplexity "
        f"{curve[-1]['teacher_perplexity']:.2f}, {args.seeds} seed(s); {machine()}"
    )
    print("\n| training tokens | " + " | ".join(f"{recipe}, {student}" for recipe, student in results) + " |")
    print("|---:" * (1 + len(results)) + "|")
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        cells = (statistics.mean(at(c, "tokens", share * c[-1]["tokens"])["kl"] for c in curves) for curves in results.values())
        print(f"| {share * curve[-1]['tokens']:,.0f} | " + " | ".join(f"{value:.4f}" for value in cells) + " |")


def claims(results):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    kl = {key: statistics.mean(curve[-1]["kl"] for curve in curves) for key, curves in results.items()}
    found = []
    for student in ("linear", "hybrid, every fourth"):
        value = kl["improved", student] / kl["reference", student]
        found.append({"name": f"held-out KL of {student}: improved over reference", "value": value, "bar": BAR})
    value = kl["improved", "hybrid, selected"] / kl["improved", "hybrid, every fourth"]
    found.append({"name": "held-out KL: selected layers over every fourth", "value": value, "bar": 1.0})
    return [{**claim, "holds": claim["value"] <= claim["bar"]} for claim in found]


if __name__ == "__main__":
    main()
