"""ScienceQA's files."""

from pathlib import Path

from ...errors import UserError
from ..scorers import scienceqa as scorer
from .base import LETTER, Benchmark, question
from .files import read_json, read_lines, take

LETTERS = "ABCDE"
IMAGES = ("", "images/test", "images")
LINES = "scienceqa_test_img.jsonl"
LLAVA = "llava_test_CQM-A.json"


def _read(folder, split):
    problems = None if folder.file else folder.find("problems.json")
    problems = read_json(problems) if problems else {}
    if folder.file or split == "image":
        path = folder.file or folder.need(LINES)
        return [_line(folder, where, item, problems) for where, item in read_lines(path)]
    folder.need("problems.json")
    asked, splits = folder.find(LLAVA), folder.find("pid_splits.json")
    if asked is None and splits is None:
        folder.need(LLAVA, "pid_splits.json")
    if asked is not None:
        return [_llava(folder, where, item, problems) for where, item in read_lines(asked)]
    return [_problem(folder, f"{splits}:{key}", key, problems) for key in read_json(splits)["test"]]


def _line(folder, where, item, problems):
    """dict: InternVL's, of an image; the folder of the image is the number of the problem."""
    image = take(item, where, "image")
    key = str(item.get("id", item.get("question_id", Path(image).parent.name)))
    choices, options = _listed(take(item, where, "choices"), where)
    lines = [item.get("hint"), take(item, where, "question"), choices, LETTER]
    text = "\n".join(line for line in lines if line)
    path = folder.image(image, IMAGES, where)
    known = {**problems.get(key, {}), "hint": item.get("hint")}
    number = key if key in problems else int(where.rsplit(":", 1)[-1])
    return _question(number, text, path, _letter(item, options, where), where, options, known)


def _llava(folder, where, item, problems):
    """dict: LLaVA's conversation, whose answer is in problems.json."""
    key = str(take(item, where, "id"))
    if key not in problems:
        raise UserError(f"{where}: problem {key!r} is not in problems.json")
    text = take(item, where, "conversations")[0]["value"].replace("<image>", "").strip() + f"\n{LETTER}"
    _, options = _listed(problems[key]["choices"], where)
    path = folder.image(item["image"], IMAGES, where) if item.get("image") else None
    return _question(key, text, path, _letter(problems[key], options, where), where, options, problems[key])


def _problem(folder, where, key, problems):
    if key not in problems:
        raise UserError(f"{where}: problem {key!r} is not in problems.json")
    item = problems[key]
    choices, options = _listed(take(item, where, "choices"), where)
    text = "\n".join(line for line in (item.get("hint"), take(item, where, "question"), choices, LETTER) if line)
    path = folder.image(f"{key}/{item['image']}", IMAGES, where) if item.get("image") else None
    return _question(key, text, path, _letter(item, options, where), where, options, item)


def _listed(choices, where):
    """tuple[str, dict]: The lines of the options, and their texts by letter."""
    if len(choices) > len(LETTERS):
        raise UserError(f"{where}: has {len(choices)} choices, expected at most {len(LETTERS)}")
    options = {letter: str(choice) for letter, choice in zip(LETTERS, choices)}
    return "\n".join(f"{letter}. {option}" for letter, option in options.items()), options


def _letter(item, options, where):
    answer = take(item, where, "answer")
    if answer not in range(len(options)):
        raise UserError(f"{where}: answer is {answer!r}, expected a number from 0 to {len(options) - 1}")
    return LETTERS[answer]


def _question(number, text, path, gold, where, options, known):
    meta = {key: known[key] for key in ("subject", "grade", "hint") if key in known}
    meta |= {"options": options, "image": path is not None}
    category = meta.get("subject", "all")
    text, images = (f"<image>\n{text}", [path]) if path else (text, [])
    return question(number, text, images, gold, where, category, **meta)


SCIENCEQA = Benchmark(
    name="scienceqa",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 100, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        f"split image: {LINES} (InternVL), and perhaps problems.json for subjects and grades",
        f"split all: problems.json, with {LLAVA} (LLaVA) or pid_splits.json",
        "images/test/ with 5/image.png and so on",
    ),
    splits=("image", "all"),
    subfolders=("scienceqa",),
)
