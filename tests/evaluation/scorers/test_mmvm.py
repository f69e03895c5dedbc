"""MMVM."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import mmvm

OPTIONS = {"A": "1", "B": "2", "C": "12", "D": "None of the above choices are correct"}


@pytest.mark.parametrize(
    ("text", "reference", "robust"),
    [
        ("B", "B", "B"),
        ("A. 1", "A", "A"),
        ("2", "B", "B"),
        ("12", "Z", "C"),  # 1 and 2 are part of 12
        ("object 12", "Z", "C"),
        ("The object is number 2.", "B", "B"),
        ("I see 3 marks, the answer is 12", "Z", "C"),
        ("None of the above choices are correct", "D", "D"),
        ("it could be 1 or 2", "Z", None),
        ("7", "Z", None),
        ("obj", "Z", None),
        ("", "Z", None),
    ],
)
def test_letters_without_a_judge_or_a_guess(text, reference, robust):
    rows = [row(text, "A", options=OPTIONS)]
    assert mmvm.mark(rows, "reference") == [(reference, reference == "A")]
    assert mmvm.mark(rows, "robust") == [(robust, robust == "A")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 3, 5]", ["CL", "TM", "RP"]),
        ("[8]", ["OM"]),
        ("[9, 0]", ["SP", "SP"]),
        ("[]", []),
        ("4", ["SZ"]),
        ("colour", ["CL", "RP"]),
        ("[1", ["CL", "RP"]),
        (None, ["SP"]),
    ],
)
def test_match_types(text, expected):
    assert mmvm.match_kinds(text) == expected


def test_a_case_counts_in_every_type():
    rows = numbered(
        row("A", "A", options=OPTIONS, match_type="[1, 5]"), row("B", "A", options=OPTIONS, match_type="[5]")
    )
    for mode in ("reference", "robust"):
        report = mmvm.score(rows, mode)
        assert report["scores"] == {"overall": 50.0}
        assert report["by"]["match"] == {"CL": {"accuracy": 100.0, "count": 1}, "RP": {"accuracy": 50.0, "count": 2}}


@pytest.mark.parametrize(
    ("text", "reference", "robust"),
    [
        ("12", True, True),
        (" 12\n", True, True),
        ("The object is 12.", False, True),
        ("12 or 3", False, False),
        ("", False, False),
    ],
)
def test_numbers(text, reference, robust):
    rows = [row(text, "12", match_type="[2]")]
    assert mmvm.mark_number(rows, "reference")[0][1] is reference
    assert mmvm.mark_number(rows, "robust")[0][1] is robust
    assert mmvm.score_number(rows)["by"]["match"]["SP"]["count"] == 1
