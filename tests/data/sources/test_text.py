"""Passages and answers as data sets."""

import json

import pytest

from xtuner_ext.cli.main import run
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.sources import text as source
from xtuner_ext.data.sources.text import make_text
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.runner import read_questions

from .conftest import prose, read_lines

SIZES = dict(passage_tokens=200, train_tokens=6000, held_out_tokens=1500)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is {number} plus 3?\n" for number in range(30)))
    return str(path)


@pytest.fixture
def make(tmp_path, text_teacher, write_documents):
    folder = write_documents()

    def make(name="out", **changes):
        arguments = dict(documents=[str(folder)], answers=0, **SIZES)
        return make_text(tmp_path / name, text_teacher, **{**arguments, **changes})

    return make


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def documents_of(path):
    return {item["id"].rpartition("#")[0] for item in read_lines(path)}


def test_passages_are_split_by_document_and_within_the_limits(make, tmp_path, text_teacher):
    metas = make()
    out = tmp_path / "out"
    assert metas == {split: str(out / f"{split}.json") for split in ("train", "test")}
    train, test = (documents_of(out / f"documents_{split}.jsonl") for split in ("train", "test"))
    assert train and test and not train & test
    facts = json.loads((out / "sources.json").read_text())
    for split, limit in (("train", 6000), ("test", 1500)):
        dataset = ConversationDataset(metas[split], load_processor(text_teacher), "internlm2_chat")
        lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
        assert max(lengths) == 200 and sum(lengths) == facts["tokens"][f"documents_{split}"] <= limit
        assert all(dataset.record(index).category == "document" for index in range(len(dataset)))
    assert sum(lengths) > 1000
    assert {entry["name"]: entry["split"] for entry in facts["documents"]} == {
        **dict.fromkeys(train, "train"),
        **dict.fromkeys(test, "test"),
    }
    assert facts["sources"] == [{"name": "docs", "version": None, "files": 24, "licences": []}]


def test_higher_limit_adds_passages(make, tmp_path):
    make("small", train_tokens=2000)
    make("large")
    small, large = (read_lines(tmp_path / name / "documents_train.jsonl") for name in ("small", "large"))
    assert large[: len(small)] == small and len(large) > len(small)


def test_sources_take_turns_and_bring_their_terms(make, tmp_path, write_documents):
    few = write_documents("few", 2, first=100)
    (few / "LICENSE").write_text("Free for all.")
    make(documents=[str(tmp_path / "docs"), str(few)])
    found = [item["id"].split("/")[0] for item in read_lines(tmp_path / "out" / "documents_train.jsonl")]
    turns = 2 * found.count("few")
    assert found[:turns] == ["docs", "few"] * (turns // 2) and set(found[turns:]) == {"docs"}
    facts = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert facts["sources"][1]["licences"] == ["licences/few-LICENSE"]
    assert (tmp_path / "out" / "licences" / "few-LICENSE").read_text() == "Free for all."


def test_answers_follow_the_template_and_are_repeatable(make, tmp_path, prompts, text_teacher):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        metas = make(name, prompts=prompts, answers=None, max_new_tokens=100, seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a["answers_train.jsonl"] != c["answers_train.jsonl"]
    assert a["documents_train.jsonl"] == c["documents_train.jsonl"]
    lines = {split: read_lines(tmp_path / "c" / f"answers_{split}.jsonl") for split in metas}
    asked = {split: {item["conversations"][0]["value"] for item in lines[split]} for split in lines}
    assert not asked["train"] & asked["test"] and len(asked["train"] | asked["test"]) == 30
    facts = json.loads((tmp_path / "c" / "sources.json").read_text())["answers"]
    cut = [item for split in lines.values() for item in split if item.get("end") is False]
    assert facts["prompts"] == 30 and facts["cut_off"] == len(cut) > 0
    processor = load_processor(text_teacher)
    dataset = ConversationDataset(metas["train"], processor, facts["template"])
    records = [dataset.record(index) for index in range(len(dataset))]
    assert {record.category for record in records} == {"document", "answer"}
    for index, record in enumerate(records):
        if record.turns:
            sample = dataset[index]
            ends = processor.tokenizer.decode(sample["input_ids"]).endswith("<|im_end|>")
            assert ends is record.ended and sample["labels"][-1] == sample["input_ids"][-1]
    assert {question["category"] for question in read_questions(metas["test"])} == {"answer"}


def test_number_of_answers(make, tmp_path, prompts):
    make(prompts=prompts, answers=5, max_new_tokens=4)
    found = [item for path in (tmp_path / "out").glob("answers_*.jsonl") for item in read_lines(path)]
    assert len(found) == 5


def test_same_arguments_leave_a_folder_alone_and_others_are_refused(make, tmp_path):
    make()
    before = files(tmp_path / "out")
    (tmp_path / "docs" / "new.txt").write_text(prose(500))
    make()
    assert files(tmp_path / "out") == before
    with pytest.raises(UserError, match=r"was made with {'passage_tokens': 200}, expected {'passage_tokens': 100}"):
        make(passage_tokens=100)
    assert files(tmp_path / "out") == before
    with pytest.raises(UserError, match="docs is not empty and was not made by make-text"):
        make("docs")


def test_failure_midway_leaves_nothing(make, tmp_path, monkeypatch, prompts):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "sample_answers", fail)
    there = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        make(answers=3, prompts=prompts)
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(passage_tokens=4), "passage_tokens is 4, expected at least 8"),
        (dict(train_tokens=100), "train_tokens is 100, expected at least 200"),
        (dict(held_out_tokens=0), "held_out_tokens is 0, expected at least 200"),
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected at least 1"),
        (dict(answers=-1), "answers is -1, expected at least 0"),
        (dict(documents=["gone"]), "gone does not exist"),
        (
            dict(passage_tokens=5000, train_tokens=9000, held_out_tokens=9000),
            "24 documents give no train passage of 5000 tokens: expected more or longer files",
        ),
    ],
)
def test_mistakes(make, tmp_path, changes, message):
    there = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        make(**changes)
    assert set(tmp_path.iterdir()) == there


def test_verb(tmp_path, text_teacher, write_documents, capsys, monkeypatch):
    folder, out = write_documents(), tmp_path / "out"
    command = ["data", "make-text", str(out), "--teacher", text_teacher, "--answers", "0"]
    command += ["--passage-tokens", "200", "--train-tokens", "6000", "--held-out-tokens", "1500"]
    assert run([*command, "--documents", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"train: {out}/train.json\ntest: {out}/test.json\n"
    assert "read documents: 24/24" in captured.err
    # Without documents the packages are fetched, which needs apt-get.
    monkeypatch.setenv("PATH", str(tmp_path))
    command[2] = str(tmp_path / "other")
    assert run(command) == 2
    assert "--documents, which takes any folder" in capsys.readouterr().err
