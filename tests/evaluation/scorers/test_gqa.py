"""GQA."""

import pytest

from tests.evaluation.scorers.rows import row
from xtuner_ext.evaluation.scorers import gqa
from xtuner_ext.evaluation.scorers.common import MODES


def _question(number, text, gold, structural="query", group=None, steps=1, **more):
    return row(
        text,
        gold,
        number,
        structural,
        question="what is it",
        types={"structural": structural, "semantic": "obj", "detailed": "categoryThis"},
        groups={"global": group, "local": "x"},
        semantic=[{"operation": "select", "argument": "dog"}] * steps + [{"operation": "query", "argument": "name"}],
        isBalanced=True,
        **more,
    )


ROWS = [
    _question("1", "Dog.", "dog", group="animal"),
    _question("2", "cat", "dog", group="animal", steps=2),
    _question("3", "cat", "cat", group="animal"),
    _question("4", "yes", "yes", "verify", entailed=["5", "4"]),
    _question("5", "no", "yes", "verify"),
]


@pytest.mark.parametrize("mode", MODES)
def test_five_questions_by_hand(mode):
    report = gqa.score(ROWS, mode, consistency=True)
    scores = report["scores"]
    assert scores["accuracy"] == pytest.approx(60.0)
    assert (scores["binary"], scores["open"]) == (50.0, 2 / 3 * 100)
    # Animals: dog 2 expected, 1 said; cat 1 expected, 2 said: (1/2 + 1/1) of one group, by 100.
    assert scores["distribution"] == pytest.approx(1.5 / 100)
    # Question 4 is right and entails 5, which is wrong.
    assert scores["consistency"] == 0.0
    assert ("validity" in scores) is (mode == "reference")
    assert report["by"]["structural"] == {
        "query": {"accuracy": 2 / 3 * 100, "count": 3},
        "verify": {"accuracy": 50.0, "count": 2},
    }
    assert {name: part["count"] for name, part in report["by"]["steps"].items()} == {"1": 4, "2": 1}
    assert report["by"]["words"] == {"3": {"accuracy": pytest.approx(60.0), "count": 5}}


@pytest.mark.parametrize(
    ("text", "gold", "reference", "robust"),
    [
        ("Dog", "dog", True, True),
        ("dog...", "dog", True, False),
        ("dog. ", "dog", False, True),
        (" dog", "dog", False, True),
        ("dog", "Dog", False, True),
        ("a dog", "dog", False, False),
        ("", "dog", False, False),
    ],
)
def test_what_is_the_same(text, gold, reference, robust):
    assert gqa.mark([row(text, gold)], "reference")[0][1] is reference
    assert gqa.mark([row(text, gold)], "robust")[0][1] is robust


def test_choices_give_validity_and_plausibility():
    rows = [
        _question("1", "dog", "cat", valid=["dog", "cat"], plausible=["cat"]),
        _question("2", "color", "cat", valid=["cat"], plausible=["cat"]),
    ]
    rows[1]["meta"]["types"]["detailed"] = "twoCommon"
    scores = gqa.score(rows)["scores"]
    # Of things in common there are three valid answers, whatever the choices.
    assert (scores["validity"], scores["plausibility"]) == (100.0, 50.0)


def test_unbalanced_questions_are_for_consistency_only():
    rows = [_question("1", "dog", "dog", entailed=["2"]), _question("2", "x", "dog")]
    rows[1]["meta"]["isBalanced"] = False
    report = gqa.score(rows, consistency=True)
    assert report["scores"]["accuracy"] == 100.0 and report["scores"]["consistency"] == 0.0
    assert report["balanced"] == 1


def test_plain_lines_have_an_accuracy_only():
    report = gqa.score([row("dog", "dog"), row("cat", "dog")])
    assert report["scores"] == {"accuracy": 50.0} and report["by"] == {}
