"""POPE."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import pope


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, "no") for text in ("No", "No.", "no,", "Yes, not sure", "There is no dog")]
    + [(text, "yes") for text in ("NO", "", "None", "\nNo", "No\n", "No;", "Yes. No", ". No", "Not really", "cannot")],
)
def test_official_rule(text, expected):
    assert pope.mark([row(text, "yes")], "reference") == [(expected, expected == "yes")]


def test_measures_by_category_and_in_all():
    # Of "a": 2 true yes, 1 false yes, 1 false no, 1 true no. Of "b": one true yes.
    said = [("Yes", "yes"), ("Yes", "yes"), ("Yes", "no"), ("No", "yes"), ("No", "no")]
    rows = numbered(*(row(text, gold, category="a") for text, gold in said), row("Yes", "yes", category="b"))
    for mode in ("reference", "robust"):
        report = pope.score(rows, mode)
        a, b = report["by"]["category"]["a"], report["by"]["category"]["b"]
        assert a == {
            "f1": pytest.approx(200 / 3),
            "accuracy": 60.0,
            "precision": pytest.approx(200 / 3),
            "recall": pytest.approx(200 / 3),
            "yes_ratio": 60.0,
            "count": 5,
        }
        assert (b["f1"], b["accuracy"]) == (100.0, 100.0)
        assert report["scores"]["macro_f1"] == pytest.approx((200 / 3 + 100) / 2)
        assert report["scores"]["f1"] == pytest.approx(75.0)
        assert report["scores"]["yes_ratio"] == pytest.approx(400 / 6)


def test_robust_counts_an_unclear_answer_as_wrong_and_not_as_yes():
    rows = numbered(row("maybe", "yes"), row("maybe", "no"), row("yes", "yes"))
    robust, reference = pope.score(rows), pope.score(rows, "reference")
    assert robust["scores"]["accuracy"] == pytest.approx(100 / 3) and robust["unparsed"] == 2
    assert (robust["scores"]["precision"], robust["scores"]["recall"]) == (100.0, 50.0)
    assert reference["scores"]["accuracy"] == pytest.approx(200 / 3) and reference["unparsed"] == 0


def test_nothing_is_divided_by_zero():
    report = pope.score([row("no", "no")], "reference")
    assert report["scores"]["f1"] == report["scores"]["precision"] == report["scores"]["recall"] == 0.0
