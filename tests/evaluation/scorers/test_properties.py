"""No answer, however odd, stops a scorer or changes what another row has."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.scorers.rows import row
from xtuner_ext.evaluation.scorers import (
    anls,
    caption,
    chartqa,
    gqa,
    mmbench,
    mme,
    mmvm,
    pope,
    refcoco,
    scienceqa,
    seed,
    vqa,
)

OPTIONS = {"A": "dog", "B": "12", "C": "a cat (big)", "D": ""}
BOX = {"box": [10, 20, 60, 80], "width": 100, "height": 90}
TYPES = {"structural": "query", "semantic": "obj", "detailed": "x"}
# Gold and meta of three rows; what all scorers ask for.
CASES = {
    "gqa": (gqa.mark, gqa.score, "dog", {"question": "what", "types": TYPES, "groups": {"global": "g"}}),
    "pope": (pope.mark, pope.score, "yes", {}),
    "mme": (mme.mark, mme.score, "Yes", {"image": "1.jpg"}),
    "mmbench": (mmbench.mark, mmbench.score, "A", {"options": OPTIONS}),
    "seed": (seed.mark, seed.score, "A", {"options": OPTIONS, "type": 3}),
    "scienceqa": (scienceqa.mark, scienceqa.score, "A", {"options": OPTIONS, "image": True}),
    "vqa": (vqa.mark, vqa.score, ["dog"] * 4 + ["two"] * 6, {}),
    "chartqa": (chartqa.mark, chartqa.score, ["12", "dog"], {}),
    "anls": (anls.mark, anls.score, ["dog", "12 %"], {}),
    "caption": (caption.mark, None, ["a dog", "two dogs run"], {}),
    "refcoco": (refcoco.mark, refcoco.score, BOX["box"], BOX),
    "mmvm": (mmvm.mark, mmvm.score, "B", {"options": OPTIONS, "match_type": "[1]"}),
    "mmvm_number": (mmvm.mark_number, mmvm.score_number, "12", {"match_type": "[1]"}),
}
PIECES = [
    "A",
    "B.",
    "(C",
    "(",
    ")",
    "[",
    "]",
    "{<",
    ">",
    "yes",
    "no",
    "No",
    "answer is",
    "The answer is ",
    "12",
    "1e999",
    "nan",
    "inf",
    "-3",
    "0.5",
    ",",
    ".",
    "%",
    "$",
    "\t",
    "\n",
    "\r",
    "\u2028",
    "\x00",
    "\ud800",
    "ß",
    "İ",
    "²",
    "是",
    "不是",
    " ",
    "dog",
    "a cat (big)",
    "9" * 5000,
    "[0.1, 0.2, 0.6, 0.9]",
    "{<90><90><10><10>}",
    "<box>[[100, 200, 600, 880]]</box>",
]
TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
)


def _rows(name, said):
    _, _, gold, meta = CASES[name]
    return [row(text, gold, number, index=number, **meta) for number, text in enumerate(said)]


def _finite(value):
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("mode", ["reference", "robust"])
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(first=TEXTS, other=TEXTS)
def test_odd_answers(name, mode, first, other):
    mark, score, _, _ = CASES[name]
    rows, changed = _rows(name, [first, "A dog", None]), _rows(name, [other, "A dog", None])
    marks = mark(rows, mode)
    assert marks[1:] == mark(changed, mode)[1:]
    assert marks[0] == mark(rows[:1] + changed[1:], mode)[0]
    json.dumps(marks)
    assert all(0 <= correct <= (10 + 1e-9 if name == "caption" else 1) for _, correct in marks)
    if score is not None:
        report = score(rows, mode)
        json.dumps(report)
        assert _finite(report["scores"]) and _finite(report["by"]) and report["missing"] == 1
