"""Where tables are printed."""

from rich.console import Console

WIDTH = 120  # columns of a file or pipe, which has no width of its own


def console():
    """Console: As wide as the terminal; tables in files and pipes are not squeezed into rich's 80 columns."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)
