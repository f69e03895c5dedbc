"""xtuner-ext pipeline FOLDER: every stage of a project, from data to scores, taken up where it stopped.

A project folder holds ``stage1.py``, ``stage2.py`` and one ``stage3_NAME.py`` per student. Each step leaves
a folder of its own under ``work_dirs`` and is skipped when that is complete. Of several machines, each runs the same
command with NNODES, NODE_RANK, MASTER_ADDR and PORT set; all of them train, the first one does the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ..data.meta import read_meta
from ..errors import UserError
from . import configs_dir
from .config_options import load_config

CACHE_LENGTHS = ("1024", "65536")
SHARED_TIMEOUT = 600  # seconds until a file of the first machine must be seen by the others
SELECTION_TIMEOUT = 3600  # seconds that the others wait for the first machine to choose layers


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext pipeline",
        description="Run stages 1 to 3 of a project, convert every student and score it beside its teacher.",
        epilog="example: xtuner-ext pipeline projects/mmmamba/digits --nproc 1",
    )
    parser.add_argument("project", help="folder with stage1.py, stage2.py and stage3_*.py")
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    parser.add_argument("--work-dir", help="folder for everything (default: the one the configs name)")
    parser.add_argument("--deepspeed", help="passed to every stage")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="passed to every stage"
    )
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status of the first step that failed, or 0.
    """
    args = parse_args(argv)
    if args.nproc < 1:
        raise UserError(f"--nproc is {args.nproc}, expected at least 1")
    stages = find_stages(args.project)
    configs = {stage: load_config(str(path), args.cfg_options) for stage, path in stages.items()}
    if configs["stage1"].get("prepare_data") is None:
        # Days of training should not end at a missing file.
        read_meta(configs["stage1"].eval_data)
    base = Path(args.work_dir or Path(configs["stage1"].work_dir).parent)
    first_machine = _number("NODE_RANK", 0) == 0
    if not first_machine:
        wait_until((base / "pipeline.json").is_file, SHARED_TIMEOUT, f"{base}/pipeline.json of the first machine")
    remember_options(base / "pipeline.json", args)
    for number, (stage, path) in enumerate(stages.items()):
        options = list(args.cfg_options)
        layers = configs[stage].model.get("attention_layers")
        if configs[stage].get("layer_selection") and isinstance(layers, str):
            selection = base / Path(layers).name
            options.append(f"model.attention_layers={selection}")
            configs[stage].model.attention_layers = str(selection)
            if first_machine:
                choose_layers(path, args.cfg_options, base / "stage2", selection)
            else:
                wait_until(lambda: is_chosen(selection, base / "stage2"), SELECTION_TIMEOUT, selection)
        if finished(base / stage, configs[stage].train_cfg.max_iters):
            say(f"{stage}: done before")
            continue
        say(f"{stage}: {path}")
        status = train(path, base / stage, args, options, number)
        if status:
            say(f"{stage} ended with status {status}")
            return status
    if not first_machine:
        return 0
    students = {stage.removeprefix("stage3_"): stage for stage in stages if stage.startswith("stage3_")}
    for name, stage in students.items():
        convert(configs[stage], base / stage, base / f"export_{name}")
    first = configs[next(iter(students.values()))]
    metrics = score(first, base, students)
    path = base / "metrics.json"
    from ..compat import replace_file

    replace_file(str(path), json.dumps(metrics, indent=2).encode())
    print_table(metrics)
    say(f"written to {path}")
    return 0


def remember_options(path, args):
    """Note what a folder is made with, and refuse to go on in it with anything else.

    Args:
        path (Path): Where the note lies.
        args (argparse.Namespace): ``project`` and ``cfg_options``.

    Raises:
        UserError: When an earlier run's finished stages came from other options.
    """
    options = {"project": Path(args.project).name, "cfg_options": sorted(args.cfg_options)}
    if path.is_file():
        found = json.loads(path.read_text())
        if found != options:
            raise UserError(
                f"{path.parent} holds a pipeline of {json.dumps(found)}, this one is {json.dumps(options)}: "
                f"choose another --work-dir or remove that folder"
            )
        return
    from ..compat import replace_file

    replace_file(path, json.dumps(options).encode())


def find_stages(project):
    """Find a project's stage configs.

    Args:
        project (str): Folder, relative to here or to the repository, or below ``projects``.

    Returns:
        dict[str, Path]: Stage name to config, in order of training.

    Raises:
        UserError: When the folder or a stage is missing.
    """
    candidates = (Path(project), configs_dir().parent / project, configs_dir() / project)
    folder = next((path.resolve() for path in candidates if path.is_dir()), None)
    if folder is None:
        raise UserError(f"project folder {project} does not exist")
    stages = {path.stem: path for path in (folder / "stage1.py", folder / "stage2.py")}
    stages.update({path.stem: path for path in sorted(folder.glob("stage3_*.py"), reverse=True)})
    for path in stages.values():
        if not path.is_file():
            raise UserError(f"project folder {folder} has no {path.name}")
    if len(stages) == 2:
        raise UserError(f"project folder {folder} has no stage3_*.py, expected one per student")
    return stages


def finished(work_dir, max_iters):
    """bool: Whether a stage's last checkpoint is that of its last iteration."""
    pointer = work_dir / "last_checkpoint"
    if not pointer.is_file():
        return False
    name = Path(pointer.read_text().strip()).name
    return name == f"iter_{max_iters}.pth" and (work_dir / name).exists()


