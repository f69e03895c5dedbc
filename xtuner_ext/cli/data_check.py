"""xtuner-ext data check META.json: what training would lose, and how long samples are."""

import argparse
import contextlib
import json
from itertools import islice

# Bad lines of one reason and dataset that the table names; the JSON report has them all.
EXAMPLES = 3


def add_parser(verbs):
    """Add the verb.

    Args:
        verbs (argparse._SubParsersAction): Verbs of ``xtuner-ext data``.
    """
    parser = verbs.add_parser(
        "check",
        help="what training would lose, and how long samples are",
        description="Check every line, path, placeholder and header of the datasets that a meta JSON names; with a "
        "model also its template, and the exact lengths of all samples in tokens. Images are decoded only where the "
        "end of the file does not tell that it is whole, videos never. Ends with status 1 if training would lose "
        "anything, with 2 if the meta file itself or the command is wrong.",
        epilog="example: xtuner-ext data check work_dirs/digits/data/train.json --model digits-teacher",
    )
    parser.add_argument("meta", metavar="META.json", help="the meta file of the datasets")
    add_model_options(parser)
    parser.add_argument("--max-length", type=_count, default=8192, metavar="N", help="longest sample in tokens")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes (default: one a processor)")
    parser.add_argument("--json", metavar="FILE", help="write a report that names every bad line")
    parser.add_argument("--no-images", action="store_true", help="look whether images exist, but not at their headers")
    allowed = "share of bad lines that is no loss (default: 0)"
    parser.add_argument("--max-bad-fraction", type=_share, default=0.0, metavar="F", help=allowed)
    parser.set_defaults(run=run)


