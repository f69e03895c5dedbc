"""Rows hold every sample once, whole, and nothing of a row reaches across its samples."""

import json
import logging

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from PIL import Image

from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.packing import PackedDataset, first_fit_decreasing
from xtuner_ext.errors import UserError


@pytest.fixture
def build(tmp_path, digits_processor):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")

    def build(lines, **kwargs):
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
        return ConversationDataset(str(tmp_path / "d.json"), digits_processor, "internlm2_chat", **kwargs)

    return build


@pytest.fixture
def mixed(build):
    """Sixty samples of many lengths; every third has an image, every fourth is plain text."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(60):
        words = f"{number} " * int(generator.integers(1, 20))
        turns = [{"from": "human", "value": words}, {"from": "gpt", "value": f"answer {number}"}]
        image = {"image": "red.png"} if number % 3 == 0 else {}
        lines.append({"text": words} if number % 4 == 1 else {"conversations": turns, **image})
    return build(lines)


def naive_first_fit(lengths, row_length):
    free, rows = [], np.empty(len(lengths), int)
    for index in np.argsort(-lengths, kind="stable"):
        row = next((row for row, room in enumerate(free) if room >= lengths[index]), len(free))
        if row == len(free):
            free.append(row_length)
        free[row] -= lengths[index]
        rows[index] = row
    return rows


@pytest.mark.parametrize("row_length", [1, 7, 30, 64])
@pytest.mark.parametrize("count", [1, 200])
def test_placement_is_first_fit_decreasing(row_length, count):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, row_length + 1, count)
        assert (first_fit_decreasing(lengths, row_length) == naive_first_fit(lengths, row_length)).all()


@pytest.mark.parametrize("row_length", [90, 128, 1000])
def test_every_sample_is_in_one_row_whole(mixed, row_length):
    packed = PackedDataset(mixed, row_length)
    members = [packed.samples(row).tolist() for row in range(len(packed))]
    assert sorted(sum(members, [])) == list(range(60)) and packed.skipped == 0
    tokens = 0
    for row, indices in enumerate(members):
        found = packed[row]
        assert len(found["input_ids"]) <= row_length
        pixels = []
        for segment, index in enumerate(indices):
            sample, here = mixed[index], found["segment_ids"] == segment
            assert torch.equal(found["input_ids"][here], sample["input_ids"])
            assert found["labels"][here][0] == -100
            assert torch.equal(found["labels"][here][1:], sample["labels"][1:])
            pixels.append(sample["pixel_values"])
        assert torch.equal(found["pixel_values"], torch.cat(pixels))
        tokens += len(found["input_ids"])
    assert tokens == sum(len(mixed[index]["input_ids"]) for index in range(60))
    assert packed.fill == pytest.approx(tokens / (len(packed) * row_length))


def test_packing_does_not_change_the_samples(build):
    dataset = build([{"text": "some words"}] * 2)
    before = dataset[0]["labels"].clone()
    PackedDataset(dataset, 64)[0]
    assert torch.equal(dataset[0]["labels"], before)


def test_rows_follow_the_seed(mixed):
    def rows(seed):
        packed = PackedDataset(mixed, 128, seed=seed)
        return [packed.samples(row).tolist() for row in range(len(packed))]

    assert rows(0) == rows(0) != rows(1)
    # Not the longest first, as first-fit-decreasing leaves them.
    lengths = PackedDataset(mixed, 128).lengths
    longest = [max(lengths[row]) for row in rows(0)]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("row_length, max_length", [(40, 8192), (512, 40)])
def test_samples_longer_than_a_row_are_skipped_named_and_counted(build, caplog, monkeypatch, row_length, max_length):
    monkeypatch.setattr(MMLogger.get_current_instance(), "handlers", [caplog.handler])
    dataset = build([{"text": "many words " * 40}, {"text": "few"}, {"text": "few more"}], max_length=max_length)
    with caplog.at_level(logging.INFO):
        packed = PackedDataset(dataset, row_length)
    assert packed.skipped == 1 and [sorted(packed.samples(row)) for row in range(len(packed))] == [[1, 2]]
    assert "d.jsonl:1: " in caplog.text and "more than the 40 that a row takes: skipped" in caplog.text
    assert f"2 samples packed into 1 rows of {row_length} tokens" in caplog.text
    assert f"{packed.fill:.1%} filled, 1 longer samples skipped" in caplog.text


def test_nothing_that_fits_is_an_error(build):
    with pytest.raises(UserError, match="every sample is longer than 10 tokens"):
        PackedDataset(build([{"text": "many words " * 40}]), 10)


def test_row_length_below_one_is_named():
    with pytest.raises(UserError, match="row_length is 0, expected at least 1 token"):
        PackedDataset({}, 0)


def test_an_image_that_grew_since_its_tokens_were_counted_is_named(build, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    dataset = build([{"conversations": turns, "image": "red.png"}])
    dataset.processor.max_tiles, before = 4, dataset.processor.max_tiles
    try:
        packed = PackedDataset(dataset, 512, cache_dir=tmp_path / "kept")
        Image.new("RGB", (128, 32), "red").save(tmp_path / "red.png")
        for again in (packed, PackedDataset(dataset, 512, cache_dir=tmp_path / "kept")):
            with pytest.raises(UserError, match="d.jsonl:1: .* tokens were counted, but now there are .*clear .*kept"):
                again[0]
    finally:
        dataset.processor.max_tiles = before


def test_rows_collate_with_padding_as_a_segment_of_its_own(mixed):
    packed = PackedDataset(mixed, 128)
    rows = sorted((packed[row] for row in range(len(packed))), key=lambda row: len(row["input_ids"]))
    short, long = rows[0], rows[-1]
    data = conversation_collate([short, long])["data"]
    length, padding = len(short["input_ids"]), len(long["input_ids"]) - len(short["input_ids"])
    assert padding > 0
    assert data["attention_mask"].tolist() == [[1] * length + [0] * padding, [1] * (length + padding)]
    assert torch.equal(data["segment_ids"][1], long["segment_ids"])
    assert torch.equal(data["segment_ids"][0, :length], short["segment_ids"])
    assert not set(data["segment_ids"][0, length:].tolist()) & set(short["segment_ids"].tolist())
    assert (data["labels"][0, length:] == -100).all()
    assert data["pixel_values"].shape[0] == short["pixel_values"].shape[0] + long["pixel_values"].shape[0]


@pytest.fixture
def doubtful(build, tmp_path):
    """Function that opens 30 lines, of which one is broken, one too long, one has no header and two a torn image."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    lines = [{"text": f"text {number}"} for number in range(30)]
    lines[3], lines[7] = {"txt": "broken"}, {"text": "many words " * 40}
    lines[11] = {"conversations": turns, "image": "text.png"}
    lines[13] = lines[17] = {"conversations": turns, "image": "torn.png"}
    return lambda **kwargs: build(lines, **kwargs)


