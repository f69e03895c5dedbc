"""Captions and boxes: read, asked as their kits do, scored by hand."""

import json

import pytest

from tests.evaluation.benchmarks.toys import answer, dump, lines, picture, prompt
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation import benchmarks
from xtuner_ext.evaluation.scorers.caption import cider

GOLD = {391895: ["a dog runs", "the dog"], 60623: ["two cats"], 483108: ["a red bus"]}
NAME = "COCO_val2014_{:012d}.jpg"


@pytest.mark.parametrize("separate", [True, False])
def test_coco_captions(tmp_path, separate, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for number in GOLD:
        picture(tmp_path / "coco" / "val2014" / NAME.format(number))
    items = [{"image": f"val2014/{NAME.format(n)}", **({} if separate else {"caption": c})} for n, c in GOLD.items()]
    dump(tmp_path / "coco" / "annotations" / "coco_karpathy_test.json", items)
    if separate:
        with pytest.raises(UserError, match="has no annotations/coco_karpathy_test_gt.json or"):
            benchmarks.get("coco_caption").read(tmp_path)
        annotations = [{"image_id": n, "id": n, "caption": text} for n, texts in GOLD.items() for text in texts]
        dump(tmp_path / "coco" / "annotations" / "coco_karpathy_test_gt.json", {"annotations": annotations})
    bench, questions, rows = answer("coco_caption", tmp_path, ["A dog runs.", "cats", "a bus"])
    assert prompt(questions[0]) == "<image>\nProvide a one-sentence caption for the provided image."
    assert {question["id"]: question["gold"] for question in questions} == GOLD
    expected = sum(cider(["a dog runs", "cats", "a bus"], list(GOLD.values()))) / 3 * 100
    assert bench.score(rows)["scores"] == {"CIDEr (no PTB tokenizer)": pytest.approx(expected)}
    bench.submission(rows, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text())[0] == {"image_id": 391895, "caption": "A dog runs."}


@pytest.mark.parametrize(("split", "folder"), [("flickr30k", "Images"), ("nocaps", "images")])
def test_captions_in_one_file(tmp_path, split, folder):
    name = {"flickr30k": "flickr30k_test_karpathy.json", "nocaps": "nocaps_val_4500_captions.json"}[split]
    picture(tmp_path / split / folder / "a.jpg")
    key = "image" if split == "flickr30k" else "file_name"
    images = [{"id": 4, key: "a.jpg"}]
    dump(tmp_path / split / name, {"images": images, "annotations": [{"image_id": 4, "caption": "a dog"}]})
    question = benchmarks.get("coco_caption").read(tmp_path, split)[0]
    assert (question["id"], question["gold"]) == (4, ["a dog"])
    dump(tmp_path / split / name, {"images": images, "annotations": []})
    with pytest.raises(UserError, match="image 4 has no caption in"):
        benchmarks.get("coco_caption").read(tmp_path, split)


def test_refcoco_as_internvl(tmp_path):
    picture(tmp_path / "coco" / "train2014" / "COCO_train2014_000000000009.jpg")
    facts = {"image": "data/coco/train2014/COCO_train2014_000000000009.jpg", "height": 100, "width": 200}
    lines(
        tmp_path / "refcoco" / "refcoco+_testA.jsonl",
        [
            {**facts, "sent": "the dog", "bbox": [0, 0, 100, 100]},
            {**facts, "sent": "the cat", "bbox": [100, 0, 200, 100]},
        ],
    )
    bench, questions, rows = answer(
        "refcoco", tmp_path / "refcoco", ["[[0, 0, 500, 1000]]", "[0, 0, 500, 1000]"], "refcoco+_testA"
    )
    order = "Please provide the bounding box coordinate of the region this sentence describes: <ref>the dog</ref>"
    assert prompt(questions[0]) == f"<image>\n{order}"
    for mode in ("reference", "robust"):
        assert bench.score(rows, mode)["scores"]["accuracy"] == 50.0


def test_refcoco_as_xtuner(tmp_path):
    picture(tmp_path / "coco" / "train2017" / "000000000009.jpg")
    facts = {"img_id": "COCO_train2014_000000000009_1", "height": 100, "width": 200}
    dump(tmp_path / "mine.json", [{**facts, "sents": "the dog", "bbox": [20, 10, 100, 60]}])
    bench, questions, rows = answer("refcoco", tmp_path / "mine.json", ["{<10><10><60><70>}</s>"])
    assert prompt(questions[0]) == "[refer] give me the location of the dog\n<image>"
    assert questions[0]["gold"] == [20, 10, 120, 70]
    assert bench.score(rows, "reference")["scores"]["accuracy (XTuner's boxes)"] == 100.0
    assert bench.score(rows)["scores"] == {"accuracy": 100.0}
    dump(tmp_path / "mine.json", [{**facts, "sents": "the dog", "bbox": [20, 10]}])
    with pytest.raises(UserError, match=r"mine.json:1: bbox is \[20, 10\]"):
        benchmarks.get("refcoco").read(tmp_path / "mine.json")
