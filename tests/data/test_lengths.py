"""Counted lengths are those of the encoded samples, whatever the images, and are kept."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.lengths import UNKNOWN, sample_lengths
from xtuner_ext.errors import UserError
from xtuner_ext.modeling.processing import HybridVLProcessor

from .malformed import write_video

ORIENTATION = 0x0112
# Aspect ratio 2.24: two tiles lying, ten standing.
ODD = (448, 200)


def save_turned(path, size, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", size, "red").save(path, exif=exif, **options)


def save_png_with_late_exif(path, size):
    """A PNG that tells its rotation after the pixels."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    Image.new("RGB", size, "red").save(path)
    whole = path.read_bytes()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    # The last chunk, IEND, takes 12 bytes.
    path.write_bytes(whole[:-12] + chunk + whole[-12:])


@pytest.fixture
def build(tmp_path, digits_processor):
    Image.new("RGB", (192, 128)).save(tmp_path / "wide.png")
    Image.new("RGB", (40, 400)).save(tmp_path / "tall.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    save_turned(tmp_path / "turned.jpg", ODD)
    save_turned(tmp_path / "turned.webp", ODD)
    save_png_with_late_exif(tmp_path / "late.png", ODD)
    write_video(tmp_path / "film.mp4")
    Image.new("RGB", ODD).save(tmp_path / "odd.png")

    def build(lines, fields=(), settings=(), template="internlm2_chat", **kwargs):
        processor = HybridVLProcessor(
            digits_processor.tokenizer, **{"image_size": 64, "tokens_per_tile": 16, "max_tiles": 12, **dict(settings)}
        )
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", **dict(fields)}}))
        return ConversationDataset(tmp_path / "d.json", processor, template, **kwargs)

    return build


def line(question, answer="yes", image=None):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": conversations, **({"image": image} if image else {})}


IMAGES = ["wide.png", "tall.jpg", "square.png", "turned.jpg", "turned.webp", "late.png", "odd.png"]
LINES = [
    *(line("What?", "red", image) for image in IMAGES),
    line("<image> and<image>then <image>?", image=["wide.png", "odd.png", "tall.jpg"]),
    {"conversations": line("one")["conversations"] + line("two, longer")["conversations"]},
    {"text": "Plain <image> words.", "end": True},
    {"text": "More"},
    *({**line(f"And {number}: <video>", "yes"), "video": "film.mp4", "clip": [0, 1.5]} for number in range(3)),
]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_thumbnail": False}, {"max_tiles": 1}, {"fit": "pad"}, {"image_start": "", "image_end": ""}],
    ids=["tiles", "no-thumbnail", "one-tile", "square", "bare"],
)
@pytest.mark.parametrize("fields", [{}, {"max_dynamic_patch": 10}], ids=["limit", "own-limit"])
def test_counts_are_the_lengths_of_the_encoded_samples(build, settings, fields):
    dataset = build(LINES, fields, settings)
    assert sample_lengths(dataset).tolist() == [len(dataset[index]["input_ids"]) for index in range(len(LINES))]


def test_rotation_matters_in_this_test(build):
    lengths = dict(zip(IMAGES, sample_lengths(build(LINES))))
    assert lengths["turned.jpg"] == lengths["late.png"] == lengths["turned.webp"] > lengths["odd.png"]


def test_pixels_are_not_read(build, tmp_path):
    dataset = build([line("What?", image=image) for image in ("wide.png", "tall.jpg", "turned.jpg")])
    expected = sample_lengths(dataset)
    for name in ("wide.png", "tall.jpg", "turned.jpg"):
        whole = (tmp_path / name).read_bytes()
        # PNG keeps its size in the first bytes, JPEG before the scan: FF DA and 12 bytes that describe it.
        (tmp_path / name).write_bytes(whole[: 45 if name.endswith("png") else whole.index(b"\xff\xda") + 16])
    assert (sample_lengths(dataset) == expected).all()


