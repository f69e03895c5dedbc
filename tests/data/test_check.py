"""Checks before training say what training would meet."""

import json

import numpy as np
import pytest
from PIL import Image

from xtuner_ext.data.check import check_meta
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.template_fit import fit_template
from xtuner_ext.errors import BadSample, UserError
from xtuner_ext.modeling.processing import HybridVLProcessor

from .malformed import LINE_CASES, asks, turns, write, write_video

FRAMES = {"min_frames": 2, "max_frames": 5}


@pytest.fixture
def processor(digits_processor):
    return HybridVLProcessor(digits_processor.tokenizer, image_size=64, tokens_per_tile=16, max_tiles=6)


@pytest.fixture
def check(processor):
    def check(meta, **kwargs):
        template = fit_template("internlm2_chat", processor.tokenizer)
        return check_meta(meta, processor, template, **{"frames": FRAMES, "jobs": 1, **kwargs})

    return check


@pytest.fixture
def mixed(tmp_path):
    """Meta file over all kinds of samples in two datasets, with blank lines between."""
    for name, size in (("wide.png", (192, 128)), ("tall.jpg", (70, 300)), ("square.webp", (64, 64))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 70)).save(tmp_path / "turned.jpg", exif=turned)
    write_video(tmp_path / "film.mp4", frames=9)
    lines = [
        asks("What?"),
        {"text": "Plain <image> words that nobody asked for.", "end": True},
        {"text": "Words without an end"},
        asks("Which one?", image="wide.png"),
        asks("<image> or\n<image>?", image=["tall.jpg", "square.webp"]),
        asks("Rotated", image="turned.jpg"),
        asks("What happens?", video="film.mp4"),
        asks("And <video> here?", video="film.mp4", clip=[0, 0.2]),
        {**asks("cut"), "end": False},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("a", "b", "c", "d")]},
        asks("Say <|im_end|> and <IMG_CONTEXT>!", "No <img>."),
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines[3:6])))
    meta = {"a": {"annotation": "a.jsonl"}, "b": {"annotation": "b.jsonl", "max_dynamic_patch": 2, "repeat_time": 2.5}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "meta.json"


def test_lengths_are_those_of_training(check, mixed, processor):
    dataset = ConversationDataset(mixed, processor, "internlm2_chat", frames=FRAMES)
    report = check(mixed)
    for source, found in enumerate(report["datasets"]):
        lines = range(len(dataset.sources[source][1]))
        lengths = [dataset.count_tokens(source, line) for line in lines]
        dataset.index = np.array([[source, line] for line in lines])
        samples = [dataset.encode(line) for line in lines]
        assert [len(sample["labels"]) for sample in samples] == lengths
        tokens, trained = sum(lengths), sum(int((sample["labels"] != -100).sum()) for sample in samples)
        spread = found["tokens"]
        assert (spread["sum"], spread["min"], spread["max"]) == (tokens, min(lengths), max(lengths))
        assert found["tokens"]["median"] == sorted(lengths)[len(lengths) // 2]
        assert found["trained_share"] == pytest.approx(trained / tokens)
        assert found["tiles"] == sum(len(sample["pixel_values"]) for sample in samples)
        assert (found["bad"], found["problem"], found["warnings"]) == ({}, None, [])
    first, second = report["datasets"]
    assert first["kinds"] == {"text": 6, "image": 2, "images": 1, "video": 2}
    # Two whole passes over three lines, and two of the three again.
    assert second["samples_per_epoch"] == 8 and second["tokens_per_epoch"] == round(second["tokens"]["sum"] / 3 * 8)
    assert report["total"]["samples_per_epoch"] == len(ConversationDataset(mixed, processor, "internlm2_chat"))
    assert json.loads(json.dumps(report)) == report


def test_processes_find_what_one_finds(check, tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_ext.data.check.PIECE", 4000)
    lines = [json.dumps(asks(f"Question {number}?", f"answer {number}")) for number in range(400)]
    lines[50], lines[333] = "{", json.dumps(asks("q", " "))
    lines[200] = ""
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", "length": 400}}))
    done = []

    class Progress:
        def __init__(self, what, total):
            pass

        def __enter__(self):
            return done.append

        def __exit__(self, *_):
            pass

    one, two = check(tmp_path / "meta.json"), check(tmp_path / "meta.json", jobs=2, progress=Progress)
    assert one == two and len(done) > 8
    (found,) = one["datasets"]
    assert (found["lines"], found["samples"], found["bad"]) == (399, 397, {"json": 1, "nothing_trained": 1})
    assert [(line["line"], line["reason"]) for line in found["bad_lines"]] == [(51, "json"), (334, "nothing_trained")]
    assert found["warnings"] == [f"the meta file says length 400, {tmp_path / 'd.jsonl'} has 399 lines"]


def test_very_many_bad_lines_are_counted_and_the_first_are_named(check, tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_ext.data.check.PIECE", 100)
    monkeypatch.setattr("xtuner_ext.data.check.NAMED", 60)
    (tmp_path / "d.jsonl").write_text("{\n" * 200)
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    (found,) = check(tmp_path / "meta.json")["datasets"]
    assert found["bad"] == {"json": 200} and [line["line"] for line in found["bad_lines"]] == [*range(1, 61)]


def test_a_process_that_is_killed_ends_the_check(check, tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_ext.data.check.PIECE", 400)
    monkeypatch.setattr("xtuner_ext.data.check._Checker._measure", lambda *_: __import__("os")._exit(9))
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(asks())] * 40))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    with pytest.raises(UserError, match="a process that checks lines was killed"):
        check(tmp_path / "meta.json", jobs=2)


@pytest.mark.parametrize("case", [case for case in LINE_CASES if case.late], ids=lambda case: case.name)
def test_files_are_found_bad_without_being_decoded(check, processor, tmp_path, case):
    meta, _, reason = write(tmp_path, case)
    found = check(meta, max_length=4096)["datasets"][0]
    with pytest.raises(BadSample) as caught:
        ConversationDataset(meta, processor, "internlm2_chat", 4096, frames=FRAMES).encode(1)
    assert found["bad"] == {reason: 1}
    # Where only decoding tells more, the rest of the sentence may differ.
    assert found["bad_lines"][0]["message"].split(": ")[:2] == str(caught.value).split(": ")[:2]


def test_a_whole_image_with_something_behind_it_is_not_bad(check, tmp_path):
    """Neither one whose format does not tell where it ends."""
    for suffix in ("jpg", "png", "gif", "bmp", "webp"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"a.{suffix}")
        with open(tmp_path / f"a.{suffix}", "ab") as file:
            file.write(b"\0" * 1000)
    lines = [json.dumps(asks(image=path.name)) for path in sorted(tmp_path.iterdir())]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    assert check(tmp_path / "meta.json")["total"]["bad"] == {}


def test_without_headers_and_without_a_model(check, mixed):
    (mixed.parent / "wide.png").write_text("no picture")
    assert check(mixed)["total"]["bad"] == {"unreadable_image": 2}
    quick = check(mixed, images=False)
    assert quick["total"]["bad"] == {}
    # Of what is not read the least is assumed: a tile an image, two frames a video.
    assert [found["tiles"] for found in quick["datasets"]] == [1 + 2 + 1 + 2 + 2, 1 + 2 + 1]
    plain = check_meta(mixed, jobs=1)
    assert plain["total"]["bad"] == {"unreadable_image": 2}
    assert plain["datasets"][0]["tokens"] is None and plain["batches"] is None and plain["max_length"] is None
    assert plain["datasets"][0]["kinds"]["video"] == 2


def test_a_model_without_eyes(mixed, digits_processor):
    blind = HybridVLProcessor(digits_processor.tokenizer, tokens_per_tile=0)
    template = fit_template("internlm2_chat", blind.tokenizer)
    found = check_meta(mixed, blind, template, jobs=1)["datasets"]
    assert [one["bad"] for one in found] == [{"no_images_allowed": 5}, {"no_images_allowed": 3}]
    assert found[1]["problem"].startswith("every line of") and found[1]["tokens"] is None


def test_fill_of_batches(check, tmp_path):
    short, long = json.dumps(asks("q", "a")), json.dumps(asks("q", "a" + " long" * 40))
    (tmp_path / "d.jsonl").write_text("\n".join([short, long] * 80))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    report = check(tmp_path / "meta.json", max_length=4096)
    tokens = report["datasets"][0]["tokens"]
    # Nearly every batch of 8 has a long sample.
    expected = (tokens["min"] + tokens["max"]) / 2 / tokens["max"]
    assert report["batches"]["padded_fill"] == pytest.approx(expected, rel=0.05)
    assert report["batches"]["packed_fill"] > 0.8 and report["batches"]["row_length"] == 4096