def choose_layers(path, options, work_dir, out):
    """Choose the layers that keep attention, as a config's ``layer_selection`` asks, unless that was done.

    Args:
        path (Path): Config with ``layer_selection``, keyword arguments of :func:`select_for_config`.
        options (list[str]): ``KEY=VALUE`` changes of the config.
        work_dir (Path): Folder of stage 2.
        out (Path): JSON file to write.
    """
    from ..distill.stages import find_previous_checkpoint
    from .select_layers import select_for_config

    if is_chosen(out, work_dir):
        return
    config = load_config(str(path), options)
    say(f"choosing layers -> {out}")
    select_for_config(config, find_previous_checkpoint(out, work_dir.name), out=str(out), **config.layer_selection)


def is_chosen(out, work_dir):
    """bool: Whether the file of chosen layers is newer than the checkpoint of stage 2 in ``work_dir``."""
    from ..distill.stages import find_previous_checkpoint

    checkpoint = find_previous_checkpoint(out, work_dir.name)
    return out.is_file() and out.stat().st_mtime >= os.stat(checkpoint).st_mtime


def wait_until(there, timeout, what):
    """Wait for a file that the first machine writes.

    Args:
        there (callable): Whether it is there.
        timeout (float): Seconds.
        what (object): Its name, for the message.

    Raises:
        UserError: When it does not come.
    """
    deadline = time.monotonic() + timeout
    while not there():
        if time.monotonic() > deadline:
            raise UserError(f"{what} did not appear within {timeout} s: all machines must see the same --work-dir")
        time.sleep(0.2)


def train(config, work_dir, args, options, number):
    """Run one stage in processes of its own.

    Args:
        config (Path): The stage's config.
        work_dir (Path): Its folder.
        args (argparse.Namespace): ``nproc`` and ``deepspeed``.
        options (list[str]): ``KEY=VALUE`` changes of the config.
        number (int): Which of the stages it is, from 0.

    Returns:
        int: Exit status.
    """
    command = ["-m", "xtuner_ext.cli", "train", str(config), "--work-dir", str(work_dir), "--resume", "auto"]
    if args.deepspeed:
        command += ["--deepspeed", args.deepspeed]
    if options:
        command += ["--cfg-options", *options]
    environment = {**os.environ, "NPROC_PER_NODE": str(args.nproc)}
    if environment.get("PORT"):
        # One machine may begin a stage while another still closes the connections of the last.
        environment["PORT"] = str(_number("PORT", 0) + number)
    if args.nproc > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.call([sys.executable, *command], env=environment)


def _number(variable, default):
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise UserError(f"{variable} is {value}, a number is expected")
    return int(value)


def convert(config, work_dir, out):
    """Write a stage's last checkpoint as a model folder, unless that was done from the same checkpoint."""
    from ..distill.stages import find_previous_checkpoint
    from .convert import pth_to_hf

    checkpoint = find_previous_checkpoint(out, work_dir.name)
    stamp = out / "source.json"
    source = {"checkpoint": checkpoint, "modified": os.stat(checkpoint).st_mtime_ns}
    if stamp.is_file() and json.loads(stamp.read_text()) == source:
        say(f"{out}: done before")
        return
    say(f"{checkpoint} -> {out}")
    pth_to_hf(config, checkpoint, str(out))
    stamp.write_text(json.dumps(source))


def score(config, base, students):
    """Score the teacher and every student, unless that was done with the same weights.

    Args:
        config (Config): Of one stage; names teacher, questions and template.
        base (Path): Folder with ``export_NAME``; scores go to ``scores_NAME``.
        students (dict[str, str]): Student name to stage.

    Returns:
        dict: ``teacher`` and each student with ``accuracy``, ``parameters`` and ``cache_bytes``; students
        also with ``kept``, their share of the teacher's accuracy.
    """
    from ..data.dataset import samples_config
    from .eval import evaluate_folder

    models = {"teacher": config.model.llm["pretrained_model_name_or_path"]}
    models.update({name: str(base / f"export_{name}") for name in students})
    metrics = {}
    for name, model in models.items():
        out = base / f"scores_{name}"
        found = earlier_scores(out / "metrics.json", model, config.eval_data)
        if found is None:
            trust = bool(samples_config(config.train_dataloader.dataset).processor.get("trust_remote_code"))
            found = evaluate_folder(
                model, config.eval_data, str(out), prompt_template=config.template, trust_remote_code=trust
            )
        else:
            say(f"{out}: done before")
        metrics[name] = {key: found[key] for key in ("accuracy", "count", "by_category", "parameters", "cache_bytes")}
    for name in students:
        metrics[name]["kept"] = metrics[name]["accuracy"] / max(metrics["teacher"]["accuracy"], 1e-9)
    return metrics


def earlier_scores(path, model, data):
    """Scores of an earlier run, when they are of the same model folder, not written since, and the same data.

    Args:
        path (Path): ``metrics.json``.
        model (str): Model folder.
        data (str): Meta JSON of the questions.

    Returns:
        dict | None: Its content.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    source = Path(model) / "source.json"
    if source.is_file() and source.stat().st_mtime_ns > path.stat().st_mtime_ns:
        return None
    return found if (found["model"], found["data"]) == (model, data) else None


def print_table(metrics):
    """Print one row per model."""
    from rich.table import Table

    from .console import console

    table = Table(title=f"{metrics['teacher']['count']} held-out questions")
    for column in ("model", "accuracy", "kept", "parameters", "cache at 1K", "cache at 64K"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in metrics.items():
        cache = (f"{row['cache_bytes'][length] / 1024:,.0f} KiB" for length in CACHE_LENGTHS)
        kept = f"{row['kept']:.1%}" if "kept" in row else ""
        table.add_row(name, f"{row['accuracy']:.1%}", kept, f"{row['parameters']:,}", *cache)
    console().print(table)


def say(text):
    """Tell the user which step runs."""
    sys.stderr.write(f"pipeline: {text}\n")
    sys.stderr.flush()
