"""Data folders that appear whole or not at all, and are made once."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

from ...errors import UserError

STAMP = "settings.json"


def is_made(out, settings, maker):
    """Look whether a data folder is there already.

    Args:
        out (str | Path): The folder.
        settings (dict): What its content follows from.
        maker (str): The verb that makes it, for messages.

    Returns:
        bool: True when it was made with the same settings, False when nothing is there.

    Raises:
        UserError: For a folder of other settings or other content, or a file.
    """
    out = Path(out)
    if (out / STAMP).is_file():
        found = json.loads((out / STAMP).read_text(encoding="utf-8"))
        if found == settings:
            return True
        keys = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
        was, wanted = ({key: known[key] for key in keys if key in known} for known in (found, settings))
        raise UserError(f"{out} was made with {was}, expected {wanted}: remove it or choose another folder")
    if out.is_file():
        raise UserError(f"{out} is a file, expected a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by {maker}")
    return False


@contextlib.contextmanager
def new_folder(out, settings):
    """Fill a folder under a temporary name, which becomes the final one when all went well.

    When another process has made the same one meanwhile, that stays.

    Args:
        out (str | Path): Final name; missing or empty.
        settings (dict): For :func:`is_made`, as JSON can hold it.

    Yields:
        Path: The folder to fill.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield work
        (work / STAMP).write_text(json.dumps(settings), encoding="utf-8")
        work.chmod(0o755)
        try:
            # Takes the place of an empty folder.
            work.rename(out)
        except OSError:
            if not is_made(out, settings, "another process"):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
