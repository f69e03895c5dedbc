"""SEED-Bench's files."""

import json

from ...errors import UserError
from ..scorers import seed as scorer
from ..scorers.letters import parse_options
from .base import LETTER, Benchmark, question
from .files import read_json, read_lines, take

LINES = {
    "image": ("seed.jsonl", "llava-seed-bench-image.jsonl", "llava-seed-bench.jsonl"),
    "all": ("llava-seed-bench.jsonl", "seed.jsonl"),
}
OFFICIAL = "SEED-Bench.json"
IMAGES = ("", "SEED-Bench-image", "SEED-Bench-video-image")
LETTERS = "ABCD"


def _read(folder, split):
    alone = folder.file if folder.file and folder.file.suffix == ".json" else None
    path = alone or folder.find(OFFICIAL)
    official = read_json(path) if path else {"questions": [], "question_type": {}}
    known = {str(item["question_id"]): item for item in official["questions"]}
    names = {number: name for name, number in official["question_type"].items()}
    lines = None if alone else folder.file or folder.find(*LINES[split])
    if lines is None and path is None:
        folder.need(*LINES[split], OFFICIAL)
    if lines is None:
        found = [_official(folder, f"{path}:{key}", item, names) for key, item in known.items() if _wanted(item, split)]
    else:
        found = [_line(folder, where, item, known, names) for where, item in read_lines(lines)]
    return [asked for asked in found if split == "all" or asked["meta"].get("type", 1) in scorer.IMAGE_TYPES]


def _wanted(item, split):
    return split == "all" or item["question_type_id"] in scorer.IMAGE_TYPES


def _line(folder, where, item, known, names):
    number = take(item, where, "question_id", "id")
    official = known.get(str(number))
    if known and official is None and "answer" not in item:
        raise UserError(f"{where}: question {number!r} is not in {OFFICIAL}")
    gold = take(official or item, where, "answer")
    text = take(item, where, "text")
    options = _options(official) if official else parse_options(text) or dict.fromkeys(LETTERS, "")
    path = folder.image(take(item, where, "image"), IMAGES, where)
    return _question(number, text, path, gold, where, options, official, names, item.get("category", "all"))


def _official(folder, where, item, names):
    options = _options(item)
    listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    path = folder.image(take(item, where, "data_id"), IMAGES, where)
    text = f"{take(item, where, 'question')}\n{listed}{LETTER}"
    return _question(item["question_id"], text, path, item["answer"], where, options, item, names, "all")


def _question(number, text, path, gold, where, options, official, names, category):
    meta = {"options": options}
    if official:
        kind = official["question_type_id"]
        meta["type"], category = kind, names.get(kind, str(kind))
    return question(number, f"<image>\n{text}", [path], gold, where, category, **meta)


def _options(item):
    return {letter: str(item[f"choice_{letter.lower()}"]) for letter in LETTERS if f"choice_{letter.lower()}" in item}


def _upload(rows, path, split):
    """Write the leaderboard's lines."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"question_id": row["id"], "prediction": row["prediction"] or ""}) + "\n")


SEED = Benchmark(
    name="seed",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 100, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        "seed.jsonl (InternVL), llava-seed-bench.jsonl or llava-seed-bench-image.jsonl (LLaVA), or SEED-Bench.json",
        "SEED-Bench.json (official), for answers and question types",
        "SEED-Bench-image/ with the images",
        "for split all: SEED-Bench-video-image/ with one frame of each video, as LLaVA's lines name them",
    ),
    splits=("image", "all"),
    subfolders=("SEED", "seed_bench", "seed"),
    upload=_upload,
    suffix=".jsonl",
)
