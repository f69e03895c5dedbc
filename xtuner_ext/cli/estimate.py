"""xtuner-ext estimate CONFIG --gpus N --memory 80: what a run will need, before it is started."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import UserError
from . import configs_dir
from .config_options import find_config, load_config
from .pipeline import find_stages

GIB, MIB = 2**30, 2**20


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext estimate",
        description="Count parameters, memory, checkpoint, steps and tokens of a stage, or of every stage of a "
        "project, from the config and the teacher's config.json; no weight is read.",
        epilog="example: xtuner-ext estimate mmmamba/digits --gpus 8 --memory 80",
    )
    parser.add_argument("config", help="config of a stage, or a project folder")
    parser.add_argument("--gpus", type=int, default=1, help="training processes (default: 1)")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of one GPU (default: 80)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: the longest that the config lets pass)")
    parser.add_argument("--no-kernels", action="store_true", help="as on a CPU, without Triton, whose scans keep less")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes of the config"
    )
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status: 0 also where nothing fits.

    Raises:
        UserError: For numbers below 1, or a config that cannot be built.
    """
    args = parse_args(argv)
    for name in ("gpus", "memory", "length"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}, expected more than 0")
    from ..distill.estimate import estimate_stage

    report = {}
    for name, path in _configs(args.config).items():
        config = load_config(str(path), args.cfg_options)
        report[name] = estimate_stage(config, args.gpus, args.memory, args.length, not args.no_kernels)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    for name, stage in report.items():
        _print(name, stage, args.memory)
    return 0


def _configs(name):
    if any(path.is_dir() for path in (Path(name), configs_dir().parent / name, configs_dir() / name)):
        return find_stages(name)
    path = Path(find_config(name))
    return {path.stem: path}


def _print(name, stage, memory):
    from rich.table import Table

    from .console import console

    activations = stage["activation_bytes"]
    table = Table(title=f"{name}: memory of each of {stage['gpus']} GPUs", title_justify="left")
    parts = ("weights", "gradients", "buckets", "optimizer", "activations", "total")
    for column in ("", *parts, f"fits {memory:g} GiB"):
        table.add_column(column, justify="right" if column else "left")
    for level, row in stage["zero"].items():
        verdict = ("yes" if row["fits"] else "no") if row["possible"] else "not before stage 3"
        label = f"ZeRO-{level}" if int(level) else "plain"
        table.add_row(label, *(_size(row[part]) for part in parts), verdict)
    out = console()
    out.print(table)
    lines = [
        f"parameters {stage['parameters']:,}, of which {stage['trainable']:,} train; checkpoint "
        f"{_size(stage['checkpoint_bytes'])}",
        f"{stage['tokens_per_step']:,} tokens a step ({stage['batch_size']} rows of up to {stage['length']:,} x "
        f"{stage['accumulate']} iterations x {stage['gpus']} GPUs), {stage['steps']:,} steps, "
        f"{stage['tokens']:,} tokens",
    ]
    if "checkpointed" in activations and not stage["recomputes"]:
        lines.append(f"with activation checkpointing {_size(activations['checkpointed'])} of activations")
    out.print("\n".join(lines) + "\n", highlight=False)


def _size(count):
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"
