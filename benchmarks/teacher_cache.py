"""python benchmarks/teacher_cache.py --json: what a cache of the teacher costs, saves and loses.

Trains stages 1 and 2 of the digits once, then stage 3 with the teacher running and with caches of its k likeliest
tokens, each with a few orders of the data: runs that differ in the last digit of a float alone end a fifth apart. Steps
are timed forward and backward on the same batches, in turns, in CPU time; the median of the turns is printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from training import REPOSITORY, held_out, machine, project_file, run, train

PROJECT = "mmmamba/digits"
ONLINE, EVERYTHING = "teacher runs", 1_000_000
# Against the runs with the teacher: seconds of a step, mean held-out KL with 32 tokens or more.
STEP_BAR, KL_BAR = 0.9, 1.2


def main():
    """Train, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs=3, default=(60, 60, 150), metavar="N", help="of stages 1, 2, 3")
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 32, EVERYTHING], help="of the caches")
    parser.add_argument("--seeds", type=int, default=3, help="orders of stage 3's data")
    parser.add_argument("--turns", type=int, default=7, help="timed steps of each kind")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "work_dirs" / "teacher_cache")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    base = args.work_dir / "-".join(map(str, args.iterations))
    for number in (1, 2):
        train(f"{PROJECT}/stage{number}", base / f"stage{number}", args.iterations[number - 1])
    caches, rows = {ONLINE: None}, {}
    for k in args.top_k:
        out = args.work_dir / f"cache_{k}"
        dtype = "float32" if k == EVERYTHING else "float16"
        options = ["--out", out, "--top-k", k, "--dtype", dtype, "--batch-size", 64]
        run("cache-teacher", project_file(f"{PROJECT}/stage3_linear"), *options)
        caches["all tokens, fp32" if k == EVERYTHING else f"k = {k}"] = out
    for name, cache in caches.items():
        options = {} if cache is None else {"model.teacher_cache": cache}
        rows[name] = {"kl": []}
        for seed in range(args.seeds):
            work_dir = base / f"stage3_{'online' if cache is None else cache.name}_{seed}"
            train(f"{PROJECT}/stage3_linear", work_dir, args.iterations[2], options, seed)
            rows[name]["kl"].append(held_out(work_dir)[-1]["kl"])
        if cache is not None:
            rows[name]["bytes"] = bytes_per_token(cache)
    for name, seconds in step_seconds(caches, base / "stage2", args.turns).items():
        rows[name]["seconds"] = seconds
    print_table(rows)
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(rows)}))


def bytes_per_token(cache):
    """float: Bytes on disk per supervised token, all included."""
    size = sum(path.stat().st_size for path in cache.iterdir())
    return size / json.loads((cache / "teacher_cache.json").read_text())["rows"]


def step_seconds(caches, stage2, turns):
    """dict[str, float]: Median CPU seconds of a training step with each cache, without the optimizer."""
    from mmengine.runner import Runner
    from xtuner.registry import BUILDER

    from xtuner_ext.cli.config_options import load_config
    from xtuner_ext.distill.stages import find_previous_checkpoint

    config = load_config(str(project_file(f"{PROJECT}/stage3_linear")))
    config.model.pretrained_pth = find_previous_checkpoint(str(stage2.parent / "stage3"), "stage2")
    # The digest of the teacher's weights is taken where a cache is named.
    config.model.teacher_cache = str(next(cache for cache in caches.values() if cache is not None))
    model = BUILDER.build(config.model).train()
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=0))
    timed = {name: [] for name in caches}
    for _ in range(turns):
        batch = next(batches)
        for name, cache in caches.items():
            # What is read of a cache once is not part of a step.
            vars(model).pop("_cache", None)
            model.teacher_cache = None if cache is None else str(cache)
            if cache is not None:
                model.check_data(config_dataset(batches))
            model.zero_grad()
            begun = time.process_time()
            model(**batch)["loss"].backward()
            timed[name].append(time.process_time() - begun)
    return {name: statistics.median(values) for name, values in timed.items()}


def config_dataset(batches):
    """Dataset: The one that a dataloader's iterator reads."""
    return batches._dataset


def print_table(rows):
    """Print one Markdown row per cache."""
    first = rows[ONLINE]
    print("| stage 3 with | bytes a supervised token | step, CPU seconds | of the first | held-out KL | of the first |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        size = f"{row['bytes']:,.0f}" if "bytes" in row else ""
        times, kl = row["seconds"] / first["seconds"], statistics.mean(row["kl"])
        spread = f" ± {statistics.stdev(row['kl']):.4f}" if len(row["kl"]) > 1 else ""
        ratio = kl / statistics.mean(first["kl"])
        print(f"| {name} | {size} | {row['seconds']:.3f} | {times:.2f} | {kl:.4f}{spread} | {ratio:.2f} |")
    print(f"\ndigits, linear student, {len(first['kl'])} seeds; {machine()}")


def claims(rows):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    first, found = rows[ONLINE], []
    for name, row in rows.items():
        if name == ONLINE:
            continue
        seconds = row["seconds"] / first["seconds"]
        found.append((f"seconds of a step, {name}, over the teacher running", seconds, STEP_BAR))
        if name != "k = 8":
            kl = statistics.mean(row["kl"]) / statistics.mean(first["kl"])
            found.append((f"held-out KL after training, {name}, over the teacher running", kl, KL_BAR))
    return [{"name": name, "value": value, "bar": bar, "holds": value <= bar} for name, value, bar in found]


if __name__ == "__main__":
    main()
