"""xtuner-ext mmbench LLM --data-path TABLE: XTuner's own verb, once the whole table is known to be readable."""

import argparse
import base64
import binascii
import io
import sys

from ..errors import UserError

COLUMNS = ("index", "question", "image", "category", "A", "B")
# A shorter word in the column of images is the index of the row that holds the image.
SHORTEST_IMAGE = 16  # characters


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    from .main import run_stock

    if not {"-h", "--help"} & set(argv):
        parser = argparse.ArgumentParser(prog="xtuner-ext mmbench", add_help=False)
        parser.add_argument("--data-path")
        path = parser.parse_known_args(argv)[0].data_path
        if path is None:
            raise UserError("mmbench was given no --data-path, expected a table such as MMBench_DEV_EN.tsv")
        check_table(path)
    return run_stock("mmbench", argv)


def check_table(path):
    """Insist on a table that can be asked to its end.

    Args:
        path (str): Tab-separated, as MMBench and CCBench are published.

    Raises:
        UserError: Naming the file, and the line of a row, for a missing column, a table without rows, an index that is
            no number or not unique, a picture that can not be read or a question that is empty.
    """
    import pandas

    try:
        table = pandas.read_csv(path, sep="\t")
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of tab-separated columns: {str(error).splitlines()[0]}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise UserError(f"{path} has no column {missing[0]}, expected {', '.join(COLUMNS)} and further options")
    if table.empty:
        raise UserError(f"{path} has no rows below its header")
    if not pandas.api.types.is_integer_dtype(table["index"]) or table["index"].duplicated().any():
        raise UserError(f"{path}: the column index is expected to hold a number of its own for each row")
    images = dict(zip(table["index"], table["image"]))
    for row, (index, question) in enumerate(zip(table["index"], table["question"])):
        where = f"{path}, row {row + 1} (index {index})"
        if not isinstance(question, str):
            raise UserError(f"{where}: the question is {question}, expected text")
        _check_image(images, index, where)


def _check_image(images, index, where):
    from PIL import Image

    value = images[index]
    if isinstance(value, str) and len(value) < SHORTEST_IMAGE and value.isdecimal():
        other = images.get(int(value))
        if not isinstance(other, str) or len(other) < SHORTEST_IMAGE:
            raise UserError(f"{where}: the image is that of index {value}, which holds none")
        # Checked with its own row.
        return
    try:
        Image.open(io.BytesIO(base64.b64decode(value)))
    except (TypeError, binascii.Error, OSError, Image.DecompressionBombError) as error:
        found = str(value)[:SHORTEST_IMAGE]
        raise UserError(f"{where}: the image {found!r} can not be read, expected a picture in base64") from error


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(["mmbench", *sys.argv[1:]]))
