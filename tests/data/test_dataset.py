"""Samples of a conversation dataset."""

import copy
import json

import pytest
import torch
from mmengine.logging import MMLogger
from PIL import Image

from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.video import read_frames
from xtuner_ext.errors import BadSample, UserError
from xtuner_ext.modeling.processing import HybridVLProcessor

from .malformed import write_video


@pytest.fixture
def processor(digits_processor):
    return HybridVLProcessor(digits_processor.tokenizer, image_size=64, tokens_per_tile=16, max_tiles=6)


@pytest.fixture
def build(tmp_path, processor):
    Image.new("RGB", (192, 128), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "square.png")

    def build(lines, fields=(), **kwargs):
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", **dict(fields)}}))
        return ConversationDataset(tmp_path / "d.json", processor, "internlm2_chat", **kwargs)

    return build


def line(question, answer="yes", image=None):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": conversations, **({"image": image} if image else {})}


def trained(sample, tokenizer):
    return tokenizer.decode(sample["input_ids"][sample["labels"] != -100])


def test_sample_holds_the_rendered_conversation_and_the_tiles(build, processor, tmp_path):
    sample = build([line("What?", "red", "wide.png")])[0]
    tokenizer = processor.tokenizer
    image = "<img>" + "<IMG_CONTEXT>" * 16 * 7 + "</img>"
    assert tokenizer.decode(sample["input_ids"]) == (
        f"<s><|im_start|>user\n{image}\nWhat?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    )
    assert trained(sample, tokenizer) == "red<|im_end|>"
    with Image.open(tmp_path / "wide.png") as picture:
        torch.testing.assert_close(sample["pixel_values"], processor.tiles(picture))


def test_text_sample_has_no_tiles(build):
    assert build([line("What?")])[0]["pixel_values"].shape == (0, 3, 64, 64)


@pytest.mark.parametrize(
    ("limit", "images", "tiles"),
    [(None, 1, 6 + 1), (None, 2, 2 * (2 + 1)), (None, 7, 7), (12, 2, 2 * (6 + 1)), (1, 1, 1)],
)
def test_tile_limit_is_shared_by_the_images(build, processor, limit, images, tiles):
    fields = {} if limit is None else {"max_dynamic_patch": limit}
    sample = build([line("<image>" * images, image=["wide.png"] * images)], fields)[0]
    assert sample["pixel_values"].shape[0] == tiles
    context = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (sample["input_ids"] == context).sum() == 16 * tiles


@pytest.mark.parametrize("question", ["<image> and <image>", "<image>then\n<image>\n"])
def test_tokens_are_those_of_the_whole_text(build, processor, question):
    dataset = build([line(question + "?", image=["wide.png", "square.png"])])
    found, question = dataset[0], processor.expand(question, [2 + 1, 1])
    text = f"<s><|im_start|>user\n{question}?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    expected = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert found["input_ids"].tolist() == expected and len(found["labels"]) == len(expected)
    assert trained(found, processor.tokenizer) == "yes<|im_end|>"


def test_a_visual_token_that_a_text_names_claims_no_slot(build, processor):
    words = "What is <img><IMG_CONTEXT></img>?"
    dataset = build([line(f"<image>{words}", f"{words} It is", "square.png")])
    ids = dataset[0]["input_ids"]
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum() == 16
    assert processor.tokenizer.decode(ids).count(words) == 2 and dataset.count_tokens(0, 0) == len(ids)


def test_images_keep_the_order_of_their_placeholders(build, processor):
    sample = build([line("<image> and <image>", image=["square.png", "wide.png"])], {"max_dynamic_patch": 2})[
        0
    ]
    blue, red = sample["pixel_values"][0], sample["pixel_values"][1]
    assert blue[2].mean() > blue[0].mean() and red[0].mean() > red[2].mean()


@pytest.mark.parametrize(("repeat_time", "count"), [(1, 8), (3, 24), (0.5, 4), (2.25, 18)])
def test_repeat_time_gives_exact_counts(build, repeat_time, count):
    dataset = build([line(f"q{n}") for n in range(8)], {"repeat_time": repeat_time})
    assert len(dataset) == count
    chosen = [dataset.record(index).turns[0][0] for index in range(count)]
    assert all(int(repeat_time) <= chosen.count(f"q{n}") <= int(repeat_time) + 1 for n in range(8))


def test_fractional_repeat_time_is_chosen_by_the_seed(build):
    def chosen(seed):
        dataset = build([line(f"q{n}") for n in range(40)], {"repeat_time": 0.5}, seed=seed)
        return [dataset.record(index).id for index in range(len(dataset))]

    assert chosen(0) == chosen(0) != chosen(1)
    assert chosen(0) != list(range(1, 21))


def test_repeat_time_that_keeps_nothing_is_an_error(build):
    with pytest.raises(UserError, match="d.json gives no sample, its repeat_time is too small"):
        build([line("q")], {"repeat_time": 0.1})


def test_too_long_sample_is_replaced_by_the_next_and_named_in_the_log(build, processor, caplog, monkeypatch):
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    dataset = build([line("What? " * 50), line("ok", "fits")], max_length=40)
    assert trained(dataset[0], processor.tokenizer) == "fits<|im_end|>"
    assert "d.jsonl:1: " in caplog.text and "more than max_length=40: skipped" in caplog.text


def test_dataset_of_too_long_samples_is_an_error(build):
    with pytest.raises(UserError, match="every sample is longer than max_length=10 tokens"):
        build([line("What? " * 50)], max_length=10)[0]


def test_unreadable_image_names_line_and_file(build, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    dataset = build([line("a", image="text.png"), line("b", image="torn.png")])
    for index, name in enumerate(("text.png", "torn.png")):
        with pytest.raises(UserError, match=f"d.jsonl:{index + 1}: .*{name} is not a readable image"):
            dataset[index]


def test_image_that_vanished_is_named(build, tmp_path):
    dataset = build([line("a", image="square.png")])
    (tmp_path / "square.png").unlink()
    with pytest.raises(UserError, match="d.jsonl:1: image .*square.png does not exist"):
        dataset[0]


def test_text_conversations_and_images_mix(build, processor, tmp_path):
    text = {"text": "Plain <image> words.", "end": True}
    dataset = build([text, line("q", image="square.png"), {**line("q"), "end": False}])
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": "More words"}))
    (tmp_path / "e.json").write_text(json.dumps({name: {"annotation": f"{name}.jsonl"} for name in "de"}))
    mixed = ConversationDataset(tmp_path / "e.json", processor, "internlm2_chat")
    assert (len(dataset), len(mixed)) == (3, 4)
    found = [trained(mixed[index], processor.tokenizer) for index in range(4)]
    assert found == ["Plain <image> words.<|im_end|>", "yes<|im_end|>", "yes", "More words"]
    batch = conversation_collate([mixed[index] for index in range(4)])["data"]
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[0] == 4
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_text_with_an_end_needs_an_end_token(build, processor):
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.eos_token = None
    dataset = build([{"text": "a", "end": True}])
    with pytest.raises(UserError, match="d.jsonl:1: 'end' is true, but the tokenizer has no end-of-sequence token"):
        dataset[0]


@pytest.fixture
def video(tmp_path):
    """A video of two seconds, ``film.mp4``."""
    write_video(tmp_path / "film.mp4")
    return {"video": "film.mp4"}


@pytest.mark.parametrize("question", ["<video>\nWhat?", "Look: <video> What?", "What?"])
def test_video_is_shown_frame_by_frame(build, processor, tmp_path, video, question):
    frames = {"sampling": "middle", "min_frames": 3, "max_frames": 3}
    dataset = build([{**line(question, "red"), **video}], frames=frames)
    sample, image = dataset[0], "<img>" + "<IMG_CONTEXT>" * 16 + "</img>"
    shown = "\n".join(f"Frame-{number}: {image}" for number in (1, 2, 3))
    asked = question.replace("<video>", shown) if "<video>" in question else f"{shown}\nWhat?"
    assert processor.tokenizer.decode(sample["input_ids"]) == (
        f"<s><|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    )
    chosen = read_frames(tmp_path / "film.mp4", "", dataset.frames)
    torch.testing.assert_close(
        sample["pixel_values"], torch.cat([processor.tiles(frame, max_tiles=1) for frame in chosen])
    )
    assert sample["pixel_values"].shape == (3, 3, 64, 64)
    assert dataset.count_tokens(0, 0) == len(sample["input_ids"])


def test_frames_follow_seed_and_line_alone(build, video):
    def pixels(seed, index=0):
        frames = {"min_frames": 2, "max_frames": 6}
        return build([{**line("What?"), **video}] * 6, seed=seed, frames=frames)[index]["pixel_values"]

    assert torch.equal(pixels(0), pixels(0))
    assert len({len(pixels(0, index)) for index in range(6)}) > 1
    assert any(not torch.equal(a, b) for a, b in zip(pixels(0), pixels(1)))


def test_a_video_that_is_too_long_is_not_decoded(build, video, monkeypatch):
    monkeypatch.setattr("xtuner_ext.data.dataset.read_frames", lambda *_: pytest.fail("decoded"))
    dataset = build([{**line("What?"), **video}], max_length=200)
    with pytest.raises(BadSample, match="d.jsonl:1: [0-9]+ tokens, more than max_length=200") as caught:
        dataset.encode(0)
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize("media", [{"image": "wide.png"}, {"video": "film.mp4"}])
def test_a_text_model_takes_neither_images_nor_videos(build, processor, video, media):
    processor.tokens_per_tile = 0
    dataset = build([line("q"), {**line("What?"), **media}], max_bad_fraction=0.6)
    assert [entry.reason for entry in dataset[1]["skipped"]] == ["no_images_allowed"]
    with pytest.raises(BadSample, match="d.jsonl:2: names .*, but the model has no image front end"):
        dataset.encode(1)


def test_augmentation_follows_seed_and_line_alone(build, tmp_path):
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")

    def pixels(seed, augment=True, index=0):
        return build([line("a", image="noise.png")] * 9, {"data_augment": augment}, seed=seed)[index]["pixel_values"]

    plain = pixels(0, augment=False)
    assert torch.equal(pixels(0), pixels(0)) and not torch.equal(pixels(0), plain)
    assert any(not torch.equal(pixels(0), pixels(0, index=index)) for index in range(1, 9))
    assert any(not torch.equal(pixels(0), pixels(seed)) for seed in range(1, 9))
    assert torch.equal(pixels(0, augment=False, index=1), plain)


@pytest.mark.parametrize("length, warned", [(2, False), (None, False), (5, True)])
def test_a_length_that_is_none_is_warned_of(build, caplog, monkeypatch, length, warned):
    monkeypatch.setattr(MMLogger.get_current_instance(), "handlers", [caplog.handler])
    build([line("a"), line("b")], {"length": length})
    assert ("d.json: dataset 'd' has length 5, but" in caplog.text and "has 2 lines" in caplog.text) == warned


def test_only_bad_samples_are_an_error(build, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    dataset = build([line("a", image="text.png")] * 3, max_bad_fraction=1.0)
    with pytest.raises(UserError, match="every sample is bad; the first is .*d.jsonl:1: .*text.png is not a readable"):
        dataset[0]
    with pytest.raises(UserError, match="gives no sample, every line is bad; the first is .*d.jsonl:1: "):
        build([{"txt": "a"}], max_bad_fraction=1.0)


def test_bad_lines_above_the_limit_are_an_error_at_once(build):
    lines = [line("a"), {"txt": "b"}, line("c"), line("d", image="gone.png")]
    assert len(build(lines, max_bad_fraction=0.5)) == 2
    message = r"50.00% of 4 lines of .*d.json are bad samples, .*: 1 format, 1 missing_file; the first is .*d.jsonl:2: "
    with pytest.raises(UserError, match=message):
        build(lines, max_bad_fraction=0.4)
