"""Finding and reading a benchmark's files, under the names that its authors and the usual kits give them."""

import base64
import csv
import io
import json
from pathlib import Path

from ...errors import UserError

ABSENT = {"", "nan", "NaN"}  # how tables that pandas wrote say that a cell is empty
SHORTEST_IMAGE = 64  # characters; a shorter cell is the index of the row whose image it is


class EmbeddedImage(io.BytesIO):
    """An image file within a table, which PIL opens like a path.

    Args:
        data (bytes): The file's bytes.
        where (str): ``file:line`` of its row.
    """

    def __init__(self, data=b"", where=""):
        super().__init__(data)
        self.where = where

    def __str__(self):
        return f"in column 'image' of {self.where}"

    def __reduce__(self):
        return EmbeddedImage, (self.getvalue(), self.where)


class Folder:
    """The files of one benchmark below what the user named.

    A file is looked for in the folder, in its subfolders of the benchmark's names, and in those below ``data``,
    ``eval`` and ``playground/data/eval``, so that the benchmark's own folder and the kits' roots will all do.

    Args:
        name (str): The benchmark.
        data (str | Path): What the user named: a folder, or a file of questions.
        subfolders (tuple[str, ...]): The benchmark's folder in the kits.
        files (tuple[str, ...]): What must be where, for messages.

    Raises:
        UserError: When it does not exist.
    """

    def __init__(self, name, data, subfolders, files):
        self.name, self.data, self.files = name, Path(data), files
        if not self.data.exists():
            raise UserError(f"data of {name} {self.data} does not exist, expected {self._listing()}")
        self.file = self.data if self.data.is_file() else None
        self.root = self.data.parent if self.file else self.data
        bases = ("", "data", "eval", "playground/data/eval")
        self.places = [self.root, *(self.root / base / sub for base in bases for sub in subfolders)]
        self._folders = {}

    def _listing(self):
        return "; ".join(self.files)

    def find(self, *names):
        """Path | None: The first file or folder of these names that is there."""
        found = (place / name for name in names for place in self.places if (place / name).exists())
        return next(found, None)

    def need(self, *names):
        """Path: As :meth:`find`; a UserError that lists all of the benchmark's files when there is none."""
        if (found := self.find(*names)) is None:
            wanted = " or ".join(names)
            raise UserError(f"{self.data} has no {wanted}; {self.name} is read from: {self._listing()}")
        return found

    def image(self, name, folders, where):
        """Find an image file.

        Args:
            name (str): As the benchmark writes it, perhaps from the root of another kit.
            folders (tuple[str, ...]): Where images are.
            where (str): ``file:line`` that names it.

        Returns:
            Path: An existing file.

        Raises:
            UserError: When it is not there.
        """
        path = Path(name)
        # All images of a folder are found where the first one was.
        if (known := self._folders.get((path.parent, folders))) and (known / path.name).exists():
            return known / path.name
        tails = ["/".join(path.parts[start:]) for start in range(len(path.parts))] if not path.is_absolute() else []
        tries = [path] if path.is_absolute() else []
        tries += [place / folder / tail for tail in tails for folder in (*folders, "") for place in self.places]
        found = next((file for file in tries if file.is_file()), None)
        if found is None:
            raise UserError(
                f"{where}: image {name} of {self.name} is not below {self.root}; expected {self._listing()}"
            )
        self._folders[path.parent, folders] = found.parent
        return found


def read_json(path):
    """object: The content of a JSON file; a UserError for what is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_lines(path):
    """Read a JSONL file, or a JSON list.

    Args:
        path (Path): The file.

    Returns:
        list[tuple[str, dict]]: ``file:line`` (``file:item`` of a list) and the object.

    Raises:
        UserError: For a line that is no JSON object, or no line at all.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    found = []
    if text.lstrip().startswith("["):
        found = [(f"{path}:{number}", item) for number, item in enumerate(read_json(path), start=1)]
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    found.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: malformed JSON: {error}") from error
    for where, item in found:
        if not isinstance(item, dict):
            raise UserError(f"{where}: is {type(item).__name__}, expected a JSON object")
    if not found:
        raise UserError(f"{path} is empty, expected one JSON object a line")
    return found


def take(item, where, *keys):
    """object: The first of these keys that an object has; a UserError when it has none."""
    for key in keys:
        if key in item:
            return item[key]
    raise UserError(f"{where}: has no {' or '.join(map(repr, keys))}, it has {', '.join(map(repr, sorted(item)))}")


def read_table(path, columns):
    """Read a TSV file as pandas writes them.

    Args:
        path (Path): The file, with a line of column names.
        columns (tuple[str, ...]): Columns that must be there.

    Returns:
        list[tuple[str, dict]]: ``file:line`` of each row's end, and its cells by column; empty ones are None.

    Raises:
        UserError: For a missing column or a row of another length.
    """
    csv.field_size_limit(2**31 - 1)  # images are cells
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t")
        head = next(reader, [])
        if lost := [name for name in columns if name not in head]:
            raise UserError(f"{path} has no column {lost[0]!r}, it has {', '.join(head) or 'nothing'}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if cells and len(cells) != len(head):
                raise UserError(f"{where}: has {len(cells)} cells, expected {len(head)}, one a column")
            if cells:
                rows.append((where, {name: None if cell in ABSENT else cell for name, cell in zip(head, cells)}))
    if not rows:
        raise UserError(f"{path} has no row")
    return rows


def table_images(rows):
    """The image of every row of a table, from base64 or as the index of another row.

    Args:
        rows (list[tuple[str, dict]]): Of :func:`read_table`, with ``index`` and ``image``.

    Returns:
        list[EmbeddedImage]: Rows of one image share one object.

    Raises:
        UserError: For a reference to no row or in a ring, or cells that are no base64.
    """
    cells = {row["index"]: (where, row["image"]) for where, row in rows}
    decoded = {}

    def image(index, where):
        seen = []
        while True:
            if index not in cells or cells[index][1] is None or index in seen:
                raise UserError(f"{where}: has the image of row {index!r}, which has none")
            seen.append(index)
            place, text = cells[index]
            if len(text) > SHORTEST_IMAGE:
                break
            index = text
        if index not in decoded:
            decoded[index] = decode_image(text, place)
        return decoded[index]

    return [image(row["index"], where) for where, row in rows]


def decode_image(text, where):
    """EmbeddedImage: Of base64; a UserError for other text."""
    try:
        return EmbeddedImage(base64.b64decode(text, validate=True), where)
    except ValueError as error:
        raise UserError(f"{where}: column 'image' is no base64: {error}") from error