def test_bad_samples_are_in_no_row_or_leave_a_gap(doubtful):
    packed = PackedDataset(doubtful(max_bad_fraction=0.2), 60)
    assert [(entry.line, entry.reason) for entry in packed.bad] == [
        *((4, "format"), (8, "too_long"), (12, "unreadable_image"))
    ]
    assert packed.skipped == 2
    rows = [packed[row] for row in range(len(packed))]
    skipped = [entry for row in rows for entry in row["skipped"]]
    assert sorted(entry.line for entry in skipped) == [14, 18]
    assert {entry.reason for entry in skipped} == {"unreadable_image"}
    lines = [line for row in rows for _, line in row["keys"]]
    assert sorted(lines) == sorted(set(range(30)) - {3, 7, 11, 13, 17})
    assert sorted(line for row in rows for _, line in row["looked_at"]) == sorted(set(range(30)) - {3, 7, 11})
    for row in rows:
        assert row["segment_ids"].unique().tolist() == list(range(len(row["keys"])))


def test_a_row_of_bad_samples_is_replaced_by_the_next(doubtful):
    dataset = doubtful(max_bad_fraction=0.2)
    # Rows that just hold an image.
    packed = PackedDataset(dataset, dataset.count_tokens(0, 13))
    rows = [packed[row] for row in range(len(packed)) if dataset.index[packed.samples(row)[0], 1] in (13, 17)]
    assert len(rows) == 2
    for row in rows:
        assert row["keys"] and row["skipped"] and len(row["looked_at"]) == len(row["keys"]) + len(row["skipped"])


def test_more_bad_samples_than_allowed_are_refused_before_rows_are_made(doubtful):
    doubtful(max_bad_fraction=0.05)
    message = "10.00% of 30 lines are bad samples, .*: 1 format, 1 too_long, 1 unreadable_image"
    with pytest.raises(UserError, match=message):
        PackedDataset(doubtful(max_bad_fraction=0.05), 60)
    with pytest.raises(UserError, match="d.jsonl:4: is an object with"):
        PackedDataset(doubtful(), 60)
