"""Scores side by side: numbers by hand, refusals by name."""

import json

import pytest

from xtuner_ext.cli.main import run
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.paired import compare_scores


def write(folder, said, gold=("1", "2", "3", "4"), metrics=None, ids=None):
    """A folder of scores."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "id": key,
            "question": "How many?",
            "prompt": "p",
            "prediction": text,
            "parsed": text,
            "gold": right,
            "correct": text == right,
            "category": "count",
            "meta": {"source": "d.jsonl:1"},
        }
        for key, text, right in zip(ids or ["a", "b", "c#0", "c#1"], said, gold)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps({"model": folder.name, **(metrics or {})}))
    return str(folder)


def test_numbers_by_hand(tmp_path):
    teacher = write(tmp_path / "teacher", ["1", "2", "0", "0"])
    student = write(tmp_path / "student", ["0", "2", "3", "4"])
    again = write(tmp_path / "again", ["1", "2", "0", "9"])
    result = compare_scores([teacher, student, again])
    assert [model["score"] for model in result["models"]] == [50.0, 75.0, 50.0]
    first, second = result["differences"]
    assert (first["difference"], first["better"], first["worse"], first["changed"]) == (25.0, 2, 1, 3)
    # Three units: -1 of one question, 0 of one, +2 of two; the extremes are three times the same.
    assert (first["low"], first["high"], first["p"]) == (-100.0, 100.0, 1.0)
    assert (second["difference"], second["low"], second["high"], second["changed"]) == (0.0, 0.0, 0.0, 1)
    assert [change["id"] for change in result["changed"]] == ["a", "c#0", "c#1"]
    assert result["changed"][2]["answers"][again] == {"prediction": "9", "correct": False}


def test_the_verb_prints_and_writes_it(tmp_path, capsys):
    one, two = write(tmp_path / "one", ["1", "2", "[b]0", "0"]), write(tmp_path / "two", ["1", "2", "3", "4"])
    out = tmp_path / "out"
    assert run(["eval", "--compare", one, two, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "+50.00" in shown and "[b]0 (0)" in shown and "2 of 2 answers whose mark changed" in shown
    assert [json.loads(line)["id"] for line in (out / "changed.jsonl").read_text().splitlines()] == ["c#0", "c#1"]
    assert json.loads((out / "comparison.json").read_text())["differences"][0]["better"] == 2
    assert run(["eval", "--compare", one, two, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changed"]) == 2
    assert run(["eval", "--compare", one, two, "--out", one]) == 2
    assert "one holds other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": ("1", "2", "3", "5")}, "answer different questions: gold of 'c#1' is '4' in the one and '5' in the"),
        ({"ids": ["a", "x", "c#0", "c#1"]}, "answer different questions: id of 'b' is 'b' in the one and 'x'"),
        ({"said": ["1", "2"]}, "has 4 answers and .*other has 2"),
        ({"metrics": {"benchmark": "pope"}}, "has benchmark None and .*other 'pope': not comparable"),
    ],
)
def test_other_questions_are_refused_by_name(tmp_path, changes, message):
    one = write(tmp_path / "one", ["1", "2", "3", "4"])
    other = write(tmp_path / "other", **{"said": ["1", "2", "3", "4"], **changes})
    with pytest.raises(UserError, match=message):
        compare_scores([one, other])


def test_folders_that_hold_no_scores(tmp_path):
    one = write(tmp_path / "one", ["1", "2", "3", "4"])
    with pytest.raises(UserError, match="--compare got 1 folder, expected at least two"):
        compare_scores([one])
    with pytest.raises(UserError, match="one folder twice"):
        compare_scores([one, one])
    with pytest.raises(UserError, match="gone has no rows.jsonl, expected a folder that `xtuner-ext eval --out` wrote"):
        compare_scores([one, str(tmp_path / "gone")])
    (tmp_path / "one" / "rows.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: has no 'question'"):
        compare_scores([one, write(tmp_path / "two", ["1", "2", "3", "4"])])


def test_rotated_forms_are_one_unit(tmp_path):
    def circular(name, said):
        folder = write(tmp_path / name, said, metrics={"benchmark": "mmbench", "split": "dev", "mode": "both"})
        rows = [json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        for row, index in zip(rows, (1, 2, 1_000_001, 1_000_002)):
            row["meta"]["index"] = index
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    result = compare_scores([circular("one", ["1", "0", "3", "0"]), circular("two", ["1", "2", "3", "4"])])
    assert result["settings"]["units"] == 2 and result["differences"][0]["low"] == 0.0
