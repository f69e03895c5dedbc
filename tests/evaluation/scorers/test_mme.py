"""MME."""

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import mme
from xtuner_ext.evaluation.scorers.common import MODES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No\n", "no"),
        ("yesterday", "yes"),
        ("know", "no"),
        ("I know", "other"),
        ("The answer is yes", "other"),
        ("   no", "other"),
        ("Yes", "yes"),
        ("是", "yes"),
        ("不是", "no"),
        ("True", "yes"),
        ("false.", "no"),
        ("\n\nYes", "yes"),
        ("ye\ns", "yes"),
        ("Yes\tno", "dropped"),
        ("", "other"),
    ],
)
def test_first_four_characters_count(text, expected):
    assert mme.first_letters(text) == expected


def _pairs(task, *answers):
    gold = ("Yes", "No")
    return [row(text, gold[i % 2], category=task, image=f"{i // 2}.jpg") for i, text in enumerate(answers)]


@pytest.mark.parametrize("mode", ["reference", "robust"])
def test_points_are_accuracy_and_images_with_both_right(mode):
    # existence: 3 of 4 right, 1 of 2 images: 75 + 50. code_reasoning: all right: 200.
    rows = numbered(*_pairs("existence", "Yes", "No", "Yes", "Yes"), *_pairs("code_reasoning", "yes", "no"))
    report = mme.score(rows, mode)
    assert report["scores"] == {"perception": 125.0, "cognition": 200.0, "total": 325.0}
    assert report["by"]["subtask"]["existence"] == {"score": 125.0, "accuracy": 75.0, "accuracy+": 50.0, "count": 4}


def test_reference_drops_lines_with_a_tab():
    report = mme.score(numbered(*_pairs("OCR", "Yes", "No\t")), "reference")
    assert report["by"]["subtask"]["OCR"] == {"score": 100.0, "accuracy": 100.0, "accuracy+": 0.0, "count": 2}
    assert mme.score(numbered(*_pairs("OCR", "Yes", "No\t")))["scores"]["total"] == 200.0


def test_reference_pairs_by_order_and_robust_by_image():
    rows = _pairs("OCR", "Yes", "No", "Yes", "Yes")
    mixed = numbered(rows[0], rows[3], rows[2], rows[1])
    # In this order the pairs are right-wrong and right-right; by image they are as in the files.
    assert mme.score(mixed, "reference")["by"]["subtask"]["OCR"]["accuracy+"] == 50.0
    assert mme.score(mixed)["by"]["subtask"]["OCR"]["accuracy+"] == 50.0
    mixed = numbered(rows[0], rows[1], rows[3], *_pairs("OCR", "Yes", "No")[:1])
    assert mme.score(mixed, "reference")["unpaired"] == 0 and mme.score(mixed)["unpaired"] == 2


def test_an_image_with_one_question_has_no_pair():
    rows = numbered(*_pairs("OCR", "Yes", "No", "Yes"))
    reference, robust = (mme.score(rows, mode)["by"]["subtask"]["OCR"]["accuracy+"] for mode in MODES)
    assert (reference, robust) == (50.0, 100.0)
