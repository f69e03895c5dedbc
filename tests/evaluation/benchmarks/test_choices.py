"""MMBench, CCBench, SEED-Bench, ScienceQA and MMVM: read, asked as their kits do, scored by hand."""

import json

import openpyxl
import pytest

from tests.evaluation.benchmarks.toys import answer, dump, embedded, lines, picture, prompt, table
from xtuner_ext.data.dataset import open_image
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation import benchmarks

LETTER = "Answer with the option's letter from the given choices directly."
M = 1_000_000


def _mmbench(answers=("A", "B", "B", "C")):
    facts = [(1, None, "x"), (2, "Look.", "y"), (M + 1, None, "x"), (M + 2, "Look.", "y")]
    pictures = [embedded("red"), embedded("blue"), 1, 2]
    return [
        {
            "index": index,
            "question": "What?",
            "hint": hint,
            "A": "dog",
            "B": "cat",
            "C": "cow" if hint else None,
            "D": None,
            "answer": gold,
            "category": category,
            "image": image,
            "source": "s",
            "l2-category": "AR",
            "comment": "c",
            "split": "dev",
        }
        for (index, hint, category), gold, image in zip(facts, answers, pictures)
    ]


def test_mmbench(tmp_path):
    table(tmp_path / "mmbench_dev_20230712.tsv", _mmbench())
    bench, questions, rows = answer("mmbench", tmp_path, ["A", "(B)", "B. cat", "B"])
    assert prompt(questions[0]) == f"<image>\nWhat?\nA. dog\nB. cat\n{LETTER}"
    assert prompt(questions[1]) == f"<image>\nLook.\nWhat?\nA. dog\nB. cat\nC. cow\n{LETTER}"
    assert open_image(questions[3]["images"][0], "").getpixel((0, 0)) == (0, 0, 255)
    for mode in ("reference", "robust"):
        report = bench.score(rows, mode)
        assert (report["scores"]["circular"], report["scores"]["vanilla"]) == (50.0, 100.0)
        assert report["by"]["category"] == {"x": {"accuracy": 100.0, "count": 1}, "y": {"accuracy": 0.0, "count": 1}}
        assert report["by"]["split"] == {"dev": {"accuracy": 50.0, "count": 2}}


def test_mmbench_test_is_handed_in_as_a_sheet(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in _mmbench()]
    table(tmp_path / "mmbench_test_en_20231003.tsv", rows)
    said = ["=1+1", "B\x00\ud800", None, "x" * 40_000]
    bench, questions, rows = answer("mmbench", tmp_path, said, "test_en")
    assert questions[0]["gold"] is None and bench.score(rows)["scores"] == {}
    bench.submission(rows, tmp_path / "up.xlsx", "test_en")
    sheet = openpyxl.load_workbook(tmp_path / "up.xlsx").active
    head, *cells = sheet.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert [line[0] for line in cells] == [1, 2, M + 1, M + 2]
    assert [line[6] for line in cells][:3] == ["=1+1", "B?", None] and len(cells[3][6]) == 32767
    assert sheet["G2"].data_type == "s"


def test_chinese_and_own_tables(tmp_path):
    (tmp_path / "mmbench").mkdir()
    table(tmp_path / "mmbench" / "CCBench_legacy.tsv", _mmbench())
    assert prompt(benchmarks.get("ccbench").read(tmp_path)[0]).endswith("\n请直接回答选项字母。")
    picture(tmp_path / "images" / "a.png")
    row = {"index": 0, "question": "Is it?", "A": "yes", "B": "no", "answer": "B", "image_path": "a.png"}
    table(tmp_path / "mine.tsv", [row])
    bench, questions, rows = answer("mmbench", tmp_path / "mine.tsv", ["no"])
    assert prompt(questions[0]) == f"<image>\nIs it?\nA. yes\nB. no\n{LETTER}"
    assert bench.score(rows)["scores"]["vanilla"] == 100.0
    table(tmp_path / "mine.tsv", [{**row, "question": "是吗?"}])
    assert prompt(benchmarks.get("mmbench").read(tmp_path / "mine.tsv")[0]).endswith("\n请直接回答选项字母。")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "answer is 'E', expected one of A, B"),
        ({"index": "x"}, "index is 'x', expected a whole number"),
    ],
)
def test_broken_rows_of_mmbench(tmp_path, change, message):
    table(tmp_path / "t.tsv", [{**_mmbench()[0], **change}])
    with pytest.raises(UserError, match=f"t.tsv:2: {message}"):
        benchmarks.get("mmbench").read(tmp_path / "t.tsv")


