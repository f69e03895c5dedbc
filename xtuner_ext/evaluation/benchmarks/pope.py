"""POPE's files."""

from ...errors import UserError
from ..scorers import pope as scorer
from .base import SHORT, Benchmark, question
from .files import read_lines, take

CATEGORIES = ("random", "popular", "adversarial")
IMAGES = ("val2014", "coco/val2014", "../coco/val2014")


def _read(folder, split):
    names = {name: (f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json") for name in CATEGORIES}
    lines = folder.file or folder.find("llava_pope_test.jsonl")
    if lines is None and not any(folder.find(*paths) for paths in names.values()):
        folder.need("llava_pope_test.jsonl", *names["random"])
    if lines is None:
        found = {name: path for name, paths in names.items() if (path := folder.find(*paths))}
        return [_label(folder, where, item, name) for name, path in found.items() for where, item in read_lines(path)]
    items, labels = read_lines(lines), {}
    bare = [(where, item) for where, item in items if not {"label", "answer"} & set(item)]
    for name in dict.fromkeys(take(item, where, "category") for where, item in bare):
        path = folder.need(f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
        for where, item in read_lines(path):
            key = name, take(item, where, "image"), take(item, where, "text").strip()
            label = take(item, where, "label")
            if labels.setdefault(key, label) != label:
                raise UserError(f"{where}: label is {label!r}, an earlier line on the same has the other one")
    return [_line(folder, where, item, labels) for where, item in items]


def _line(folder, where, item, labels):
    """dict: A line with the prompt in its text, whose label is in another file or its own."""
    text = take(item, where, "text", "question")
    plain = text.replace(SHORT, "").strip()
    category, image = item.get("category", "all"), take(item, where, "image")
    gold = item.get("label", item.get("answer")) or labels.get((category, image, plain))
    if gold not in ("yes", "no"):
        raise UserError(f"{where}: {plain!r} on {image} has no yes or no, here or among the labels of {category!r}")
    text = text.strip() if SHORT in text else f"{plain}\n{SHORT}"
    path = folder.image(image, IMAGES, where)
    return question(take(item, where, "question_id", "id"), f"<image>\n{text}", [path], gold, where, category)


def _label(folder, where, item, name):
    number = f"{name}-{take(item, where, 'question_id')}"
    return _line(folder, where, {**item, "question_id": number, "category": name}, {})


POPE = Benchmark(
    name="pope",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 100, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        "llava_pope_test.jsonl (optional)",
        "coco/coco_pope_random.json, coco/coco_pope_popular.json and coco/coco_pope_adversarial.json with the labels",
        "val2014/ of COCO with COCO_val2014_000000310196.jpg and so on",
    ),
    splits=("test",),
    subfolders=("pope",),
)
