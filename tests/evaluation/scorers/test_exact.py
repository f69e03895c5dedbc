"""Exact match and accuracy."""

import pytest

from xtuner_ext.evaluation.scorers import exact_match, score_rows


@pytest.mark.parametrize(
    ("prediction", "gold", "correct"),
    [
        ("Yes.", "yes", True),
        ("  top   left\n", "Top left", True),
        ("yes .", "yes", True),
        ("3.5", "3.5", True),
        ("no", "yes", False),
        ("yes, it is", "yes", False),
        ("1 2 3", "12 3", False),
        ("3..", "3", False),
        ("", "yes", False),
    ],
)
def test_case_blanks_and_one_full_stop_do_not_count(prediction, gold, correct):
    assert exact_match(prediction, gold)[1] is correct


def test_parsed_is_what_was_compared():
    assert exact_match(" Top  LEFT. ", "x")[0] == "top left"


def test_accuracy_overall_and_by_category():
    rows = [dict(category=c, correct=r) for c, r in (("b", True), ("a", False), ("b", True), ("b", False))]
    assert score_rows(rows) == {
        "accuracy": 0.5,
        "count": 4,
        "by_category": {
            "a": {"accuracy": 0.0, "count": 1},
            "b": {"accuracy": pytest.approx(2 / 3), "count": 3},
        },
    }


def test_no_rows_score_zero():
    assert score_rows([]) == {"accuracy": 0.0, "count": 0, "by_category": {}}
