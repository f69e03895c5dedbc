"""The verb `eval --bench`: every benchmark from its official files to scores, and mistakes."""

import json

import openpyxl
import pytest

from tests.evaluation.benchmarks import test_choices as choices
from tests.evaluation.benchmarks import test_images as pictures
from tests.evaluation.benchmarks import test_short_answers as short
from tests.evaluation.benchmarks.toys import embedded, lines, picture, table
from xtuner_ext.cli.main import run
from xtuner_ext.evaluation.benchmarks import BENCHMARKS


def _vqa(name):
    return lambda folder, _: short.test_vqa_of_coco(folder, name, "internvl")


# Each writes a benchmark's files, and checks what is read from them on its way.
WRITERS = {
    "gqa": lambda folder, _: short.test_gqa(folder, "official"),
    "pope": lambda folder, _: short.test_pope(folder, "lines"),
    "mme": lambda folder, _: short.test_mme(folder, "release"),
    "mmbench": lambda folder, _: choices.test_mmbench(folder),
    "ccbench": lambda folder, _: table(folder / "CCBench_legacy.tsv", choices._mmbench()),
    "seed": lambda folder, _: choices.test_seed(folder, "official"),
    "scienceqa": lambda folder, _: choices.test_scienceqa_with_images(folder, True),
    "vqav2": _vqa("vqav2"),
    "textvqa": lambda folder, _: short.test_textvqa(folder, "internvl"),
    "okvqa": _vqa("okvqa"),
    "vizwiz": lambda folder, _: short.test_vizwiz(folder, "internvl"),
    "chartqa": lambda folder, _: short.test_chartqa(folder, "internvl"),
    "docvqa": lambda folder, _: short.test_docvqa(folder, "internvl"),
    "infovqa": lambda folder, _: short.test_infovqa(folder),
    "coco_caption": lambda folder, patch: pictures.test_coco_captions(folder, True, patch),
    "refcoco": lambda folder, _: pictures.test_refcoco_as_internvl(folder),
    "mmvm": lambda folder, _: choices.test_mmvm(folder),
    "mmvm_number": lambda folder, _: choices.test_mmvm_number(folder),
}
SPLITS = {"refcoco": "refcoco+_testA"}


def scores(out):
    """tuple[list[dict], dict]: Rows and metrics."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return rows, json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_from_files_to_scores(name, tiny_teacher, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    with monkeypatch.context() as patch:
        WRITERS[name](data, patch)
    words = ["eval", str(tiny_teacher), "--bench", name, "--data", str(data), "--out", str(out)]
    split = ["--split", SPLITS[name]] if name in SPLITS else []
    assert run([*words, *split, "--limit", "2", "--max-new-tokens", "9"]) == 0
    shown = capsys.readouterr().out
    rows, metrics = scores(out)
    bench = BENCHMARKS[name]
    assert f"on {name}, {split[1] if split else bench.splits[0]}" in shown
    assert f"{len(rows)} questions, 0 without an answer" in shown
    assert (metrics["benchmark"], metrics["mode"], metrics["count"]) == (name, "both", len(rows))
    assert set(metrics["reports"]) == {"reference", "robust"} and metrics["questions_of_split"] >= len(rows) > 0
    assert metrics["settings"]["min_new_tokens"] == bench.settings["min_new_tokens"]
    assert metrics["settings"]["max_new_tokens"] == 9 and metrics["settings"]["template"] == "internlm2_chat"
    assert rows[0]["prompt"] == metrics["first_prompt"] and metrics["versions"]["torch"]
    for mode, report in metrics["reports"].items():
        # Scores follow from the rows alone.
        assert json.loads(json.dumps(bench.score(rows, mode))) == report


@pytest.fixture
def pope(tmp_path):
    """A file of POPE's form whose third answer the two modes read otherwise."""
    picture(tmp_path / "val2014" / "a.jpg")
    golds = ["yes", "yes", "no", "no"]
    items = [{"question_id": n, "image": "a.jpg", "text": f"Is {n}?", "label": g} for n, g in enumerate(golds)]
    lines(tmp_path / "pope.jsonl", items)
    return ["eval", "--bench", "pope", "--data", str(tmp_path / "pope.jsonl")]


