"""Counting bad samples once, and stopping above a share."""

import pytest

from xtuner_ext.data.ledger import Ledger, Skipped
from xtuner_ext.errors import UserError


def entry(dataset, line, reason):
    return Skipped(dataset, f"{dataset}.jsonl", line, reason, f"{dataset}.jsonl:{line}: found this, expected that")


ENTRIES = [entry("a", 3, "json"), entry("b", 3, "too_long"), entry("a", 9, "json"), entry("a", 4, "too_long")]


def test_each_line_of_each_dataset_counts_once():
    ledger = Ledger()
    assert ledger.add(ENTRIES[:2]) == ENTRIES[:2]
    # Also when another reason is found later, as where an image has gone since.
    assert ledger.add([*ENTRIES, entry("b", 3, "missing_file")]) == ENTRIES[2:]
    assert ledger.entries == ENTRIES and len(ledger) == 4
    assert ledger.counts() == {"a": {"json": 2, "too_long": 1}, "b": {"too_long": 1}}
    assert ledger.summary() == "a: 2 json, 1 too_long; b: 1 too_long"


def test_above_the_share_counts_and_the_first_example_are_named():
    ledger = Ledger(0.1)
    ledger.add(ENTRIES)
    ledger.check(0.1, "40 lines")
    with pytest.raises(UserError) as caught:
        ledger.check(0.125, "32 lines")
    assert str(caught.value) == (
        "12.50% of 32 lines are bad samples, more than max_bad_fraction=0.1: 2 json, 2 too_long; the first is "
        "a.jsonl:3: found this, expected that"
    )
    Ledger().check(1.0, "all")


@pytest.mark.parametrize("share", [-0.1, 1.5, "0.1", True, float("nan")])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises(UserError, match="max_bad_fraction is .*, expected a share from 0 to 1, or None"):
        Ledger(share)
