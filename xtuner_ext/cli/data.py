"""xtuner-ext data make-digits, make-kinds, make-text OUT; check, show META.json: prepare data and look at it."""

import argparse
import sys

from . import data_check, data_show


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(prog="xtuner-ext data", description="Prepare data, check it, look at it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    digits = verbs.add_parser(
        "make-digits",
        help="pictures of handwritten digits with questions",
        description="Write PNG files, InternVL-style JSONL and one meta JSON per split.",
        epilog="example: xtuner-ext data make-digits work_dirs/digits/data --seed 0 --train 12000 --test 1200",
    )
    digits.add_argument("out", help="folder to create")
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--train", type=int, default=12000, help="training samples")
    digits.add_argument("--test", type=int, default=1200, help="held-out questions")
    digits.set_defaults(run=_digits)
    kinds = verbs.add_parser(
        "make-kinds",
        help="text, one picture, several pictures and video in one JSONL",
        description="Write pictures, videos, InternVL-style JSONL and one meta JSON per split, with questions that are "
        "new to the digits teacher.",
        epilog="example: xtuner-ext data make-kinds work_dirs/kinds/data --train 6000 --test 600",
    )
    kinds.add_argument("out", help="folder to create")
    kinds.add_argument("--seed", type=int, default=0)
    kinds.add_argument("--train", type=int, default=6000, help="training samples")
    kinds.add_argument("--test", type=int, default=600, help="held-out questions")
    kinds.add_argument("--known", type=float, default=0.3, metavar="SHARE", help="share of what the teacher knows")
    kinds.set_defaults(run=_kinds)
    text = verbs.add_parser(
        "make-text",
        help="passages of documents and a teacher's answers",
        description="Write JSONL of passages and answers, and one meta JSON per split. Without --documents and "
        "--debian, a few Debian packages with English books and manuals are fetched.",
        epilog="example: xtuner-ext data make-text work_dirs/smollm2/data --teacher work_dirs/smollm2/teacher",
    )
    text.add_argument("out", help="folder to create")
    text.add_argument("--teacher", required=True, help="model folder; its tokenizer measures, it answers")
    text.add_argument("--documents", nargs="+", action="extend", default=[], metavar="PATH", help="folders of texts")
    text.add_argument("--debian", nargs="+", action="extend", default=[], metavar="PACKAGE", help="packages to fetch")
    text.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: the list of this package)")
    text.add_argument("--answers", type=int, metavar="N", help="prompts to answer (default: all; 0 needs no model)")
    text.add_argument("--passage-tokens", type=int, default=256, metavar="N", help="tokens of a passage")
    text.add_argument("--train-tokens", type=int, default=400_000, metavar="N", help="most tokens to train on")
    text.add_argument("--held-out-tokens", type=int, default=40_000, metavar="N", help="most held-out tokens")
    text.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="longest answer")
    text.add_argument("--seed", type=int, default=0, help="seed of the answers")
    text.add_argument("--trust-remote-code", action="store_true", help="run the teacher's own tokenizer code")
    text.set_defaults(run=_text)
    data_check.add_parser(verbs)
    data_show.add_parser(verbs)
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    return args.run(args) or 0


def _digits(args):
    from ..data.sources.digits import make_digits

    _name(make_digits(args.out, args.seed, args.train, args.test))


def _kinds(args):
    from ..data.sources.kinds import make_kinds

    _name(make_kinds(args.out, args.seed, args.train, args.test, args.known))


def _text(args):
    from ..data.sources.text import make_text
    from .progress import progress

    options = {key: value for key, value in vars(args).items() if key not in ("verb", "run")}
    _name(make_text(**options, progress=progress))


def _name(splits):
    for split, path in splits.items():
        sys.stdout.write(f"{split}: {path}\n")
