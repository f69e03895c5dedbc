"""The verb `compare`: numbers, tables, and what it refuses."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.cli.main import run
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.evaluation.runner import read_questions


@pytest.fixture(scope="module")
def data(digits):
    return str(digits / "test.json")


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_model, tiny_teacher):
    """Folder of a random hybrid of the tiny teacher's shape."""
    folder = tmp_path_factory.mktemp("students") / "hybrid"
    tiny_model("linear_attention", "full_attention", "linear_attention").save_pretrained(folder)
    load_processor(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_text_model, digits_processor):
    """A Llama with the digits' tokenizer, transformers' own model of it, and a meta file of plain text."""
    folder = tmp_path_factory.mktemp("text")
    model = write_text_model(folder / "llama", "llama", vocab_size=400, max_position_embeddings=512)
    tokenizer = digits_processor.tokenizer
    tokenizer.save_pretrained(folder / "llama")
    lines = [{"id": "a", "text": "Is there a 7 in the top row?"}, {"id": "b", "text": "What is 2 plus 3? It is 5."}]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "text.json").write_text(json.dumps({"plain": {"annotation": "text.jsonl"}}))
    return folder / "llama", model, str(folder / "text.json")


def report(capsys, *argv):
    assert run(["compare", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_teacher_keeps_all_of_itself(tiny_teacher, data, capsys):
    found = report(capsys, tiny_teacher, tiny_teacher, "--data", data)
    (row,) = found["students"]
    assert abs(row["kl"]) < 1e-6 and row["agreement"] == 1
    assert row["perplexity"] == row["teacher_perplexity"]
    assert row["alignment"]["text"] == row["alignment"]["image"] == 0
    sizes = ("parameters", "cache_bytes")
    assert {key: row[key] for key in sizes} == {key: found["teacher"][key] for key in sizes}


def test_json_of_students(tiny_teacher, student, data, capsys):
    found = report(capsys, tiny_teacher, student, tiny_teacher, "--data", data, "--limit", "5", "--batch-size", "2")
    assert [row["model"] for row in found["students"]] == [str(student), str(tiny_teacher)]
    row = found["students"][0]
    assert row["kl"] > 0.01 and 0 <= row["agreement"] < 1
    assert row["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
    assert row["parameters"] == sum(parameter.numel() for parameter in load_teacher(student).parameters())
    assert row["cache_bytes"]["65536"] < found["teacher"]["cache_bytes"]["65536"]
    assert sum(part["tokens"] for part in row["by_category"].values()) == row["tokens"]
    assert (found["data"], found["teacher"]["model"]) == (data, str(tiny_teacher))
    assert found["settings"] == {"template": "internlm2_chat", "dtype": "torch.float32", "limit": 5}
    assert found["versions"]["torch"] and "accuracy" not in found["teacher"]
    # The order of the models decides who is asked to imitate whom.
    (other,) = report(capsys, student, tiny_teacher, "--data", data, "--limit", "5")["students"]
    assert other["kl"] != row["kl"] and other["agreement"] == row["agreement"]


def test_accuracy_is_that_of_eval(tiny_teacher, student, data, tmp_path, capsys):
    options = ["--data", data, "--max-new-tokens", "3"]
    found = report(capsys, tiny_teacher, student, *options, "--accuracy")
    for row, folder in ((found["teacher"], tiny_teacher), (found["students"][0], student)):
        assert run(["eval", str(folder), *options, "--out", str(tmp_path / folder.name), "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert row["accuracy"] == {key: scores[key] for key in row["accuracy"]} and row["accuracy"]["count"] == 12


def test_a_limit_takes_questions_from_the_whole_data(tiny_teacher, student, data, capsys):
    found = report(capsys, tiny_teacher, student, "--data", data, "--accuracy", "--max-new-tokens", "1", "--limit", "4")
    kinds = [question["category"] for question in read_questions(data)]
    spread = Counter(kinds[index * len(kinds) // 4] for index in range(4))
    assert spread != Counter(kinds[:4])
    scores = found["teacher"]["accuracy"]["by_category"]
    assert {name: part["count"] for name, part in scores.items()} == spread


def test_tables(tiny_teacher, student, data, capsys):
    argv = ["compare", str(tiny_teacher), str(student), "--data", data, "--limit", "6"]
    assert run(argv) == 0
    plain = capsys.readouterr()
    assert "same first word" in plain.out and "error, images" in plain.out and "accuracy" not in plain.out
    assert "compare" in plain.err and "6/6" in plain.err
    assert run([*argv, "--accuracy", "--max-new-tokens", "2"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_plain_text_against_transformers_own_loss(text, tmp_path, capsys):
    """KL of 0 between one model and itself; its perplexity is that of the original implementation."""
    folder, model, data = text
    found = report(capsys, folder, folder, "--data", data)
    (row,) = found["students"]
    assert abs(row["kl"]) < 1e-6 and row["agreement"] == 1
    assert row["alignment"]["text"] == 0 and row["alignment"]["image"] is None
    dataset = ConversationDataset(data, load_processor(folder), "internlm2_chat")
    losses = []
    for sample in (dataset[0], dataset[1]):
        with torch.no_grad():
            logits = model(sample["input_ids"][None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, sample["labels"][1:], ignore_index=-100, reduction="none"))
    losses = torch.cat(losses)
    losses = losses[losses != 0]
    assert row["tokens"] == len(losses)
    assert row["teacher_perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-3)
    assert run(["compare", str(folder), str(folder), "--data", data]) == 0
    output = capsys.readouterr().out
    assert "error, text" in output and "error, images" not in output


def test_a_teacher_without_template_asks_for_one(text, tmp_path, capsys):
    folder, _, data = text
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (plain / path.name).write_bytes(path.read_bytes())
    assert run(["compare", str(plain), str(plain), "--data", data]) == 2
    assert "choose one with --prompt-template" in capsys.readouterr().err
    found = report(capsys, plain, folder, "--data", data, "--prompt-template", "vicuna")
    assert found["settings"]["template"] == "vicuna" and abs(found["students"][0]["kl"]) < 1e-6


def test_one_model_alone_is_not_enough(tiny_teacher, data, capsys):
    assert run(["compare", str(tiny_teacher), "--data", data]) == 2
    assert "compare got 1 model, expected a teacher and at least one student" in capsys.readouterr().err


def test_models_that_do_not_belong_together(tiny_teacher, student, text, data, tmp_path, capsys):
    folder, _, plain = text
    assert run(["compare", str(tiny_teacher), str(folder), "--data", data]) == 2
    assert f"{folder} has 400 words, its teacher" in capsys.readouterr().err
    assert run(["compare", str(folder), str(folder), "--data", data]) == 2
    assert "names an image, but the model has no image front end" in capsys.readouterr().err


MISTAKES = {
    "data": (["--data", "gone.json"], "meta file gone.json does not exist"),
    "limit": (["--limit", "0"], "--limit is 0, expected at least 1"),
    "batch size": (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
    "length": (["--max-length", "0"], "--max-length is 0, expected at least 1"),
    "template": (["--prompt-template", "vicunia"], "unknown prompt template 'vicunia'"),
}


@pytest.mark.parametrize("argv, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(tiny_teacher, data, argv, message, capsys):
    assert run(["compare", str(tiny_teacher), str(tiny_teacher), "--data", data, *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_student_that_does_not_exist_is_named_before_anything_is_measured(tiny_teacher, data, tmp_path, capsys):
    gone = tmp_path / "gone"
    assert run(["compare", str(tiny_teacher), str(tiny_teacher), str(gone), "--data", data]) == 2
    error = capsys.readouterr().err
    assert f"model folder {gone} does not exist" in error and "12/12" not in error
