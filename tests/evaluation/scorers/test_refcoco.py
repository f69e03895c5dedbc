"""RefCOCO."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.scorers import refcoco

# An image of 200 x 100 with a box in its left half.
META = {"box": [0, 0, 100, 100], "width": 200, "height": 100}


def _row(text):
    return row(text, META["box"], **META)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0, 0, 500, 1000]", True),
        ("[[0, 0, 500, 1000]]", True),
        ("<box>[[0, 0, 500, 1000]]</box>", True),
        ("[0.0, 0.0, 0.5, 1.0]", True),
        ("[0, 0, 1000, 1000]", True),  # half and no more is enough here
        ("[500, 0, 1000, 1000]", False),
        ("(0, 0, 500, 1000)", False),
        ("[a, b, c, d]", False),
        ("[0, 0, 500]", False),
        ("[nan, 0, 1, 1]", False),
        ("[1, 1, 1, 1]", False),
        ("", False),
    ],
)
def test_internvl_reads_square_brackets(text, expected):
    assert refcoco.mark([_row(text)], "reference")[0][1] is expected


@pytest.mark.parametrize(
    ("text", "box_format", "expected"),
    [
        ("[0, 0, 500, 1000]", "auto", True),
        ("(0,0),(500,1000)", "auto", True),
        ("{<0><0><50><100>}", "auto", True),
        ("[0.0, 0.0, 0.5, 1.0]", "auto", True),
        ("[0, 0, 50, 100]", "percent", True),
        ("[0, 0, 50, 100]", "thousand", False),
        ("[0, 0, 499, 999]", "999", True),
        ("[0, 0, 100, 100]", "pixel", True),
        ("[100, 100, 0, 0]", "pixel", True),  # corners the other way round
        ("[0, 0, 2000, 100]", "auto", False),
        ("it is at 0, 0, 500, 1000.", "auto", True),
        ("[0, 0, 1000, 1000]", "auto", False),  # half is not more than half
        ("[0, 0, 500]", "auto", False),
        ("1 2", "auto", False),
    ],
)
def test_robust_reads_every_usual_form(text, box_format, expected):
    assert refcoco.mark([_row(text)], "robust", box_format)[0][1] is expected


def test_scores_of_both_kits():
    rows = numbered(_row("[0, 0, 500, 1000]"), _row("{<0><0><50><100>}</s>"), _row(None), _row("9" * 5000 + " 1 2 3"))
    report = refcoco.score(rows, "reference")
    assert report["scores"] == {"accuracy": 25.0, "accuracy (XTuner's boxes)": 25.0}
    assert report["official_crashes"] == 1 and report["missing"] == 1
    assert refcoco.score(rows)["scores"] == {"accuracy": 50.0}


def test_unknown_form():
    with pytest.raises(UserError, match="box format is 'inch', expected one of auto, unit"):
        refcoco.score([_row("1")], box_format="inch")
