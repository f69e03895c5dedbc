"""python benchmarks/ablation.py --teacher digits --seeds 2: what each switch of the improved recipe brings.

Every row changes one thing in the recipe of the first row and trains all three stages of a linear student again. The
measure is the student's KL to its teacher on held-out samples; ``worse by`` is the ratio to the first row's.
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training import REPOSITORY, collect, held_out, machine, train

# Seeds differ by this much.
BAR = 1.05
ALIGNMENT_UNSCALED = {"model.alignment.normalise": False, "model.alignment.scale": 1000.0}
AFTER_PROJECTION = {
    "1": {"model.alignment.after_projection": True},
    "2": {"model.alignment.after_projection": True, "model.trainable": "projections"},
    "3": {"model.trainable": "projections"},
}
# Name -> config changes per stage; "all" applies to every stage.
COMMON = {
    "improved recipe": {},
    "attention's rotary positions left out": {"all": {"model.mixer.use_rope": False}},
    "decay rates -e, random time steps": {"all": {"model.seeding.A_log": 1.0, "model.seeding.dt_spacing": "random"}},
    "slow heads only: steps 0.0001 to 0.01": {"all": {"model.seeding.dt_min": 1e-4, "model.seeding.dt_max": 1e-2}},
    "no convolution": {"all": {"model.mixer.conv_kernel": 0}},
    "no SiLU after the convolution": {"all": {"model.mixer.conv_activation": None}},
    "layer errors not divided by their energy": {"1": ALIGNMENT_UNSCALED, "2": ALIGNMENT_UNSCALED},
    "reverse KL": {"3": {"model.divergence.direction": "reverse"}},
    "temperature 2": {"3": {"model.divergence.temperature": 2.0}},
}
# What the rows of digits change: the improved recipe before the two changes that its ablation found.
OPEN = {"all": {"model.seeding.gate": "open"}, "3": {"model.trainable": "all"}}
DIGITS = {
    **{name: change for name, change in COMMON.items() if change},
    "q and k brought to unit length": {"all": {"model.mixer.qk_norm": "l2"}},
    "aligned before the output projection, which stays as it is": {
        "1": {"model.alignment.after_projection": False},
        "2": {"model.alignment.after_projection": False, "model.trainable": "mixers"},
    },
    "window of 16 tokens and a sink": {"all": {"model.mixer.window": 16, "model.mixer.sink": True}},
    "the rest trains at a tenth of the rate": {"3": {"optim_wrapper.paramwise_cfg.rest_lr_mult": 0.1}},
    "gates start shut": {"all": {"model.seeding.gate": "xavier"}},
    "only mixers and output projections train in stage 3": {"3": {"model.trainable": "projections"}},
}


def merged(base, change):
    """dict: Config changes per stage, those of ``change`` over those of ``base``."""
    return {stage: {**base.get(stage, {}), **change.get(stage, {})} for stage in {**base, **change}}


VARIANTS = {
    "digits": {
        "gates open, everything trains in stage 3": OPEN,
        **{name: merged(OPEN, change) for name, change in DIGITS.items()},
        "improved recipe: the last two": {},
    },
    "smollm2": {
        **COMMON,
        "q and k as they are": {"all": {"model.mixer.qk_norm": None}},
        "gates start open": {"all": {"model.seeding.gate": "open"}},
        "aligned after the output projection, which trains": AFTER_PROJECTION,
        "no sink": {"all": {"model.mixer.sink": False}},
        "no window, gates open": {
            "all": {"model.mixer.window": 0, "model.mixer.sink": False, "model.seeding.gate": "open"}
        },
        "window of 32 tokens": {"all": {"model.mixer.window": 32}},
        "window of 128 tokens": {"all": {"model.mixer.window": 128}},
        "every weight trains in stage 3, the rest at a tenth of the rate": {
            "3": {"model.trainable": "all", "optim_wrapper.paramwise_cfg.rest_lr_mult": 0.1}
        },
    },
}


def main():
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=("digits", "smollm2"), default="digits")
    parser.add_argument("--iterations", type=int, nargs=3, default=(100, 100, 300), metavar="N", help="of stages 1, 2, 3")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, a thread each if several")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="rows, the first one is compared with")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "work_dirs" / "ablation")
    parser.add_argument("--json", action="store_true", help="end with claims and numbers on one line")
    args = parser.parse_args()
    names = args.only or list(VARIANTS[args.teacher])
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: [pool.submit(run, args, name, seed) for seed in range(args.seeds)] for name in names}
        collect(pool, [one for found in runs.values() for one in found])
    rows = {name: [one.result() for one in found] for name, found in runs.items()}
    print_table(rows, args)
    if args.json:
        found = {"machine": machine(), "claims": claims(rows, args.teacher), "teacher": args.teacher, "rows": rows}
        print(json.dumps(found))


def run(args, name, seed):
    """dict: The last held-out measures of one variant's linear student."""
    base = args.work_dir / args.teacher / "-".join(map(str, args.iterations)) / slug(name) / str(seed)
    project, changes = f"mmmamba/{args.teacher}", VARIANTS[args.teacher][name]
    for number, (stage, count) in enumerate(zip(("stage1", "stage2", "stage3_linear"), args.iterations), start=1):
        options = {**changes.get("all", {}), **changes.get(str(number), {})}
        train(f"{project}/{stage}", base / stage, count, options, seed)
    return held_out(base / "stage3_linear")[-1]


def print_table(rows, args):
    """Print one Markdown row per variant."""
    base = [row["kl"] for row in next(iter(rows.values()))]
    print("| change | KL | worse by | same first word |\n|---|---:|---:|---:|")
    for name, results in rows.items():
        kl = [row["kl"] for row in results]
        # Seed by seed, so that what a seed has in common falls out.
        ratio = statistics.mean(ours / theirs for ours, theirs in zip(kl, base))
        spread = f" ± {statistics.stdev(kl):.4f}" if len(kl) > 1 else ""
        agreement = statistics.mean(row["agreement"] for row in results)
        print(f"| {name} | {statistics.mean(kl):.4f}{spread} | {ratio:.2f} | {agreement:.1%} |")
    print(f"\n{args.teacher}, linear student, {args.seeds} seeds, {args.iterations} iterations; {machine()}")


def claims(rows, teacher):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim; none where too few rows were run."""
    shipped = [name for name in rows if not VARIANTS[teacher][name]]
    others = [name for name in rows if VARIANTS[teacher][name]]
    if not shipped or not others:
        return []
    kl = {name: statistics.mean(row["kl"] for row in results) for name, results in rows.items()}
    value = kl[shipped[0]] / min(kl[name] for name in others)
    name = f"held-out KL of the shipped {teacher} recipe over the best other row's"
    return [{"name": name, "value": value, "bar": BAR, "holds": value <= BAR}]


def slug(name):
    """str: A folder's name for a variant."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


if __name__ == "__main__":
    main()
