"""xtuner-ext eval DIR --data META.json --out DIR2: score a model on annotated questions or a benchmark."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

from ..errors import UserError
from .data_check import frame_settings

SCORE_FILES = {"rows.jsonl", "metrics.json", "submission.json", "submission.jsonl", "submission.xlsx"}
LIST = "list"


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext eval",
        description="Answer questions greedily and score the answers: annotated questions by exact match, a "
        "benchmark's as its official program does (reference) and sanely (robust). Repeating a command that was killed "
        "asks only what was not answered. NPROC_PER_NODE=2 in front shares the questions among two processes.",
        epilog="examples: xtuner-ext eval work_dirs/digits/export_linear --data work_dirs/digits/data/test.json "
        "--out work_dirs/digits/scores_linear; xtuner-ext eval DIR --bench pope --data data/pope --out scores_pope; "
        "xtuner-ext eval --compare scores_teacher scores_linear",
    )
    parser.add_argument("model", nargs="?", help="model folder, or the name of a shipped model")
    parser.add_argument("--data", help="meta JSON of the questions; with --bench the folder of its files, or a file")
    parser.add_argument("--out", help="folder for rows.jsonl, metrics.json and what a benchmark's server takes")
    parser.add_argument("--bench", metavar="NAME", help=f"benchmark; {LIST} lists them with their files")
    parser.add_argument("--split", help="split of the benchmark (default: its first)")
    parser.add_argument("--mode", choices=("reference", "robust", "both"), help="scorers of the benchmark (both)")
    parser.add_argument("--rows", metavar="FILE", help="score these answers to the benchmark, without a model")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="set folders of scores against the first of them")
    parser.add_argument("--prompt-template", help="conversation template (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: 32, or the benchmark's)")
    parser.add_argument("--max-tiles", type=int, help="tiles an image (default: the data's, or the benchmark's)")
    parser.add_argument("--limit", type=int, help="only so many questions, the first ones without --seed")
    parser.add_argument("--seed", type=int, help="draws the questions of --limit, and the resamples of --compare")
    parser.add_argument(
        "--frames", nargs="+", default=[], metavar="KEY=VALUE",
        help="how videos are shown, such as min_frames=8 max_frames=16 (default: 32 frames)",
    )
    parser.add_argument("--torch-dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's own tokenizer code")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    if not args.model and int(os.environ.get("RANK", 0)):
        return 0  # what needs no model is not shared
    for name in ("batch_size", "max_new_tokens", "max_tiles", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if args.compare:
        from .eval_tables import compare_folders

        return compare_folders(args)
    if args.bench == LIST:
        from .eval_tables import list_benchmarks

        return list_benchmarks()
    _check_words(args)
    from ..evaluation.tasks import BOTH, BenchmarkTask, MetaTask

    if args.bench:
        task = BenchmarkTask(args.bench, args.data, args.split, args.mode or BOTH, args.limit, args.seed)
    else:
        task = MetaTask(args.data, args.limit, args.seed)
    if args.rows:
        metrics = score_answers(task, args.rows, args.out)
    else:
        metrics = evaluate_folder(
            args.model, args.data, args.out, args.prompt_template, args.batch_size, args.max_new_tokens, args.limit,
            args.torch_dtype, args.trust_remote_code, frame_settings(["sampling=middle", *args.frames]), args.seed,
            args.max_tiles, task,
        )
    if metrics is None:
        return 0
    if args.json:
        sys.stdout.write(json.dumps(metrics, indent=2) + "\n")
    else:
        from .eval_tables import print_scores

        print_scores(metrics)
    return 0


def _check_words(args):
    from ..evaluation import benchmarks

    if args.bench:
        benchmarks.get(args.bench)
    else:
        for name in ("split", "mode", "rows"):
            if getattr(args, name):
                raise UserError(f"--{name} is given without --bench, expected the name of a benchmark as well")
    if args.rows and (args.model or args.limit):
        raise UserError(f"--rows is given with {'--limit' if args.limit else 'a model'}, expected the answers alone")
    for name in ("data",) if args.rows else ("model", "data", "out"):
        if not getattr(args, name):
            raise UserError(f"eval has no {'model folder' if name == 'model' else f'--{name}'}; --help has examples")


def evaluate_folder(
    model, data, out, prompt_template=None, batch_size=64, max_new_tokens=None, limit=None, dtype="auto",
    trust_remote_code=False, frames=None, seed=None, max_tiles=None, task=None,
):
    """Score one model folder and write rows and metrics.

    Answers are kept in ``OUT.partial`` until all are there, so that a killed evaluation can go on.

    Args:
        model (str): Model folder, or the name of a shipped model.
        data (str): Meta JSON of the questions, or the benchmark's files.
        out (str): Folder for ``rows.jsonl`` and ``metrics.json``; all of it appears whole.
        prompt_template (str, optional): Conversation template; the model's own when absent.
        batch_size (int): Questions per batch.
        max_new_tokens (int, optional): Longest answer in tokens; 32, or the benchmark's, when absent.
        limit (int, optional): How many questions are asked.
        dtype (str): See :func:`load_model`.
        trust_remote_code (bool): Run the folder's own tokenizer code.
        frames (FrameSampling, optional): How videos are shown; 32 frames from the middle of equal parts when absent.
        seed (int, optional): Draws the questions of ``limit``; they are the first ones when absent.
        max_tiles (int, optional): Tiles an image; as the data or the benchmark says when absent.
        task (MetaTask | BenchmarkTask, optional): What is asked; the meta file's questions when absent.

    Returns:
        dict | None: Content of ``metrics.json``; None in all processes but the first.

    Raises:
        UserError: For missing or broken files, images for a text model, a folder that holds other files, or answers in
            ``OUT.partial`` of another evaluation.
    """
    from ..convert.teacher import resolve_folder
    from ..data.video import FrameSampling
    from ..evaluation.processes import processes
    from ..evaluation.resume import Partial, answer_all
    from ..evaluation.runner import Batches
    from ..evaluation.tasks import MetaTask, digest, digest_folder
    from .loading import choose_template, count_parameters, load_model
    from .progress import progress
    from .versions import installed_versions

    _check_replaceable(Path(out))
    task = task or MetaTask(data, limit, seed)
    with processes() as shared:
        network, processor = load_model(model, dtype, trust_remote_code=trust_remote_code)
        seeing = (q["where"] for q in task.questions if q["images"] or q["video"] is not None)
        if network.config.vision is None and (with_image := next(seeing, None)):
            raise UserError(f"{model} has no image front end, but {with_image} asks about an image")
        name, template = choose_template(prompt_template, network, processor, model)
        frames = frames or FrameSampling(sampling="middle")
        task.limit_tiles(processor, max_tiles)
        lengths = {**task.settings, **({"max_new_tokens": max_new_tokens} if max_new_tokens else {})}
        lengths = {key: value for key, value in lengths.items() if key != "max_tiles"}
        batches = Batches(network, processor, template, task.questions, batch_size, frames=frames, **lengths)
        tiles = sorted({question["max_tiles"] or processor.max_tiles for question in task.questions})
        settings = {
            "template": name,
            "decoding": "greedy",
            **lengths,
            "batch_size": batch_size,
            **({"max_tiles": tiles[-1]} if task.facts or max_tiles else {}),
            **({"frames": dataclasses.asdict(frames)} if any(q["video"] is not None for q in task.questions) else {}),
            "dtype": str(network.dtype),
            "scorer": task.scorer,
        }
        chosen = {"limit": limit, **({} if seed is None else {"seed": seed})} if limit else {}
        facts = {"model": str(model), "data": str(data), **task.facts, **chosen}
        versions = installed_versions()
        same = {"limit": limit, "seed": seed, **facts, **settings, **versions, "device": network.device.type}
        same |= {"model_files": digest_folder(resolve_folder(model)), "questions": digest(task.questions)}
        partial = Partial(f"{Path(out)}.partial", shared.rank)
        bar = contextlib.nullcontext() if shared.rank else progress(f"eval {Path(model).name}", len(task.questions))
        with bar as advance:
            predictions = answer_all(batches, partial, same, shared, advance)
    if predictions is None:
        return None
    rows, scores = task.score(batches.rows(predictions))
    metrics = {
        **scores,
        **facts,
        "parameters": count_parameters(network),
        "cache_bytes": {str(length): network.config.cache_bytes(length) for length in (1024, 65536)},
        "layer_types": network.config.layer_types,
        # What an evaluation is of, word by word; the others' are in their rows.
        "first_prompt": rows[0]["prompt"],
        "settings": settings,
        "versions": versions,
    }
    _write(out, task, rows, metrics)
    shutil.rmtree(partial.folder)
    return metrics


def score_answers(task, file, out=None):
    """Score answers that are there already.

    Args:
        task (BenchmarkTask): What they answer.
        file (str): JSONL of rows, see :func:`read_predictions`.
        out (str, optional): Folder for marked rows and metrics.

    Returns:
        dict: The metrics.

    Raises:
        UserError: For a broken file, or answers to other questions.
    """
    from ..evaluation.rows import read_predictions
    from .versions import installed_versions

    if out:
        _check_replaceable(Path(out))
    rows, scores = task.score(read_predictions(file, task.questions))
    metrics = {**scores, "rows": str(file), "data": str(task.data), **task.facts, "versions": installed_versions()}
    if out:
        _write(out, task, rows, metrics)
    return metrics


def _write(out, task, rows, metrics):
    from ..convert.checkpoint import whole_folder

    with whole_folder(out) as folder:
        task.write(folder, rows)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")


def _check_replaceable(out):
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder of scores or a new one")
    others = {path.name for path in out.iterdir()} - SCORE_FILES if out.is_dir() else ()
    if others:
        raise UserError(f"{out} holds {min(others)}, expected a folder of scores or a new one")


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(entry=main))
