"""MMBench, CCBench, SEED-Bench and ScienceQA."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import mmbench, scienceqa, seed
from xtuner_ext.evaluation.scorers.common import MODES

OPTIONS = {"A": "cow", "B": "dog", "C": "bird"}
M = 1_000_000


def _mmbench(index, text, gold, category="x"):
    l2 = "AR" if category == "x" else "LR"
    return row(text, gold, index, category, index=index, options=OPTIONS, **{"l2-category": l2})


@pytest.mark.parametrize("mode", MODES)
def test_a_question_is_right_when_all_its_rotations_are(mode):
    rows = [_mmbench(1, "A", "A"), _mmbench(2, "B", "B", "y"), _mmbench(M + 1, "(C)", "B"), _mmbench(M + 2, "A.", "A")]
    rows += [_mmbench(3, "nothing", "A")]
    report = mmbench.score(rows, mode)
    assert (report["scores"]["circular"], report["scores"]["vanilla"]) == (1 / 3 * 100, 2 / 3 * 100)
    assert report["by"]["category"] == {"x": {"accuracy": 0.0, "count": 2}, "y": {"accuracy": 100.0, "count": 1}}
    assert report["by"]["l2-category"]["LR"] == {"accuracy": 100.0, "count": 1}
    assert report["questions"] == 3


def test_xtuner_and_vlmevalkit_read_letters_differently():
    rows = [_mmbench(1, "Answer: B", "B"), _mmbench(2, "AB", "A")]
    scores = mmbench.score(rows, "reference")["scores"]
    assert scores == {
        "circular": 50.0,
        "vanilla": 50.0,
        "circular (XTuner's letters)": 0.0,
        "vanilla (XTuner's letters)": 0.0,
    }
    assert "circular (XTuner's letters)" not in mmbench.score(rows)["scores"]


def test_a_test_split_has_no_scores():
    report = mmbench.score([_mmbench(1, "A", None), _mmbench(2, None, None)])
    assert report["scores"] == {} and report["headline"] is None and report["missing"] == 1


def test_no_answer_is_not_right_for_no_gold():
    rows = [_mmbench(1, None, None), _mmbench(2, "A", "A"), _mmbench(3, "???", None)]
    assert mmbench.score(rows)["scores"]["vanilla"] == pytest.approx(100 / 3)


def _seed(number, text, gold, kind):
    return row(text, gold, number, f"kind {kind}", options=OPTIONS, type=kind)


def test_seed_counts_the_first_character_and_has_zero_for_a_type_with_nothing_right():
    rows = [_seed(1, "A", "A", 1), _seed(2, "Because", "B", 1), _seed(3, "C.", "A", 2), _seed(4, "", "A", 10)]
    report = seed.score(rows, "reference")
    assert report["scores"] == {"total": 50.0, "image": 2 / 3 * 100, "video": 0.0, "exact match": 25.0}
    assert report["by"]["type"]["kind 2"] == {"accuracy": 0.0, "count": 1}
    assert report["official_crashes"] == 1 and seed.mark(rows, "reference")[3] == ("IndexError", False)
    robust = seed.score(rows)
    assert robust["scores"] == {"total": 25.0, "image": 1 / 3 * 100, "video": 0.0}
    assert robust["unparsed"] == 2


def test_seed_without_videos_or_types():
    assert set(seed.score([_seed(1, "A", "A", 3)])["scores"]) == {"total", "image"}
    assert seed.score([row("A", "A", options=OPTIONS)])["scores"] == {"total": 100.0}


def _science(text, gold, image=True, **meta):
    return row(text, gold, options=OPTIONS, image=image, **meta)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B. dog", "B"),
        ("(C)", "C"),
        ("the dog", "B"),
        ("Because cat", "B"),
        ("Answer: C", "A"),
        ("The answer is B.", "The answer is B."),
        ("a", "a"),
        ("(C", "IndexError"),
    ],
)
def test_scienceqa_as_internvl(text, expected):
    assert scienceqa.mark([_science(text, "C")], "reference") == [(expected, expected == "C")]


def test_scienceqa_scores_of_both_kits():
    rows = numbered(
        _science("(C", "C", subject="natural science", grade="grade2", hint=""),
        _science("The answer is B.", "B", subject="social science", grade="grade9", hint="x"),
        _science("A", "A", image=False, subject="language science", grade="grade12", hint=""),
        _science(None, "A", subject="natural science", grade="grade6", hint="x"),
    )
    report = scienceqa.score(rows, "reference")
    assert report["scores"] == {
        "accuracy": 25.0,
        "image_accuracy": 0.0,
        "accuracy (LLaVA's letters)": 50.0,
        # The missing answer is left out here, as LLaVA's program does.
        "image_accuracy (LLaVA's letters)": 50.0,
    }
    assert report["official_crashes"] == 1 and report["missing"] == 1
    robust = scienceqa.score(rows)
    assert robust["scores"] == {"accuracy": 75.0, "image_accuracy": 2 / 3 * 100}
    assert robust["by"]["subject"] == {
        "LAN": {"accuracy": 100.0, "count": 1},
        "NAT": {"accuracy": 50.0, "count": 2},
        "SOC": {"accuracy": 100.0, "count": 1},
    }
    assert {name: part["count"] for name, part in robust["by"]["context"].items()} == {"IMG": 3, "NO": 1, "TXT": 2}
    assert {name: part["count"] for name, part in robust["by"]["grade"].items()} == {"G1-6": 2, "G7-12": 2}
