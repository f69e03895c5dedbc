"""Questions, prompts and batched answers."""

import copy
import json

import pytest
import torch
from PIL import Image

from tests.data.malformed import write_video
from xtuner_ext.cli.loading import load_model
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.templates import get_template
from xtuner_ext.data.video import FrameSampling, read_frames
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.runner import answer, read_questions, stop_token_ids

MIXERS = {
    "attention": ["full_attention"] * 3,
    "linear": ["linear_attention"] * 3,
    "hybrid": ["full_attention", "linear_attention", "linear_attention"],
}


@pytest.fixture
def conversations(tmp_path):
    """Meta JSON of one text line, and of one line with an image in each of its two turns."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "b.png")
    text = {"id": "text", "category": "t", "conversations": _turns("Q", "A")}
    turns = _turns("<image> 1", "A1", "<image> 2", "A2")
    images = {"id": "two", "image": ["a.png", "b.png"], "conversations": turns}
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(text)}\n\n{json.dumps(images)}\n")
    (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    return tmp_path / "d.json"


def _turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_every_turn_is_a_question_with_the_gold_history_and_its_images(conversations):
    text, first, second = read_questions(conversations)
    assert [q["id"] for q in (text, first, second)] == ["text", "two#0", "two#1"]
    assert [q["gold"] for q in (text, first, second)] == ["A", "A1", "A2"]
    assert first["turns"] == [("<image> 1", None)]
    assert second["turns"] == [("<image> 1", "A1"), ("<image> 2", None)]
    names = [[path.name for path in question["images"]] for question in (text, first, second)]
    assert names == [[], ["a.png"], ["a.png", "b.png"]]
    assert (text["category"], second["category"]) == ("t", "all")
    assert second["where"].endswith("d.jsonl:3")


def test_videos_are_asked_about_frame_by_frame(tmp_path, digits_processor, tiny_model):
    write_video(tmp_path / "film.mp4")
    turns = _turns("hello", "A1", "<video> What?", "A2", "And then?", "A3")
    line = {"id": "film", "video": "film.mp4", "clip": [0.5, 1.5], "conversations": turns}
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    before, here, after = questions = read_questions(tmp_path / "d.json")
    assert [question["video"] for question in questions] == [None, *[tmp_path / "film.mp4"] * 2]
    template, model, frames = get_template("internlm2_chat"), tiny_model(), {"sampling": "middle", "max_frames": 9}
    rows = answer(model, digits_processor, template, questions, 3, 4, frames=frames)
    assert rows == answer(model, digits_processor, template, questions, 1, 4, frames=frames)
    shown = "\n".join(f"Frame-{number}: <image>" for number in range(1, 10))
    assert rows[0]["prompt"].count("<image>") == 0 and f"{shown} What?" in rows[1]["prompt"]
    assert rows[2]["prompt"].count("<image>") == 9 and rows[1]["question"] == "<video> What?"
    # What is seen is what is trained on: the same tokens and tiles.
    dataset = ConversationDataset(tmp_path / "d.json", digits_processor, "internlm2_chat", frames=frames)
    pictures = list(read_frames(tmp_path / "film.mp4", "", FrameSampling.of(frames), (0.5, 1.5)))
    sample, seen = dataset._encode(dataset.record(0), [1] * 9)[0].tolist(), []
    model.generate = lambda input_ids, pixel_values, **_: seen.append((input_ids, pixel_values)) or input_ids
    answer(model, digits_processor, template, [after], frames=frames)
    asked = seen[0][0][0].tolist()
    assert sample[: len(asked)] == asked
    assert torch.equal(seen[0][1], torch.cat([digits_processor.tiles(picture, 1) for picture in pictures]))


@pytest.mark.parametrize("limit, tiles", [(None, 7), (4, 5), (2, 3)])
def test_images_have_the_tiles_that_the_dataset_allows(conversations, digits_processor, tiny_model, limit, tiles):
    folder, model, seen = conversations.parent, tiny_model(), []
    Image.new("RGB", (192, 128), "red").save(folder / "a.png")
    conversations.write_text(json.dumps({"d": {"annotation": "d.jsonl", "max_dynamic_patch": limit}}))
    (folder / "d.jsonl").write_text(json.dumps({"image": "a.png", "conversations": _turns("Q", "A")}))
    processor = copy.deepcopy(digits_processor)
    processor.fit, processor.max_tiles = "tiles", 6
    model.generate = lambda input_ids, pixel_values, **_: seen.append(len(pixel_values)) or input_ids
    answer(model, processor, get_template("internlm2_chat"), read_questions(conversations))
    dataset = ConversationDataset(conversations, processor, "internlm2_chat")
    assert seen == [tiles] == [len(dataset[0]["pixel_values"])]


def test_plain_text_asks_nothing(conversations):
    path = conversations.parent / "d.jsonl"
    text = json.dumps({"text": "words"}) + "\n"
    path.write_text(text + path.read_text())
    assert [question["id"] for question in read_questions(conversations)] == ["text", "two#0", "two#1"]
    path.write_text(text)
    with pytest.raises(UserError, match="d.json asks no question, it names plain text only"):
        read_questions(conversations)


def test_limit_takes_the_first_questions(conversations):
    assert [question["id"] for question in read_questions(conversations, limit=2)] == ["text", "two#0"]
    assert len(read_questions(conversations, limit=99)) == 3


@pytest.mark.parametrize("words", ["", "</s> Say <|im_end|> or <img><IMG_CONTEXT></img>"])
@pytest.mark.parametrize("template", ["internlm2-chat", "internlm2_chat"])
def test_prompt_is_what_training_saw_up_to_the_answer(conversations, digits_processor, tiny_model, template, words):
    """Also where a question or an earlier answer mentions control tokens."""
    path = conversations.parent / "d.jsonl"
    path.write_text(path.read_text().replace('"Q"', json.dumps(f"Q{words}")).replace('"A1"', json.dumps(f"A1{words}")))
    dataset = ConversationDataset(conversations, digits_processor, template)
    samples = [dataset[0]["input_ids"], *[dataset[1]["input_ids"]] * 2]
    model, seen = tiny_model(), []
    model.generate = lambda input_ids, **_: seen.append(input_ids[0]) or input_ids
    questions = read_questions(conversations)
    answer(model, digits_processor, get_template(template), questions, batch_size=1)
    for ids, question, trained in zip(seen, questions, samples, strict=True):
        assert ids.tolist() == trained[: len(ids)].tolist()
        rest = digits_processor.tokenizer.decode(trained[len(ids) :])
        assert rest.startswith(question["gold"] + "<|im_end|>")


def test_answers_stop_at_the_end_of_sequence_and_at_stop_words(digits_processor):
    tokenizer = digits_processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer, get_template("internlm2-chat")) == [end]
    # A stop word that is no token of this tokenizer is left out.
    assert stop_token_ids(tokenizer, get_template("phi3-chat")) == [end]


@pytest.mark.parametrize("mixers", MIXERS)
def test_answers_do_not_depend_on_the_batch_size(digits, digits_processor, tiny_model, mixers):
    model = tiny_model(*MIXERS[mixers])
    questions = read_questions(digits / "train.json")
    text = [question for question in questions if not question["images"]]
    questions = [*questions[: 24 - len(text)], *text]
    assert 0 < len(text) < 12 and {len(question["turns"]) for question in questions} == {1, 2, 3}
    counted, found = [], []
    for batch_size in (1, 7, 24):
        rows = answer(
            model, digits_processor, get_template("internlm2_chat"), questions, batch_size, 6, counted.append
        )
        found.append(rows)
    assert found[0] == found[1] == found[2]
    assert counted == [1] * 24 + [7, 7, 7, 3] + [24]
    assert len({row["prediction"] for row in rows}) > 3


def test_the_shipped_teacher_answers_alike_in_batches_of_any_size(digits):
    model, processor = load_model("digits-teacher", "fp32", "cpu")
    questions, template = read_questions(digits / "train.json", 40), get_template("internlm2_chat")
    one, four, sixteen = (answer(model, processor, template, questions, size, 12) for size in (1, 4, 16))
    assert one == four == sixteen
    assert sum(row["correct"] for row in one) > 30


def test_rows_keep_the_order_and_the_facts_of_the_questions(digits, digits_processor, tiny_model):
    questions = read_questions(digits / "test.json")
    template = get_template("internlm2_chat")
    rows = answer(tiny_model(), digits_processor, template, questions, max_new_tokens=3)
    for row, question in zip(rows, questions, strict=True):
        assert list(row) == "id question prompt prediction parsed gold correct category meta".split()
        assert all(row[key] == question[key] for key in ("id", "gold", "category"))
        assert row["prompt"] == template.prompt(row["question"])
        assert row["meta"] == {"source": question["where"]}
        assert row["correct"] is (row["parsed"] == row["gold"])
