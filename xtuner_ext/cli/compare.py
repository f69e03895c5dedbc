"""xtuner-ext compare TEACHER STUDENT ... --data META.json: how much of a teacher its students keep."""

import argparse
import json
import sys

from ..errors import UserError


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext compare",
        description="Compare students with the first model, token by token, on held-out samples.",
        epilog="example: xtuner-ext compare digits-teacher work_dirs/digits/export_linear "
        "--data work_dirs/digits/data/test.json",
    )
    parser.add_argument("models", nargs="+", metavar="DIR", help="the teacher, then one or more students")
    parser.add_argument("--data", required=True, help="meta JSON of the samples")
    parser.add_argument("--prompt-template", help="conversation template (default: the teacher's own)")
    parser.add_argument("--limit", type=int, help="samples, and questions, spread over the data (default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=8192, help="longest sample in tokens")
    parser.add_argument("--accuracy", action="store_true", help="also answer the questions and score exact matches")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens, with --accuracy")
    parser.add_argument("--torch-dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's own tokenizer code")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    if len(args.models) < 2:
        raise UserError(f"compare got {len(args.models)} model, expected a teacher and at least one student")
    for name in ("batch_size", "limit", "max_length", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    result = compare_folders(args)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        print_tables(result)
    return 0


def compare_folders(args):
    """Load and compare, one student at a time.

    Args:
        args (argparse.Namespace): See :func:`parse_args`.

    Returns:
        dict: ``teacher``, ``data``, ``versions`` and, under ``students``, each folder's measures.

    Raises:
        UserError: For folders or data that do not load or do not fit together.
    """
    from ..convert.teacher import read_model_config, resolve_folder
    from ..data.dataset import ConversationDataset
    from ..evaluation.comparison import check_comparable, compare
    from ..evaluation.runner import answer, read_questions
    from ..evaluation.scorers import score_rows
    from .loading import choose_template, count_parameters, load_model
    from .progress import progress
    from .versions import installed_versions

    first, *others = args.models
    configs = {name: read_model_config(resolve_folder(name))[1] for name in args.models}
    for name in others:
        check_comparable(configs[first], configs[name], name)
    teacher, processor = load_model(first, args.torch_dtype, trust_remote_code=args.trust_remote_code)
    template_name, template = choose_template(args.prompt_template, teacher, processor, first)
    dataset = ConversationDataset(args.data, processor, template_name, max_length=args.max_length)

    def accuracy(name, model):
        questions = read_questions(args.data)
        count = min(args.limit or len(questions), len(questions))
        questions = [questions[index * len(questions) // count] for index in range(count)]
        with progress(f"answer {name}", len(questions)) as advance:
            rows = answer(model, processor, template, questions, args.batch_size, args.max_new_tokens, advance)
        return score_rows(rows)

    def size(model):
        return {
            "parameters": count_parameters(model),
            "cache_bytes": {str(length): model.config.cache_bytes(length) for length in (1024, 65536)},
            **({"accuracy": accuracy(first, model)} if args.accuracy else {}),
        }

    result = {"data": args.data, "teacher": {"model": first, **size(teacher)}, "students": []}
    for name in others:
        student, _ = load_model(name, args.torch_dtype, trust_remote_code=args.trust_remote_code)
        count = min(args.limit or len(dataset), len(dataset))
        with progress(f"compare {name}", count) as advance:
            measures = compare(teacher, student, dataset, args.batch_size, args.limit, advance)
        result["students"].append(
            {"model": name, **measures, **size(student), "layer_types": student.config.layer_types}
        )
        del student
    result["settings"] = {"template": template_name, "dtype": str(teacher.dtype), "limit": args.limit}
    result["versions"] = installed_versions()
    return result


def print_tables(result):
    """Print one row per model, and the students' measures by category where there are several."""
    from rich.table import Table

    from .console import console

    out, students = console(), result["students"]
    table = Table(title=f"{result['data']}: {students[0]['tokens']:,} supervised tokens")
    scored = "accuracy" in result["teacher"]
    aligned = all(student["alignment"] for student in students)
    seeing = aligned and any(student["alignment"]["image"] is not None for student in students)
    columns = ["model", "KL", "same first word", "perplexity"]
    columns += ["error, text"] * aligned + ["error, images"] * seeing + ["accuracy"] * scored
    for column in [*columns, "parameters", "cache at 64K"]:
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")

    def tail(row):
        accuracy = [f"{row['accuracy']['accuracy']:.1%}"] if scored else []
        return [*accuracy, f"{row['parameters']:,}", f"{row['cache_bytes']['65536'] / 1024:,.0f} KiB"]

    blanks = [""] * (aligned + seeing)
    teacher = result["teacher"]
    table.add_row(teacher["model"], "", "", f"{students[0]['teacher_perplexity']:.2f}", *blanks, *tail(teacher))
    for row in students:
        errors = [f"{row['alignment'][kind]:.3f}" for kind in ("text", "image")[: aligned + seeing]]
        table.add_row(row["model"], f"{row['kl']:.4f}", f"{row['agreement']:.1%}", f"{row['perplexity']:.2f}", *errors, *tail(row))
    out.print(table)
    for row in students:
        if len(row["by_category"]) > 1:
            out.print(_category_table(row, scored))


def _category_table(row, scored):
    from rich.table import Table

    table = Table(title=row["model"])
    for column in ["category", "KL", "same first word", "perplexity", "teacher's", "tokens"] + ["accuracy"] * scored:
        table.add_column(column, justify="left" if column == "category" else "right")
    for name, part in row["by_category"].items():
        cells = [f"{part['kl']:.4f}", f"{part['agreement']:.1%}", f"{part['perplexity']:.2f}"]
        cells += [f"{part['teacher_perplexity']:.2f}", f"{part['tokens']:,}"]
        if scored and name in row["accuracy"]["by_category"]:
            cells.append(f"{row['accuracy']['by_category'][name]['accuracy']:.1%}")
        table.add_row(name, *cells)
    return table
