"""GQA's files."""

from ..scorers import gqa as scorer
from .base import SHORT, Benchmark, question
from .files import read_json, read_lines, take

IMAGES = ("images", "data/images")
KEPT = ("question", "types", "groups", "semantic", "entailed", "isBalanced")
# Folders of the official zip and of LLaVA's layout.
QUESTIONS = ("", "questions1.2/", "data/", "data/questions1.2/", "data/questions/")
LINES = {
    "testdev": (
        "llava_gqa_testdev_balanced_qwen_format.jsonl",
        "llava_gqa_testdev_balanced.jsonl",
        "test_balanced.jsonl",
    )
}
TIERS = {"testdev": ("testdev_balanced",), "val": ("val_balanced", "val"), "val_all": ("val_all",)}


def _read(folder, split):
    tiers = TIERS[split]
    official = folder.find(*(f"{prefix}{tier}_questions.json" for tier in tiers for prefix in QUESTIONS))
    lines = folder.file or folder.find(*LINES.get(split, ()))
    if lines is None and official is None:
        folder.need(*LINES.get(split, ()), f"{tiers[0]}_questions.json")
    if lines is not None and not _is_official(lines):
        known = read_json(official) if official else {}
        choices = _choices(folder, split) if official else {}
        return [_line(folder, item, where, known, choices) for where, item in read_lines(lines)]
    known, choices, path = read_json(lines or official), _choices(folder, split), lines or official
    return [_official(folder, key, item, f"{path}:{key}", choices) for key, item in known.items()]


def _is_official(path):
    return path.suffix == ".json" and isinstance(read_json(path), dict)


def _choices(folder, split):
    path = folder.find(*(f"{prefix}{tier}_choices.json" for prefix in QUESTIONS for tier in (*TIERS[split], split)))
    return read_json(path) if path else {}


def _meta(key, known, choices):
    if key not in known:
        return {}
    return {name: known[key][name] for name in KEPT if name in known[key]} | choices.get(key, {})


def _line(folder, item, where, known, choices):
    number = take(item, where, "question_id", "id")
    image = folder.image(take(item, where, "image"), IMAGES, where)
    # LLaVA's lines have the prompt in their text.
    text = item["text"] if "text" in item else f"{take(item, where, 'question')} {SHORT}"
    answer = known.get(str(number), item).get("answer")
    if answer is None:
        answer = take(item, where, "answer")
    meta = _meta(str(number), known, choices)
    return question(number, f"<image>\n{text}", [image], answer, where, _kind(meta), **meta)


def _official(folder, key, item, where, choices):
    image = folder.image(f"{take(item, where, 'imageId')}.jpg", IMAGES, where)
    text = f"<image>\n{take(item, where, 'question')} {SHORT}"
    meta = _meta(key, {key: item}, choices)
    return question(key, text, [image], take(item, where, "answer"), where, _kind(meta), **meta)


def _kind(meta):
    return meta.get("types", {}).get("structural", "all")


GQA = Benchmark(
    name="gqa",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 10, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        "llava_gqa_testdev_balanced_qwen_format.jsonl (InternVL), llava_gqa_testdev_balanced.jsonl (LLaVA) or "
        "testdev_balanced_questions.json alone",
        "testdev_balanced_questions.json of GQA 1.2 (here, in questions1.2/ or data/), for answers and types",
        "images/ or data/images/ with n161313.jpg and so on",
        "optional: val_choices.json, for validity and plausibility",
    ),
    splits=("testdev", "val", "val_all"),
    subfolders=("gqa",),
)
