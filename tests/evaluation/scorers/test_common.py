"""Modes, missing answers and reports."""

import json

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.scorers import gqa, pope


def test_modes_and_rows_are_checked():
    with pytest.raises(UserError, match="scorer mode is 'loose', expected one of reference, robust"):
        pope.score([row("yes")], "loose")
    with pytest.raises(UserError, match="there are no result rows"):
        pope.score([])


@pytest.mark.parametrize("mode", ["reference", "robust"])
def test_missing_answers_are_wrong_and_counted_unless_strict(mode):
    rows = numbered(row("yes"), row(None), row("yes"))
    report = gqa.score(rows, mode)
    assert report["scores"]["accuracy"] == 2 / 3 * 100
    assert (report["count"], report["missing"], report["unparsed"]) == (3, 1, 0)
    with pytest.raises(UserError, match="1 of 3 questions have no answer, the first is 1"):
        gqa.score(rows, mode, strict=True)


def test_reports_are_json_and_rows_are_left_alone():
    rows = numbered(row("maybe"), row("no"))
    before = json.dumps(rows)
    report = pope.score(rows)
    assert json.dumps(rows) == before and json.loads(json.dumps(report)) == report
    assert report["unparsed"] == 1 and report["headline"] in report["scores"]
