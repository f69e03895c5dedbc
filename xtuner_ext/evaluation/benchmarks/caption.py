"""Captions of COCO's Karpathy test split, Flickr30k and nocaps."""

import json

from ...errors import UserError
from ..scorers import caption as scorer
from .base import Benchmark, question
from .files import read_json, take

PROMPT = "Provide a one-sentence caption for the provided image."
IMAGES = ("", "images", "Images", "../coco")
FILES = {
    "coco": (
        ("annotations/coco_karpathy_test.json", "coco_karpathy_test.json"),
        ("annotations/coco_karpathy_test_gt.json", "coco_karpathy_test_gt.json"),
    ),
    "flickr30k": (("flickr30k_test_karpathy.json",), ()),
    "nocaps": (("nocaps_val_4500_captions.json",), ()),
}


def _read(folder, split):
    asked, gold = FILES[split]
    path = folder.file or folder.need(*asked)
    content = read_json(path)
    truth = None if folder.file else folder.find(*gold)
    # One file in COCO's form has both; the Karpathy list has captions in it or in a second file.
    if isinstance(content, list) and truth is None and not all("caption" in item for item in content):
        folder.need(*gold)
    known = _captions(read_json(truth) if truth else content)
    items = content if isinstance(content, list) else content.get("images", [])
    found = []
    for position, item in enumerate(items, start=1):
        where = f"{path}:{position}"
        name = take(item, where, "image", "file_name") if "file_name" not in item else item["file_name"]
        number = item["id"] if "id" in item and isinstance(content, dict) else _image_id(name, where)
        gold = known.get(number) or item.get("caption")
        if not gold:
            raise UserError(f"{where}: image {number} has no caption in {truth or path}")
        gold = [gold] if isinstance(gold, str) else gold
        image = folder.image(name, IMAGES, where)
        found.append(question(number, f"<image>\n{PROMPT}", [image], gold, where))
    if not found:
        raise UserError(f"{path} names no image")
    return found


def _captions(content):
    """dict[int, list[str]]: Captions by image, of COCO's form."""
    found = {}
    for item in content.get("annotations", ()) if isinstance(content, dict) else ():
        found.setdefault(item["image_id"], []).append(item["caption"])
    return found


def _image_id(name, where):
    number = name.rsplit("_", 1)[-1].removesuffix(".jpg")
    if not number.isdecimal():
        raise UserError(
            f"{where}: image {name!r} has no number at its end, expected one as in COCO_val2014_000000391895.jpg"
        )
    return int(number)


def _upload(rows, path, split):
    """Write COCO's result file."""
    found = [{"image_id": row["id"], "caption": row["prediction"] or ""} for row in rows]
    path.write_text(json.dumps(found), encoding="utf-8")


CAPTION = Benchmark(
    name="coco_caption",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 30, "min_new_tokens": 8, "max_tiles": 6},
    files=(
        "annotations/coco_karpathy_test.json and annotations/coco_karpathy_test_gt.json, with val2014/ of COCO",
        "split flickr30k: flickr30k_test_karpathy.json with Images/",
        "split nocaps: nocaps_val_4500_captions.json with images/",
    ),
    splits=tuple(FILES),
    subfolders=("coco", "flickr30k", "nocaps"),
    upload=_upload,
)
