"""Training runs of the benchmarks: real configs through the command line, each finished stage kept and reused."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def schedule(iterations):
    """Config changes that fit a stage's schedule to a number of iterations.

    Args:
        iterations (int): Iterations of the stage.

    Returns:
        dict: ``KEY: VALUE`` for ``--cfg-options``; warm-up over a tenth, then flat, then cosine from a third on.
    """
    # MMEngine's LinearLR would stay at its first value if it had one iteration.
    warm, decay = max(2, iterations // 10), max(2, iterations // 3)
    return {
        "train_cfg.max_iters": iterations,
        "param_scheduler.0.end": warm,
        "param_scheduler.1.begin": decay,
        "param_scheduler.1.end": iterations,
    }


def train(config, work_dir, iterations, options=None, seed=0):
    """Run one stage, unless it was run before with the same resolved config, from the same earlier stage.

    Args:
        config (str): Path below ``projects``, without suffix.
        work_dir (Path): The stage's folder; the stage before lies beside it.
        iterations (int): Iterations.
        options (dict, optional): Config changes.
        seed (int): Of the data order, and of new weights.

    Raises:
        SystemExit: When training fails, with its last words.
    """
    values = {**schedule(iterations), "model.seed": seed, "default_hooks.checkpoint.interval": iterations, **(options or {})}
    run_of = {"config": config, "seed": seed, **{key: str(value) for key, value in values.items()}}
    note = work_dir / "options.json"
    wanted = json.dumps({**run_of, "fingerprint": fingerprint(config, values, work_dir)}, sort_keys=True)
    if note.is_file() and note.read_text() == wanted and (work_dir / f"iter_{iterations}.pth").is_file():
        return
    run("train", project_file(config), "--work-dir", work_dir, "--seed", seed, "--cfg-options", *_pairs(values))
    note.write_text(wanted)


def fingerprint(config, values, work_dir):
    """str: Digest of a config with all that it inherits, after changes, and of what the stage before it was made from.

    Args:
        config (str): Path below ``projects``, without suffix.
        values (dict): Config changes.
        work_dir (Path): The stage's folder.
    """
    from xtuner_ext.cli.config_options import load_config

    resolved = load_config(str(project_file(config)), _pairs(values))
    before = work_dir.parent / str(resolved.get("previous_stage")) / "options.json"
    earlier = before.read_text() if before.is_file() else ""
    return hashlib.sha256((resolved.pretty_text + earlier).encode()).hexdigest()[:16]


def select_layers(config, checkpoint, keep, out):
    """list[int]: The layers that ``xtuner-ext select-layers`` chooses, unless it chose them before."""
    if not out.is_file():
        run("select-layers", project_file(config), checkpoint, "--keep", keep, "--out", out, "--batch-size", 4, "--limit", 4)
    return json.loads(out.read_text())["attention_layers"]


def project_file(config):
    """Path: A config's file."""
    return REPOSITORY / "projects" / f"{config}.py"


def run(*arguments):
    """Run a verb of ``xtuner-ext`` in a process of its own.

    Raises:
        SystemExit: When it fails, with its last words.
    """
    command = [sys.executable, "-m", "xtuner_ext.cli", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stderr[-3000:]}")


def collect(pool, runs):
    """Wait for trainings.

    Args:
        pool (Executor): Runs them.
        runs (Iterable[Future]): All of them.

    Raises:
        SystemExit: That of the first that failed; those that have not begun are left out.
    """
    done = wait(runs, return_when=FIRST_EXCEPTION).done
    if failed := [run for run in done if run.exception() is not None]:
        pool.shutdown(wait=False, cancel_futures=True)
        raise failed[0].exception()


def _pairs(values):
    return [f"{key}={value}" for key, value in values.items()]


def held_out(work_dir):
    """list[dict]: What a stage measured on held-out samples, in order of its tokens."""
    return [json.loads(line) for line in (work_dir / "held_out.jsonl").read_text().splitlines()]


def machine():
    """str: Processor, threads and torch, for the line under a table."""
    import platform

    import torch

    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    what = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{names[0] if names else platform.processor()}"
    return f"{what}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"
