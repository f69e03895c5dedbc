"""RefCOCO's files, InternVL's lines and XTuner's list."""

from ...errors import UserError
from ..scorers import refcoco as scorer
from .base import Benchmark, question
from .files import read_lines, take

SPLITS = (
    *(f"{name}_{part}" for name in ("refcoco", "refcoco+") for part in ("val", "testA", "testB")),
    "refcocog_val",
    "refcocog_test",
)
IMAGES = ("", "train2014", "coco/train2014", "../coco/train2014", "coco/train2017", "../coco/train2017")
INTERNVL = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
XTUNER = "[refer] give me the location of {}\n<image>"


def _read(folder, split):
    path = folder.file or folder.need(f"{split}.jsonl", f"{split}.json")
    return [_line(folder, where, item, path.stem) for where, item in read_lines(path)]


def _line(folder, where, item, name):
    box, height, width = (take(item, where, key) for key in ("bbox", "height", "width"))
    if not isinstance(box, list) or len(box) != 4 or not min(height, width) > 0:
        raise UserError(f"{where}: bbox is {box!r}, of an image of {width!r} x {height!r}, expected four numbers")
    if "sents" in item:
        # XTuner's boxes have width and height where InternVL's have the other corner.
        x, y, w, h = box
        box, text = [x, y, x + w, y + h], XTUNER.format(item["sents"])
        image = item.get("image") or f"{take(item, where, 'img_id').split('_')[-2]}.jpg"
    else:
        text, image = INTERNVL.format(take(item, where, "sent")), take(item, where, "image")
    number = int(where.rsplit(":", 1)[-1])
    paths, size = [folder.image(image, IMAGES, where)], {"width": width, "height": height}
    return question(number, text, paths, box, where, name, box=box, **size)


REFCOCO = Benchmark(
    name="refcoco",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 100, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        "SPLIT.jsonl of image, sent, bbox [x1, y1, x2, y2], height and width (InternVL), or SPLIT.json of img_id or "
        "image, sents, bbox [x, y, width, height], height and width (XTuner)",
        "COCO's train2014/ (InternVL) or train2017/ (XTuner), here or in ../coco/",
    ),
    splits=SPLITS,
    subfolders=("refcoco",),
)
