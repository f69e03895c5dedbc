"""python -m xtuner_ext.cli.stock FILE [ARGUMENTS]: a stock tool in a process of its own, with our front door's manners.

A user's mistake ends it in one sentence, and a reader of its output that leaves early, as `head` does, in silence.
"""

import argparse
import os
import runpy
import sys

from xtuner_ext import autoload, compat


def main(argv):
    """Runs a file as `python FILE [ARGUMENTS]` would.

    Args:
        argv (list[str]): The file and its arguments.
    """
    autoload.install()
    if os.environ.get("XTUNER_EXT") != "0":
        compat.read_select_layer_as_number(argparse)
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(entry=main))
