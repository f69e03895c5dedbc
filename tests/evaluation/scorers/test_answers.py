"""Visual question answering by ten people, ChartQA and documents."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import anls, chartqa, vqa
from xtuner_ext.evaluation.scorers.common import MODES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("givers", range(11))
def test_agreement_of_ten_people(givers, mode):
    gold = ["The Cat"] * givers + [f"dog {i}" for i in range(10 - givers)]
    parsed, share = vqa.mark([row("cat.", gold)], mode)[0]
    assert parsed == "cat"
    assert share == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1][givers])


def test_vqa_mean_and_types():
    gold = ["red"] * 10
    rows = numbered(
        row("Red", gold, answer_type="other"), row("blue", gold, answer_type="other"), row(None, gold, answer_type="n")
    )
    report = vqa.score(rows, "reference")
    assert report["scores"] == {"accuracy": 1 / 3 * 100} and report["missing"] == 1
    assert report["by"]["answer_type"] == {"n": {"accuracy": 0.0, "count": 1}, "other": {"accuracy": 50.0, "count": 2}}


@pytest.mark.parametrize(
    ("text", "gold", "reference", "robust"),
    [
        ("Answer: red", ["red"] * 10, 0.0, 1.0),
        ("red\nIt is red.", ["red"] * 10, 0.0, 1.0),
        ("red", "red", 0.0, 1.0),
        ("red", ["red"], 0.0, 1.0),
        ("red", ["red", "red", "blue"], (1 / 3 + 1 / 3 + 2 / 3) / 3, 1.0),
        ("", [""] * 10, 1.0, 1.0),
    ],
)
def test_where_vqa_modes_differ(text, gold, reference, robust):
    assert vqa.mark([row(text, gold)], "reference")[0][1] == pytest.approx(reference)
    assert vqa.mark([row(text, gold)], "robust")[0][1] == pytest.approx(robust)


def test_without_gold_there_is_no_score():
    for scorer in (vqa, anls):
        assert scorer.score([row("red", None)])["scores"] == {}


@pytest.mark.parametrize(
    ("text", "gold", "reference", "robust"),
    [
        ("100", "100", True, True),
        ("105", "100", True, True),
        ("95", "100", False, True),  # 5 of 95 are more than 5 %
        ("95.3", "100", True, True),
        ("105.2", "100", True, False),  # 5.2 of 105.2 are less
        ("106", "100", False, False),
        ("5%", "0.05", True, True),
        ("50", "50%", False, False),
        ("0", "0", True, True),
        ("0.0", "0", False, False),
        ("0", "0.01", False, False),
        ("Blue", "blue", True, True),
        (" blue ", "blue", True, True),
        ("blue.", "blue", False, True),
        ("1,000", "1000", False, True),
        ("$5", "5", False, True),
        ("nan", "nan", False, False),
        ("7", ["5", "7"], True, True),
        ("x", ["5", "7"], False, False),
    ],
)
def test_chartqa_is_relaxed(text, gold, reference, robust):
    assert chartqa.mark([row(text, gold)], "reference")[0][1] is reference
    assert chartqa.mark([row(text, gold)], "robust")[0][1] is robust


def test_chartqa_mean_over_both_kinds():
    rows = numbered(
        *(row(text, "7", category=c) for text, c in (("7", "human"), ("7", "augmented"), ("8", "augmented")))
    )
    assert chartqa.score(rows)["scores"] == {"accuracy": 2 / 3 * 100, "mean": 75.0}


@pytest.mark.parametrize(
    ("text", "gold", "reference", "robust"),
    [
        ("hello", ["hello"], 1.0, 1.0),
        ("Hello ", ["hello"], 1.0, 1.0),
        ("hallo", ["hello"], 0.8, 0.8),
        ("he", ["hello"], 0.0, 0.0),
        ("hel", ["hello"], 1 - 2 / 5, 1 - 2 / 5),
        ("a  b", ["a b"], 1.0, 1.0),
        ("a  c", ["a b"], 1 - 1 / 4, 1 - 1 / 3),
        ("x", ["hello", "x"], 1.0, 1.0),
        ("", [""], 1.0, 1.0),
        ("Answer: hello", ["hello"], 0.0, 1.0),
    ],
)
def test_similarity_of_document_answers(text, gold, reference, robust):
    assert anls.mark([row(text, gold)], "reference")[0][1] == pytest.approx(reference)
    assert anls.mark([row(text, gold)], "robust")[0][1] == pytest.approx(robust)


def test_document_scores_by_type():
    rows = numbered(row("hello", ["hello"], evidence=["Map", "Text"]), row("x", ["hello"], evidence=["Text"]))
    report = anls.score(rows)
    assert report["scores"] == {"anls": 50.0}
    assert report["by"]["evidence"] == {"Map": {"accuracy": 100.0, "count": 1}, "Text": {"accuracy": 50.0, "count": 2}}


@pytest.mark.parametrize(
    ("one", "other", "count"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edits(one, other, count):
    assert anls.edits(one, other) == anls.edits(other, one) == count