def add_model_options(parser):
    """Add what decides how a model sees a sample."""
    parser.add_argument("--model", metavar="DIR", help="model folder, or the name of a shipped model")
    parser.add_argument("--prompt-template", metavar="NAME", help="conversation template (default: the model's own)")
    parser.add_argument("--max-tiles", type=_count, metavar="N", help="most tiles of an image (default: the model's)")
    parser.add_argument(
        "--frames", nargs="+", default=[], metavar="KEY=VALUE", help="how videos are shown, such as max_frames=16"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own tokenizer code")


def run(args):
    """Run the verb.

    Args:
        args (argparse.Namespace): Its options.

    Returns:
        int: 1 if something would be lost in training, else 0.
    """
    from ..data.check import check_meta
    from .progress import progress

    processor, name, template, remark = load_for_data(args)
    report = check_meta(
        args.meta,
        processor,
        template,
        max_length=args.max_length,
        frames=frame_settings(args.frames),
        images=not args.no_images,
        jobs=args.jobs,
        progress=progress,
    )
    report = {"model": args.model, "template": name, "template_remark": remark, "headers": not args.no_images, **report}
    report["lost"] = losses(report, args.max_bad_fraction)
    if args.json:
        _write(args.json, report)
    print_report(report, args)
    return 1 if report["lost"] else 0


def load_for_data(args):
    """Load what turns the lines of a dataset into samples of a model.

    Args:
        args (argparse.Namespace): With the options of :func:`add_model_options`.

    Returns:
        tuple[HybridVLProcessor | None, str | None, Template | None, str | None]: Processor, name of the template, the
        template, and what is to be said about it; nothing without a model.

    Raises:
        UserError: For a model that does not load, a template that does not fit it, or options that need a model.
    """
    from ..errors import UserError

    if args.model is None:
        for name in ("prompt_template", "max_tiles"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} was given without --model, which it is about")
        return None, None, None, None
    from ..convert.teacher import load_processor, read_model_config, resolve_folder
    from ..data.template_fit import detect_template, fit_template

    folder = resolve_folder(args.model)
    processor = load_processor(folder, args.max_tiles, args.trust_remote_code)
    own = read_model_config(folder)[1].template or detect_template(processor.tokenizer)
    name = args.prompt_template or own
    if name is None:
        raise UserError(f"{folder} names no conversation template: choose one with --prompt-template")
    template = fit_template(name, processor.tokenizer)
    same = own is None or template == fit_template(own, processor.tokenizer)
    return processor, name, template, None if same else f"the model's own is {own}"


def frame_settings(pairs):
    """FrameSampling: Of ``KEY=VALUE`` words.

    Raises:
        UserError: For a word of another form, an unknown key or a value that does not fit.
    """
    from ..data.video import FrameSampling
    from ..errors import UserError

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--frames {pair} has no value, expected KEY=VALUE")
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                value = kind(value)
                break
        settings[key] = value
    return FrameSampling.of(settings)


def losses(report, max_bad_fraction):
    """list[str]: What training would lose."""
    lost = [f"{dataset['name']}: {dataset['problem']}" for dataset in report["datasets"] if dataset["problem"]]
    total = report["total"]
    bad = sum(total["bad"].values())
    if total["bad_share"] > max_bad_fraction:
        lost.append(f"{bad:,} of {total['lines']:,} lines are bad ({total['bad_share']:.2%})")
    return lost


def _write(path, report):
    from ..compat import replace_file
    from ..errors import UserError

    try:
        replace_file(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error}") from error


def print_report(report, args):
    """Print tables of a report.

    Args:
        report (dict): From :func:`~xtuner_ext.data.check.check_meta`, with ``lost``.
        args (argparse.Namespace): Options of the command.
    """
    from rich.markup import escape
    from rich.table import Table

    from .console import console

    screen = console()
    table = Table(title=escape(f"{report['meta']}: lines"))
    table.add_column("dataset")
    for name in ("lines", "text", "image", "images", "video", "bad", "samples a pass"):
        table.add_column(name, justify="right", no_wrap=True)
    for dataset in report["datasets"]:
        bad = sum(dataset["bad"].values())
        cells = (dataset["lines"], *dataset["kinds"].values(), bad, dataset["samples_per_epoch"])
        style = "red" if bad or dataset["problem"] else None
        table.add_row(escape(dataset["name"]), *(f"{cell:,}" for cell in cells), style=style)
    screen.print(table)
    if report["total"].get("tokens_per_epoch"):
        _print_tokens(screen, report)
    _print_bad(screen, report)
    for dataset in report["datasets"]:
        for warning in dataset["warnings"]:
            _say(screen, f"warning: {dataset['name']}: {warning}", "yellow")
    if report["template_remark"]:
        _say(screen, f"warning: template {report['template']}, {report['template_remark']}", "yellow")
    if not report["headers"]:
        _say(screen, "The headers of images and videos were not read: an image counts as one tile.")
    if args.model is None:
        _say(screen, "Without --model nothing is known of tokens, tiles and template.")
    for loss in report["lost"]:
        _say(screen, f"lost in training: {loss}", "bold red")
    if any(count > EXAMPLES for dataset in report["datasets"] for count in dataset["bad"].values()):
        whole = all(sum(dataset["bad"].values()) == len(dataset["bad_lines"]) for dataset in report["datasets"])
        place = args.json or "the report, with --json FILE"
        _say(screen, f"{'all' if whole else 'the first'} bad lines are named in {place}")
    if not report["lost"]:
        within = bool(report["total"]["bad"])
        _say(screen, "bad lines are within the limit" if within else "nothing would be lost in training, as far as headers tell")


def _print_tokens(screen, report):
    from rich.markup import escape
    from rich.table import Table

    title = f"tokens of a sample, with template {report['template']}, at most {report['max_length']:,}"
    table = Table(title=escape(title))
    table.add_column("dataset")
    for name in ("min", "median", "95 %", "max", "trained", "tiles", "tokens a pass"):
        table.add_column(name, justify="right", no_wrap=True)
    for dataset in report["datasets"]:
        if dataset["tokens"]:
            cells = (dataset["tokens"][key] for key in ("min", "median", "p95", "max"))
            table.add_row(
                escape(dataset["name"]),
                *(f"{cell:,}" for cell in cells),
                f"{dataset['trained_share']:.1%}",
                f"{dataset['tiles']:,}",
                f"{dataset['tokens_per_epoch']:,}",
            )
    screen.print(table)
    batches = report["batches"]
    padded, packed = f"{batches['padded_fill']:.0%}", f"{batches['packed_fill']:.0%}"
    rows = f"packed rows of {batches['row_length']:,} tokens {packed}"
    _say(screen, f"Batches of {batches['samples']} samples in random order would be {padded} filled, {rows}.")


def _print_bad(screen, report):
    from rich.markup import escape
    from rich.table import Table

    if not report["total"]["bad"]:
        return
    table, examples = Table(title="bad lines"), []
    for name in ("dataset", "reason"):
        table.add_column(name)
    table.add_column("lines", justify="right")
    for dataset in report["datasets"]:
        for reason, count in sorted(dataset["bad"].items()):
            table.add_row(escape(dataset["name"]), reason, f"{count:,}")
            lines = (line["message"] for line in dataset["bad_lines"] if line["reason"] == reason)
            examples += [(message, reason) for message in islice(lines, EXAMPLES)]
    screen.print(table)
    for message, reason in examples:
        _say(screen, f"{message} ({reason})")


def _say(screen, text, style=None):
    """Print a sentence in one line, however long, so that it can be searched."""
    from rich.text import Text

    screen.print(Text(text, style=style or ""), soft_wrap=True)


def _count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return value
