"""xtuner-ext train CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--cfg-options KEY=VALUE ...]"""

import argparse
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

from xtuner_ext import autoload
from xtuner_ext.cli.allocator import keep_freed_memory
from xtuner_ext.cli.config_options import find_config, load_config
from xtuner_ext.cli.versions import check_versions
from xtuner_ext.errors import UserError

logger = logging.getLogger(__name__)


def parse_args(argv):
    """Parses the options of the stock train tool, with an optional value for `--resume`."""
    parser = argparse.ArgumentParser(prog="xtuner-ext train", description="Train or distil with a config.")
    parser.add_argument("config", help="config file, or a name that `xtuner list-cfg` prints")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints (default: ./work_dirs/CONFIG)")
    parser.add_argument("--deepspeed", help="DeepSpeed json, or the name of one that xtuner ships")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="checkpoint to go on from; without a value or with `auto`, the last one of the work "
        "dir, or the beginning if it has none",
    )
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that replace those of the config, e.g. train_cfg.max_iters=100",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    return parser.parse_args(argv)


def main(argv):
    """Checks the command against the config, prepares the data and lets XTuner train.

    Args:
        argv (list[str]): The arguments after the verb.
    """
    autoload.install()
    args = parse_args(argv)
    check_versions()
    config_path = find_config(args.config)
    config = load_config(config_path, args.cfg_options)
    work_dir = args.work_dir or config.get("work_dir") or os.path.join("./work_dirs", Path(config_path).stem)
    if args.deepspeed:
        _check_deepspeed(args.deepspeed, config)
    # XTuner sets the folder itself and does not know our key.
    config.work_dir = work_dir
    previous = previous_checkpoint(config)
    checkpoint = find_checkpoint("auto" if args.resume is None and config.get("resume") else args.resume, work_dir)
    from xtuner_ext.finetune.batch import derived_options, process_count

    derived = derived_options(config, process_count(args.launcher))
    prepare_data(config)

    stock = [config_path, "--work-dir", work_dir]
    stock += ["--launcher", args.launcher, "--local_rank", str(args.local_rank)]
    if args.deepspeed:
        stock += ["--deepspeed", args.deepspeed]
    if checkpoint:
        stock += ["--resume", checkpoint]
    if args.seed is not None:
        stock += ["--seed", str(args.seed)]
    if previous:
        derived["model.pretrained_pth"] = previous
    options = [*args.cfg_options, *(f"{key}={value}" for key, value in derived.items())]
    if options:
        stock += ["--cfg-options", *options]
    run_stock_train(stock)


def previous_checkpoint(config):
    """Returns the checkpoint of the stage that the config names as its `previous_stage`.

    Args:
        config (mmengine.config.Config): With `work_dir` set.

    Returns:
        str | None: Its path; None where the config has no earlier stage or gives `model.pretrained_pth`.
    """
    if not config.get("previous_stage") or config.model.get("pretrained_pth"):
        return None
    from xtuner_ext.distill.stages import find_previous_checkpoint

    return find_previous_checkpoint(work_dir=config.work_dir, previous_stage=config.previous_stage)


def find_checkpoint(resume, work_dir):
    """Returns the checkpoint to go on from, or None to begin at the beginning.

    Args:
        resume (str | None): A path, `auto` for the last one of `work_dir`, or None.
        work_dir (str): Folder of the run.
    """
    if resume is None:
        return None
    if resume == "auto":
        from mmengine.runner.checkpoint import find_latest_checkpoint

        return find_latest_checkpoint(work_dir)
    if not os.path.exists(resume):
        raise UserError(f"--resume {resume} does not exist, a checkpoint is expected")
    return resume


def prepare_data(config):
    """Calls the config's `prepare_data`, in one process at a time.

    Args:
        config (mmengine.config.Config): May hold `prepare_data = dict(type=function, **kwargs)`, or a list of
            such steps. Each function must be repeatable: it returns at once when its result is there. If there are
            several processes it needs an argument `out`, the file or folder that it makes.
    """
    steps = config.get("prepare_data") or []
    for step in steps if isinstance(steps, list) else [steps]:
        _prepare(step)


def _prepare(step):
    # Reading the items one by one makes ConfigDict import what a lazy config names.
    arguments = {key: step[key] for key in step}
    function = arguments.pop("type")
    if isinstance(function, str):
        from mmengine.utils import get_object_from_string

        name, function = function, get_object_from_string(function)
        if function is None:
            raise UserError(f"prepare_data.type: {name} was found, the dotted name of a function is expected")
    if "out" in arguments:
        # The first to come makes it, of one machine or of several with a common folder; the others find it made.
        with _alone(Path(arguments["out"])):
            function(**arguments)
    elif int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0:
        function(**arguments)


@contextlib.contextmanager
def _alone(path):
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_name(f".{path.name}.lock"), "w"))
            # Released by the system also when this process is killed.
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Finished data may lie in a read-only folder. Else several may do the work; the first result to be
            # complete is kept.
            logger.warning("%s lies where files cannot be locked (%s)", path, error)
        yield


def run_stock_train(arguments):
    """Runs `xtuner train` in this process and ends its process group.

    Args:
        arguments (list[str]): The command line as the stock tool reads it.
    """
    import torch
    from xtuner.tools.train import main as stock_main

    if not torch.cuda.is_available():
        keep_freed_memory()
    saved, sys.argv = sys.argv, ["xtuner-ext train", *arguments]
    try:
        stock_main()
    finally:
        sys.argv = saved
    # Only after success: with another process gone, leaving the group in good order could wait for ever.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Together: gloo aborts a process whose peer has already gone.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _check_deepspeed(name, config):
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"--deepspeed {name} needs the package deepspeed, which is not installed; "
            f"run: {sys.executable} -m pip install deepspeed"
        )
    from xtuner.configs import cfgs_name_path

    if not os.path.isfile(name) and name not in cfgs_name_path:
        known = ", ".join(sorted(key for key in cfgs_name_path if key.startswith("deepspeed_")))
        raise UserError(f"--deepspeed {name} is neither a file nor one of {known}")
    path = Path(name if os.path.isfile(name) else cfgs_name_path[name])
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"--deepspeed {path} is not a DeepSpeed configuration in JSON: {error}") from error
    if zero == 3 and config.model.get("stage") in (1, 2):
        raise UserError(
            f"--deepspeed {name} is ZeRO-3, which takes a layer's weights away as soon as it has run, while stage "
            f"{config.model.stage} back-propagates each layer's loss at once: take deepspeed_zero2 before stage 3"
        )


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(entry=main))
