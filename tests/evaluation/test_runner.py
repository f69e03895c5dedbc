"""Questions, prompts and batched answers."""

import json

import pytest
from PIL import Image

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.templates import get_template
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.runner import answer, read_questions, render, stop_token_ids

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


@pytest.mark.parametrize("template", ["internlm2-chat", "internlm2_chat"])
def test_prompt_is_what_training_saw_up_to_the_answer(conversations, digits_processor, template):
    dataset = ConversationDataset(conversations, digits_processor, template)
    samples = [dataset[0]["input_ids"], *[dataset[1]["input_ids"]] * 2]
    for question, trained in zip(read_questions(conversations), samples, strict=True):
        prompt = render(get_template(template), question["turns"], question["system"])
        images = [Image.open(path) for path in question["images"]]
        ids = digits_processor(prompt, images=images)["input_ids"][0]
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
