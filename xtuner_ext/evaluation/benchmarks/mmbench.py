"""MMBench's and CCBench's tables, and any table of the same columns."""

import re
import string

from ...errors import UserError
from ..scorers import mmbench as scorer
from .base import LETTER, LETTER_CN, Benchmark, question
from .files import read_table, table_images

# Columns that InternVL's and LLaVA's uploads leave out, and where they put the prediction.
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION = 6
LONGEST_CELL = 32767  # characters of a spreadsheet's cell
FILES = {
    "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv"),
    "dev_en": ("mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN_V11.tsv"),
    "dev_cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "MMBench_DEV_CN_V11.tsv"),
    "test_en": ("mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv", "MMBench_TEST_EN_V11.tsv"),
    "test_cn": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv", "MMBench_TEST_CN_V11.tsv"),
}
CCBENCH_FILES = {"dev_cn": ("CCBench_legacy.tsv", "CCBench.tsv")}
_CHINESE = re.compile("[\u4e00-\u9fff]")


def _read(folder, split, files):
    path = folder.file or folder.need(*files[split])
    rows = read_table(path, ("index", "question", "A", "B"))
    embedded = "image" in rows[0][1]
    images = table_images(rows) if embedded else [_paths(folder, row, where) for where, row in rows]
    found = []
    for (where, row), image in zip(rows, images):
        if not (row["index"] or "").isdecimal():
            raise UserError(f"{where}: index is {row['index']!r}, expected a whole number")
        options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter) is not None}
        lines = [row.get("hint"), row["question"], *(f"{letter}. {option}" for letter, option in options.items())]
        text = "\n".join(line for line in lines if line is not None)
        text += "\n" + (LETTER_CN if split.endswith("cn") or folder.file and _CHINESE.search(text) else LETTER)
        if row.get("answer") not in (None, *options):
            raise UserError(f"{where}: answer is {row['answer']!r}, expected one of {', '.join(options)}")
        meta = {key: row[key] for key in ("l2-category", "split") if row.get(key) is not None}
        meta |= {"options": options, "index": int(row["index"])}
        meta["table"] = {name: cell for name, cell in row.items() if name not in DROPPED}
        category = row.get("category") or "all"
        found.append(
            question(int(row["index"]), f"<image>\n{text}", [image], row.get("answer"), where, category, **meta)
        )
    return found


def _paths(folder, row, where):
    if row.get("image_path") is None:
        raise UserError(f"{where}: has neither 'image' nor 'image_path'")
    return folder.image(row["image_path"], ("images",), where)


def _upload(rows, path, split):
    """Write the table without images, with the predictions as they are."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    head = list(rows[0]["meta"]["table"])
    place = min(PREDICTION, len(head))
    book = Workbook()
    sheet = book.active
    sheet.append([*head[:place], "prediction", *head[place:]])
    for line, row in enumerate(rows, start=2):
        cells = [row["meta"]["table"][name] for name in head]
        cells[head.index("index")] = row["meta"]["index"]
        for column, value in enumerate([*cells[:place], row["prediction"], *cells[place:]], start=1):
            if isinstance(value, str):
                value = value.encode("utf-8", "replace").decode()
                value = ILLEGAL_CHARACTERS_RE.sub("", value)[:LONGEST_CELL]
            cell = sheet.cell(line, column, value)
            if isinstance(value, str):
                # An answer that begins with = is no formula.
                cell.data_type = "s"
    book.save(path)


def _benchmark(name, files, subfolders):
    return Benchmark(
        name=name,
        reader=lambda folder, split: _read(folder, split, files),
        marker=scorer.mark,
        scorer=scorer.score,
        settings={"max_new_tokens": 100, "min_new_tokens": 1, "max_tiles": 6},
        files=(
            *(f"{' or '.join(names)} (split {split})" for split, names in files.items()),
            "any other TSV with the columns index, question, A, B, perhaps more options, hint, answer and category, "
            "and image (base64, or the index of another row) or image_path, named as the file itself",
        ),
        splits=tuple(files),
        subfolders=subfolders,
        upload=_upload,
        suffix=".xlsx",
    )


MMBENCH = _benchmark("mmbench", FILES, ("mmbench", "mmbench_cn"))
CCBENCH = _benchmark("ccbench", CCBENCH_FILES, ("mmbench", "ccbench"))
