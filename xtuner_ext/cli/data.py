"""xtuner-ext data make-digits OUT: prepare data."""

import argparse
import sys


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(prog="xtuner-ext data", description="Prepare data.")
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
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    from ..data.sources.digits import make_digits

    for split, path in make_digits(args.out, args.seed, args.train, args.test).items():
        sys.stdout.write(f"{split}: {path}\n")
    return 0
