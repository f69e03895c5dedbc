"""MMVM's table and images."""

import ast

from ...errors import UserError
from ..scorers import mmvm as scorer
from ..scorers.letters import parse_options
from .base import Benchmark, question
from .files import decode_image, read_table

TABLES = ("mllm_match_eval_full.tsv",)
NUMBER_TABLES = ("MMVMBench.tsv",)
IMAGES = ("", "match_bench")


def _read(folder, split):
    path = folder.file or folder.need(*TABLES)
    # The newer questions name neither colours nor contours, and have their own images.
    version = "_v3" if split == "v3" else ""
    columns = tuple(f"{name}{version}" for name in ("image_path", "question"))
    found = []
    for where, row in read_table(path, ("index", "choices", "answer", "match_type", *columns)):
        options = parse_options(row["choices"] or "")
        if row["answer"] not in options:
            raise UserError(f"{where}: answer is {row['answer']!r}, expected one of {', '.join(options)}")
        images, text = (row[name] for name in columns)
        found.append(_question(folder, where, row, images, text, options=options))
    return found


def _read_numbers(folder, split):
    path = folder.file or folder.need(*NUMBER_TABLES)
    rows = read_table(path, ("index", "question", "answer", "match_type"))
    return [
        _question(folder, where, row, row.get("image") or row.get("image_path"), row["question"]) for where, row in rows
    ]


def _question(folder, where, row, images, text, **meta):
    if not (row["index"] or "").isdecimal():
        raise UserError(f"{where}: index is {row['index']!r}, expected a whole number")
    paths = [_image(folder, name, where) for name in _names(images, where)]
    shown = "".join(f"Image-{number}: <image>\n" for number in range(1, len(paths) + 1))
    shown = shown if len(paths) > 1 else "<image>\n"
    kinds = scorer.match_kinds(row["match_type"])
    meta |= {"match_type": row["match_type"]}
    return question(int(row["index"]), shown + text, paths, row["answer"], where, "+".join(kinds), **meta)


def _names(cell, where):
    """list[str]: Image files or base64, from a list in a cell."""
    try:
        names = ast.literal_eval(cell) if (cell or "").startswith("[") else [cell]
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{where}: images are no list of paths: {error}") from error
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: has no images, expected a path, base64, or a list of such")
    return names


def _image(folder, name, where):
    # Base64 has no full stop.
    return folder.image(name, IMAGES, where) if "." in name else decode_image(name, where)


SETTINGS = {"max_new_tokens": 1024, "min_new_tokens": 1, "max_tiles": 6}
PICTURES = "match_bench/ with case_xxx/FRAME00.jpg, case_xxx/FRAME01_CAND.jpg and so on"
MMVM = Benchmark(
    name="mmvm",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings=SETTINGS,
    files=(f"{TABLES[0]} (split v3 takes its columns of that name)", PICTURES),
    splits=("full", "v3"),
    subfolders=("mmvm", "MMVMBench"),
)
MMVM_NUMBER = Benchmark(
    name="mmvm_number",
    reader=_read_numbers,
    marker=scorer.mark_number,
    scorer=scorer.score_number,
    settings=SETTINGS,
    files=(f"{NUMBER_TABLES[0]}, whose answers are object numbers", PICTURES),
    splits=("full",),
    subfolders=("mmvm", "MMVMBench"),
)