def test_every_line_is_counted_once_however_often_it_is_repeated(build, monkeypatch):
    dataset = build([line(f"q{n} " * n) for n in range(8)], {"repeat_time": 2.5})
    expected = [len(dataset[index]["input_ids"]) for index in range(20)]
    seen, count = [], dataset.count_tokens
    monkeypatch.setattr(dataset, "count_tokens", lambda *where: seen.append(where) or count(*where))
    assert sample_lengths(dataset).tolist() == expected
    assert sorted(seen) == [(0, n) for n in range(8)]


def test_kept_counts_are_used_again(build, tmp_path, monkeypatch):
    lengths = sample_lengths(build(LINES), tmp_path / "kept")
    monkeypatch.setattr(ConversationDataset, "count_tokens", lambda *_: pytest.fail("counted again"))
    again = build([*LINES], max_length=100, fields={"repeat_time": 2})
    assert sample_lengths(again, tmp_path / "kept").tolist() == [*lengths, *lengths]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_lines_that_an_earlier_run_left_out_are_added(build, tmp_path):
    lines = [line(f"q{n} " * n) for n in range(40)]
    for seed in (0, 1):
        half = build(lines, {"repeat_time": 0.5}, seed=seed)
        assert sample_lengths(half, tmp_path / "kept").tolist() == sample_lengths(half).tolist()
    (path,) = (tmp_path / "kept").iterdir()
    assert 20 < (np.load(path) > 0).sum() < 40


@pytest.mark.parametrize(
    "change",
    [
        dict(lines=[*LINES[1:], LINES[0]]),
        dict(fields={"max_dynamic_patch": 2}),
        dict(settings={"tokens_per_tile": 4}),
        dict(template="qwen2"),
    ],
    ids=["annotations", "limit", "processor", "template"],
)
def test_what_the_counts_depend_on_makes_them_counted_anew(build, tmp_path, change):
    sample_lengths(build(LINES), tmp_path / "kept")
    changed = build(**{"lines": LINES, **change})
    assert sample_lengths(changed, tmp_path / "kept").tolist() == sample_lengths(changed).tolist()
    assert len(list((tmp_path / "kept").iterdir())) == 2


def _count_in_a_process(rank, folder, processor):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    dataset = ConversationDataset(folder / "d.json", processor, "internlm2_chat")
    counted, count = [], dataset.count_tokens
    dataset.count_tokens = lambda *where: counted.append(where) or count(*where)
    for turn in range(2):
        np.save(folder / f"{rank}_{turn}.npy", sample_lengths(dataset, folder / "kept"))
        np.save(folder / f"{rank}_{turn}_counted.npy", len(counted))
    torch.distributed.destroy_process_group()


def test_processes_share_the_work_and_agree(build, tmp_path):
    dataset = build(LINES)
    expected = sample_lengths(dataset)
    torch.multiprocessing.spawn(_count_in_a_process, (tmp_path, dataset.processor), nprocs=2)
    for rank, share in enumerate((7, 7)):
        for turn in range(2):
            assert (np.load(tmp_path / f"{rank}_{turn}.npy") == expected).all()
            assert np.load(tmp_path / f"{rank}_{turn}_counted.npy") == share


def test_samples_that_cannot_be_counted_are_known_by_their_length(build, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    lines = [line("a"), line("b", image="text.png"), line("c")]
    lengths = sample_lengths(build(lines, max_bad_fraction=0.5), tmp_path / "kept")
    assert (lengths == UNKNOWN).tolist() == [False, True, False]
    with pytest.raises(UserError, match="d.jsonl:2: .*text.png is not a readable image"):
        sample_lengths(build(lines))
    # One that was repaired is counted.
    Image.new("RGB", (64, 64)).save(tmp_path / "text.png")
    assert sample_lengths(build(lines), tmp_path / "kept").min() > 0


def test_a_damaged_file_is_replaced(build, tmp_path):
    dataset = build(LINES)
    lengths = sample_lengths(dataset, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert (sample_lengths(dataset, tmp_path / "kept") == lengths).all()
    assert (np.load(path) == lengths).all()


def test_a_folder_that_cannot_be_written_is_named(build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir .*file cannot be written"):
        sample_lengths(build(LINES), tmp_path / "file")


def test_a_dataset_without_lengths_is_named():
    with pytest.raises(UserError, match="range does not tell the lengths of its samples"):
        sample_lengths(range(3))
