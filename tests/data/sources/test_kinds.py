"""All kinds of samples in one file, with questions that are new to the digits teacher."""

import json
import re

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from xtuner_ext.data.sources import kinds as source
from xtuner_ext.data.sources.digits import compose, split_digits
from xtuner_ext.data.sources.kinds import make_kinds
from xtuner_ext.errors import UserError

QUESTIONS = {
    "three numbers": r"Which is the (largest|smallest) of \d, \d and \d\?",
    "photograph": r"<image>\nWhich photograph: 0 astronaut, 1 cat, .*, 7 grass\?",
    "several pictures": r"Picture 1: <image>, Picture 2: <image>(, Picture 3: <image>)?"
    r"\. What is the (sum of both|largest digit)\?",
    "video": r"<video>\n(Which digit moves\?|Does the digit move (right|left|down|up)\?)",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder and the lines of both splits."""
    folder = tmp_path_factory.mktemp("kinds") / "out"
    metas = make_kinds(folder, train=150, test=90)
    assert metas == {split: str(folder / f"{split}.json") for split in ("train", "test")}
    lines = {}
    for split, count in (("train", 150), ("test", 90)):
        entry = {"root": ".", "annotation": f"{split}.jsonl", "data_augment": False, "repeat_time": 1, "length": count}
        assert json.loads((folder / f"{split}.json").read_text()) == {f"kinds_{split}": entry}
        lines[split] = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines[split]) == count
    return folder, lines


def asked(lines, category):
    """Line, question and answer of each sample of a category."""
    found = [line for line in lines if line["category"] == category]
    return [(line, line["conversations"][0]["value"], line["conversations"][1]["value"]) for line in found]


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_kinds_are_mixed_in_one_file(made, split):
    folder, lines = made
    for category, pattern in QUESTIONS.items():
        found = asked(lines[split], category)
        assert len(found) > 5 and all(re.fullmatch(pattern, question) for _, question, _ in found)
    assert all("image" not in line and "video" not in line for line, _, _ in asked(lines[split], "three numbers"))
    assert all(isinstance(line["image"], str) for line, _, _ in asked(lines[split], "photograph"))
    for line, question, _ in asked(lines[split], "several pictures"):
        assert len(line["image"]) == question.count("<image>")
    known = [line for line in lines[split] if line["category"].startswith("known: ")]
    assert 0.2 < len(known) / len(lines[split]) < 0.4
    files = [path for path in folder.rglob("*") if path.suffix == ".png" and path.parent.name == "images"]
    assert {(min(Image.open(path).size), max(Image.open(path).size)) for path in files} == {(32, 32), (48, 48)}


def test_answers_follow_from_the_numbers_and_no_three_are_in_both_splits(made):
    seen = {}
    for split, lines in made[1].items():
        for _, question, answer in asked(lines, "three numbers"):
            numbers = [int(number) for number in re.findall(r"\d", question)]
            assert len(set(numbers)) == 3 and answer == str((max if "largest" in question else min)(numbers))
            seen.setdefault(split, set()).add(frozenset(numbers))
    assert not seen["train"] & seen["test"]


def test_answers_follow_from_the_digits_that_are_drawn(monkeypatch):
    """Every digit is a plane of its own shade, so that a picture tells which ones it shows."""
    pool = [np.full((1, 8, 8), value + 1.0) for value in range(10)]
    monkeypatch.setattr(source, "compose", lambda pools, rng: [int(p.max()) - 1 for p in pools if p.any()])
    drawer = source._Drawer("train", pool, {}, np.random.default_rng(0))
    for _ in range(60):
        sample = drawer.images()
        values = [value for picture in sample["pictures"] for value in picture]
        assert len(values) == sample["question"].count("<image>")
        assert sample["answer"] == str(sum(values) if "sum" in sample["question"] else max(values))
    monkeypatch.setattr(source, "compose", compose)
    pools = [np.stack([np.full((8, 8), 16.0)])] * 10
    drawer = source._Drawer("train", pools, {}, np.random.default_rng(0))
    for _ in range(60):
        sample = drawer.video()
        first, last = (np.argwhere(sample["frames"][place] > 90).mean(0) for place in (0, -1))
        down, right = (last - first) / 20
        way = {(0, 1): "right", (0, -1): "left", (1, 0): "down", (-1, 0): "up"}[round(down), round(right)]
        if "Does" in sample["question"]:
            assert sample["answer"] == ("yes" if way in sample["question"] else "no")


def test_the_digit_that_moves_is_the_one_that_is_asked_for():
    pools = [np.zeros((1, 8, 8)) + 16.0 * (value % 2) for value in range(10)]
    drawer = source._Drawer("train", pools, {}, np.random.default_rng(0))
    for _ in range(60):
        sample = drawer.video()
        if sample["question"].endswith("Which digit moves?"):
            assert int(sample["answer"]) % 2 == (max(frame.max() for frame in sample["frames"]) > 120)


def test_videos_of_three_formats_show_the_same_frames(tmp_path):
    pool = split_digits()["train"]
    frames = source._Drawer("train", pool, {}, np.random.default_rng(0))._moving(3, (0, 1))
    for write, ending in source._VIDEOS:
        write(tmp_path / f"x{ending}", frames)
    with Image.open(tmp_path / "x.gif") as gif:
        from_gif = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(gif)]
    from_folder = [np.asarray(Image.open(tmp_path / "x" / f"{number}.png")) for number in range(1, 5)]
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].average_rate == source.FRAMES_PER_SECOND
        from_mp4 = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(from_gif) == len(from_folder) == len(from_mp4) == len(frames) == source.FRAMES
    for number, frame in enumerate(frames):
        assert np.array_equal(from_folder[number], frame) and np.array_equal(from_gif[number], frame)
        assert np.abs(from_mp4[number].astype(int) - frame).mean() < 8


def test_a_photograph_is_a_window_of_the_one_that_is_asked_for():
    photographs = {word: Image.new("RGB", (90, 60), (20 * number, 0, 0)) for number, word in enumerate("abcdefgh")}
    drawer = source._Drawer("train", None, photographs, np.random.default_rng(0))
    for _ in range(30):
        sample = drawer.image()
        assert sample["pictures"][0].shape == (48, 48, 3)
        assert int(sample["answer"]) == sample["pictures"][0][0, 0, 0] / 20


def test_same_arguments_give_the_same_files_and_others_are_refused(tmp_path):
    def files(folder):
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_kinds(tmp_path / name, seed=seed, train=20, test=5)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a["train.jsonl"] != c["train.jsonl"]
    (tmp_path / "a" / "note").touch()
    make_kinds(tmp_path / "a", train=20, test=5)
    assert (tmp_path / "a" / "note").exists()
    with pytest.raises(UserError, match="was made with .*'known': 0.3.*expected .*'known': 0.5"):
        make_kinds(tmp_path / "a", train=20, test=5, known=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"train": 0}, "got train=0"), ({"test": 0}, "and test=0"), ({"known": 1}, "got known=1"), ({"known": -1}, "-1")],
)
def test_numbers_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_kinds(tmp_path / "out", **{"train": 2, "test": 2, **options})
    assert not list(tmp_path.iterdir())