def test_answers_that_are_there_are_scored_in_both_modes(pope, tmp_path, capsys):
    said = ["Yes", "yes.", " NO \ud800", None]
    lines(tmp_path / "llava.jsonl", [{"question_id": n, "text": text} for n, text in enumerate(said)])
    out = tmp_path / "scores"
    assert run([*pope, "--rows", str(tmp_path / "llava.jsonl"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    # The official program knows no NO.
    assert "reference" in shown and "robust" in shown
    assert "4 questions, 1 without an answer" in shown
    rows, metrics = scores(out)
    assert [metrics["reports"][mode]["scores"]["accuracy"] for mode in ("reference", "robust")] == [50.0, 75.0]
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert rows[2]["meta"]["reference"] == {"parsed": "yes", "correct": False} and rows[2]["prediction"] == "NO ?"
    assert run([*pope, "--rows", str(out / "rows.jsonl"), "--mode", "robust", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["mode"] == "robust" and list(again["reports"]) == ["robust"]
    assert again["reports"]["robust"] == metrics["reports"]["robust"]
    lines(tmp_path / "llava.jsonl", [{"question_id": 9, "text": "x"}])
    assert run([*pope, "--rows", str(tmp_path / "llava.jsonl")]) == 2
    assert "llava.jsonl:1: id 9 is that of no question" in capsys.readouterr().err


def test_what_a_server_takes_is_written_for_whole_splits(tiny_teacher, tmp_path, monkeypatch):
    choices_file = tmp_path / "mmbench_dev_20230712.tsv"
    table(choices_file, choices._mmbench())
    words = ["eval", str(tiny_teacher), "--bench", "mmbench", "--data", str(choices_file), "--max-new-tokens", "2"]
    out = tmp_path / "out"
    assert run([*words, "--out", str(out)]) == 0
    sheet = openpyxl.load_workbook(out / "submission.xlsx").active
    rows, _ = scores(out)
    assert [row[6] or "" for row in sheet.iter_rows(min_row=2, values_only=True)] == [r["prediction"] for r in rows]
    assert run([*words, "--out", str(out), "--limit", "2", "--seed", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "rows.jsonl"]
    drawn, metrics = scores(out)
    assert (metrics["limit"], metrics["seed"], len(drawn)) == (2, 3, 2)
    assert [row["id"] for row in rows if row["id"] in {one["id"] for one in drawn}] == [row["id"] for row in drawn]


def test_images_are_cut_as_the_kit_does_unless_the_model_is_not_asked_so(digits_processor, tmp_path):
    from xtuner_ext.evaluation.tasks import BenchmarkTask, digest

    table(tmp_path / "t.tsv", [{"index": 1, "question": "?", "A": "a", "B": "b", "answer": "A", "image": embedded()}])
    task = BenchmarkTask("mmbench", tmp_path / "t.tsv")
    before = digest(task.questions)
    task.limit_tiles(digits_processor)
    assert [question["max_tiles"] for question in task.questions] == [None]
    task.limit_tiles(digits_processor, 3)
    assert [question["max_tiles"] for question in task.questions] == [3] and digest(task.questions) != before


def test_the_list_of_benchmarks(capsys):
    assert run(["eval", "--bench", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BENCHMARKS) and "refcoco+_testA" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--bench", "popo"], "there is no benchmark 'popo', expected one of gqa, pope"),
        (["m", "--bench", "pope", "--data", ".", "--out", "x", "--split", "moon"], "pope has no split 'moon'"),
        (["m", "--bench", "pope", "--data", ".", "--out", "x"], "pope is read from: llava_pope_test.jsonl (optional);"),
        (["m", "--data", "d", "--out", "x", "--mode", "robust"], "--mode is given without --bench"),
        (["m", "--bench", "pope", "--data", ".", "--rows", "r"], "--rows is given with a model"),
        (["--bench", "pope", "--data", ".", "--rows", "r", "--limit", "1"], "--rows is given with --limit"),
        (["--bench", "pope", "--data", ".", "--out", "x"], "eval has no model folder"),
        (["m", "--data", "d"], "eval has no --out"),
        (["m", "--out", "d"], "eval has no --data"),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["eval", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
