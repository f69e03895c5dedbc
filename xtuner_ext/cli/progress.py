"""Progress bars for a terminal, a plain line now and then elsewhere."""

import contextlib
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(what, total):
    """Show how far a piece of work is.

    Args:
        what (str): Its name.
        total (int): Units of work.

    Yields:
        callable: Call it with the units just finished.
    """
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda units: bar.advance(task, units)


def _lines(what, total):
    state = {"done": 0, "shown": 0}

    def advance(units):
        state["done"] += units
        if state["done"] - state["shown"] >= total / 10 or state["done"] >= total:
            state["shown"] = state["done"]
            sys.stderr.write(f"{what}: {state['done']}/{total}\n")

    return advance
