"""xtuner-ext eval DIR --data META.json --out DIR2: score a model on annotated questions."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..errors import UserError
from .data_check import frame_settings

SCORE_FILES = {"rows.jsonl", "metrics.json"}


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext eval",
        description="Answer annotated questions greedily and score the answers by exact match.",
        epilog="example: xtuner-ext eval work_dirs/digits/export_linear --data work_dirs/digits/data/test.json "
        "--out work_dirs/digits/scores_linear",
    )
    parser.add_argument("model", help="model folder, or the name of a shipped model")
    parser.add_argument("--data", required=True, help="meta JSON of the questions")
    parser.add_argument("--out", required=True, help="folder for rows.jsonl and metrics.json")
    parser.add_argument("--prompt-template", help="conversation template (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only the first n questions")
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
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    metrics = evaluate_folder(
        args.model, args.data, args.out, args.prompt_template, args.batch_size, args.max_new_tokens, args.limit,
        args.torch_dtype, args.trust_remote_code, frame_settings(["sampling=middle", *args.frames]),
    )
    if args.json:
        sys.stdout.write(json.dumps(metrics, indent=2) + "\n")
    else:
        print_table(metrics)
    return 0


def evaluate_folder(
    model, data, out, prompt_template=None, batch_size=64, max_new_tokens=32, limit=None, dtype="auto",
    trust_remote_code=False, frames=None,
):
    """Score one model folder and write rows and metrics.

    Args:
        model (str): Model folder, or the name of a shipped model.
        data (str): Meta JSON of the questions.
        out (str): Folder for ``rows.jsonl`` and ``metrics.json``; both appear whole.
        prompt_template (str, optional): Conversation template; the model's own when absent.
        batch_size (int): Questions per batch.
        max_new_tokens (int): Longest answer in tokens.
        limit (int, optional): Only the first n questions.
        dtype (str): See :func:`load_model`.
        trust_remote_code (bool): Run the folder's own tokenizer code.
        frames (FrameSampling, optional): How videos are shown; 32 frames from the middle of equal parts when absent.

    Returns:
        dict: Content of ``metrics.json``.

    Raises:
        UserError: For missing or broken files, images for a text model, or a folder that holds other files.
    """
    from ..convert.checkpoint import whole_folder
    from ..data.video import FrameSampling
    from ..evaluation.runner import answer, read_questions
    from ..evaluation.scorers import score_rows
    from .loading import choose_template, count_parameters, load_model
    from .progress import progress
    from .versions import installed_versions

    _check_replaceable(Path(out))
    questions = read_questions(data, limit)
    network, processor = load_model(model, dtype, trust_remote_code=trust_remote_code)
    with_image = next((q["where"] for q in questions if q["images"] or q["video"] is not None), None)
    if with_image and network.config.vision is None:
        raise UserError(f"{model} has no image front end, but {with_image} asks about an image")
    name, template = choose_template(prompt_template, network, processor, model)
    frames = frames or FrameSampling(sampling="middle")
    with progress(f"eval {Path(model).name}", len(questions)) as advance:
        rows = answer(network, processor, template, questions, batch_size, max_new_tokens, advance, frames)
    metrics = {
        **score_rows(rows),
        "model": str(model),
        "data": str(data),
        "parameters": count_parameters(network),
        "cache_bytes": {str(length): network.config.cache_bytes(length) for length in (1024, 65536)},
        "layer_types": network.config.layer_types,
        "settings": {
            "template": name,
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            **({"frames": dataclasses.asdict(frames)} if any(q["video"] is not None for q in questions) else {}),
            "dtype": str(network.dtype),
            "scorer": "exact_match",
        },
        "versions": installed_versions(),
    }
    with whole_folder(out) as folder:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    return metrics


def _check_replaceable(out):
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder of scores or a new one")
    others = {path.name for path in out.iterdir()} - SCORE_FILES if out.is_dir() else ()
    if others:
        raise UserError(f"{out} holds {min(others)}, expected a folder of scores or a new one")


def print_table(metrics):
    """Print accuracy by category."""
    from rich.table import Table

    from .console import console

    table = Table(title=f"{metrics['model']} on {metrics['data']}")
    for column in ("category", "accuracy", "questions"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for name, score in metrics["by_category"].items():
        table.add_row(name, f"{score['accuracy']:.1%}", str(score["count"]))
    table.add_section()
    table.add_row("all", f"{metrics['accuracy']:.1%}", str(metrics["count"]))
    console().print(table)