def _seed():
    return {
        "question_type": {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10},
        "questions": [
            {
                "question_id": f"{n}",
                "question": "What?",
                "question_type_id": kind,
                "answer": gold,
                "data_id": f"p{n}",
                "data_type": "image" if kind < 10 else "video",
                "choice_a": "dog",
                "choice_b": "cat",
                "choice_c": "cow",
                "choice_d": "pig",
            }
            for n, kind, gold in ((1, 1, "A"), (2, 1, "B"), (3, 2, "C"), (4, 10, "D"))
        ],
    }


ASKED = f"What?\nA. dog\nB. cat\nC. cow\nD. pig\n{LETTER}"


@pytest.mark.parametrize("layout", ["internvl", "llava", "official"])
def test_seed(tmp_path, layout):
    root = tmp_path / ("SEED" if layout == "internvl" else "seed_bench")
    dump(root / "SEED-Bench.json", _seed())
    for number in range(1, 5):
        _file(root / "SEED-Bench-image" / f"p{number}")
    item = [{"question_id": n, "image": f"SEED-Bench-image/p{n}", "text": ASKED} for n in range(1, 5)]
    if layout == "internvl":
        lines(root / "seed.jsonl", [{**one, "answer": "?"} for one in item])
    if layout == "llava":
        lines(root / "llava-seed-bench.jsonl", item)
    bench, questions, rows = answer("seed", tmp_path, ["A", "Because", "D"])
    assert prompt(questions[0]) == f"<image>\n{ASKED}" and questions[0]["category"] == "Scene Understanding"
    report = bench.score(rows, "reference")
    assert report["scores"]["image"] == 2 / 3 * 100 and report["by"]["type"]["Instance Identity"]["accuracy"] == 0.0
    for file in (*root.glob("*.jsonl"), *root.glob("SEED*.json")):
        assert [one["gold"] for one in bench.read(file)] == ["A", "B", "C"]
    bench, _, rows = answer("seed", tmp_path, ["A", "A", "D", "D"], "all")
    assert bench.score(rows)["scores"] == {"total": 50.0, "image": 1 / 3 * 100, "video": 100.0}
    bench.submission(rows, tmp_path / "up.jsonl")
    found = [json.loads(line) for line in (tmp_path / "up.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in found] == ["A", "A", "D", "D"]


def _file(path):
    picture(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)


def test_seed_lines_alone(tmp_path):
    _file(tmp_path / "p1")
    lines(tmp_path / "seed.jsonl", [{"question_id": 1, "image": "p1", "text": ASKED, "answer": "B"}])
    for data in (tmp_path, tmp_path / "seed.jsonl"):
        bench, _, rows = answer("seed", data, ["cat"])
        assert bench.score(rows)["scores"]["total"] == 100.0


def _problems():
    facts = {"split": "test", "choices": ["dog", "cat"], "question": "Which?", "grade": "grade3"}
    return {
        "5": {**facts, "answer": 0, "hint": "A hint.", "image": "image.png", "subject": "natural science"},
        "7": {**facts, "answer": 1, "hint": "", "image": None, "subject": "language science"},
        "9": {**facts, "answer": 1, "hint": "", "image": "image.png", "subject": "social science", "grade": "grade8"},
    }


@pytest.mark.parametrize("known", [False, True])
def test_scienceqa_with_images(tmp_path, known):
    root = tmp_path / "scienceqa"
    items = []
    for key in ("5", "9"):
        picture(root / "images" / "test" / key / "image.png")
        problem = _problems()[key]
        items.append(
            {
                "image": f"data/scienceqa/images/test/{key}/image.png",
                "question": "Which?",
                "hint": problem["hint"],
                "choices": problem["choices"],
                "answer": problem["answer"],
            }
        )
    lines(root / "scienceqa_test_img.jsonl", items)
    if known:
        dump(root / "problems.json", _problems())
    bench, questions, rows = answer("scienceqa", tmp_path, ["A", "(B"])
    assert prompt(questions[0]) == f"<image>\nA hint.\nWhich?\nA. dog\nB. cat\n{LETTER}"
    assert prompt(questions[1]) == f"<image>\nWhich?\nA. dog\nB. cat\n{LETTER}"
    assert [question["id"] for question in questions] == (["5", "9"] if known else [1, 2])
    report = bench.score(rows, "reference")
    assert report["scores"]["accuracy"] == 50.0 and report["official_crashes"] == 1
    assert ("subject" in report["by"]) is known
    assert bench.score(rows)["scores"]["accuracy"] == 100.0


@pytest.mark.parametrize("layout", ["llava", "official"])
def test_scienceqa_whole(tmp_path, layout):
    dump(tmp_path / "problems.json", _problems())
    for key in ("5", "9"):
        picture(tmp_path / "images" / "test" / key / "image.png")
    if layout == "official":
        dump(tmp_path / "pid_splits.json", {"test": ["5", "7", "9"]})
    else:
        dump(
            tmp_path / "llava_test_CQM-A.json",
            [
                {
                    "id": key,
                    **({"image": f"{key}/image.png"} if problem["image"] else {}),
                    "conversations": [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "x"}],
                }
                for key, problem in _problems().items()
            ],
        )
    bench, questions, rows = answer("scienceqa", tmp_path, ["A", "The answer is B.", "A"], "all")
    assert questions[1]["images"] == [] and prompt(questions[1]).endswith(f"\n{LETTER}")
    assert layout == "official" or prompt(questions[0]) == f"<image>\nWhich?\n{LETTER}"
    scores = bench.score(rows, "reference")["scores"]
    assert scores["accuracy"] == pytest.approx(100 / 3) and scores["image_accuracy"] == 50.0
    assert scores["accuracy (LLaVA's letters)"] == pytest.approx(200 / 3)
    assert set(bench.score(rows)["by"]["subject"]) == {"LAN", "NAT", "SOC"}


def _mmvm(number, gold, kinds, **more):
    images = [f"match_bench/case_{number}/{name}.jpg" for name in ("FRAME00", "FRAME01_CAND")]
    return {
        "index": number,
        "image_path": str(images),
        "image_path_v3": str(images),
        "question": "Which one?",
        "question_v3": "Which?",
        "choices": None,
        "answer": gold,
        "match_type": kinds,
        **more,
    }


def _write_mmvm(path, rows):
    """Cells of several lines are quoted."""
    cells = [list(rows[0])] + [
        ['"A. 1\nB. 2\nC. None"' if k == "choices" else str(v) for k, v in r.items()] for r in rows
    ]
    path.write_text("".join("\t".join(line) + "\n" for line in cells))


def test_mmvm(tmp_path):
    rows = [_mmvm(0, "A", "[1, 5]"), _mmvm(1, "C", "[2]")]
    for number in (0, 1):
        for name in ("FRAME00", "FRAME01_CAND"):
            picture(tmp_path / "match_bench" / f"case_{number}" / f"{name}.jpg")
    _write_mmvm(tmp_path / "mllm_match_eval_full.tsv", rows)
    bench, questions, joined = answer("mmvm", tmp_path, ["A. 1", "object 2"])
    assert prompt(questions[0]) == "Image-1: <image>\nImage-2: <image>\nWhich one?"
    assert [path.name for path in questions[0]["images"]] == ["FRAME00.jpg", "FRAME01_CAND.jpg"]
    report = bench.score(joined, "reference")
    assert report["scores"]["overall"] == 50.0
    assert {kind: part["accuracy"] for kind, part in report["by"]["match"].items()} == {
        "CL": 100.0,
        "SP": 0.0,
        "RP": 100.0,
    }
    assert prompt(bench.read(tmp_path, "v3")[0]).endswith("\nWhich?")


def test_mmvm_number(tmp_path):
    picture(tmp_path / "match_bench" / "a.jpg")
    facts = {"question": "Which one?", "match_type": "[8]"}
    rows = [
        {"index": 1, **facts, "answer": 12, "image": str([embedded(), embedded("blue")])},
        {"index": 2, **facts, "answer": 3, "image": str([embedded(), embedded("blue")])},
    ]
    table(tmp_path / "MMVMBench.tsv", rows)
    bench, questions, joined = answer("mmvm_number", tmp_path, ["The object is 12", "3"])
    assert open_image(questions[0]["images"][1], "").getpixel((0, 0)) == (0, 0, 255)
    assert bench.score(joined, "reference")["scores"] == {"overall": 50.0}
    assert bench.score(joined)["scores"] == {"overall": 100.0}
