"""Captions."""

import math

import pytest

from tests.evaluation.scorers.rows import numbered, row
from xtuner_ext.evaluation.scorers import caption

NAME = "CIDEr (no PTB tokenizer)"
GOLD = [["a dog runs on grass", "the dog runs"], ["two cats sleep", "cats on a bed"], ["a red bus"]]


def test_words_are_without_capitals_and_punctuation():
    assert caption.words("A Dog's ball, isn't it?  Yes!\n") == "a dog's ball isn't it yes"


def test_cider_by_hand():
    # Words of two images with one reference each; every n-gram is of one image, so its weight is log 2 a time.
    scores = caption.cider(["a b", "c"], [["a b"], ["c d"]])
    # Equal captions of two words: cosine 1 for n = 1 and 2, nothing for 3 and 4.
    assert scores[0] == pytest.approx(10 * 2 / 4)
    # One word of two: cosine 1 / sqrt 2 for n = 1; one 2-gram less.
    assert scores[1] == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))


def test_repeating_a_word_does_not_pay():
    once, often = caption.cider(["a b c", "a a a"], [["a b c"], ["a x y"]])
    assert often < once
    # The count is clipped to the reference's; what every image has weighs nothing.
    assert caption.cider(["a"], [["a"]]) == [0.0]


def test_a_caption_does_not_change_the_others():
    said = ["a dog runs", "cats", "a bus"]
    before = caption.cider(said, GOLD)
    assert caption.cider(["zzz", *said[1:]], GOLD)[1:] == before[1:]


def test_cider_is_that_of_pycocoevalcap():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    said = ["a dog runs on the grass", "", "a red bus bus red"]
    _, expected = scorer.compute_score(dict(enumerate(GOLD)), {i: [text] for i, text in enumerate(said)})
    assert caption.cider(said, GOLD) == pytest.approx(list(expected), abs=1e-9)


def test_without_java_scores_say_so(monkeypatch):
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    rows = numbered(*(row(text, gold) for text, gold in zip(["A dog runs.", None, "a red bus"], GOLD)))
    for mode in ("reference", "robust"):
        report = caption.score(rows, mode)
        assert report["headline"] == NAME and all(name.endswith("(no PTB tokenizer)") for name in report["scores"])
        expected = sum(caption.cider(["a dog runs", "", "a red bus"], GOLD)) / 3 * 100
        assert report["scores"][NAME] == pytest.approx(expected)
        assert (report["missing"], report["average_words"], report["tools"]["java"]) == (1, 2.0, False)


def test_without_the_package_there_is_cider(monkeypatch):
    monkeypatch.setattr(caption.importlib.util, "find_spec", lambda name: None)
    rows = numbered(*(row("a dog", gold) for gold in GOLD))
    assert set(caption.score(rows, "reference")["scores"]) == {NAME}


def test_with_java_and_package_all_scores_are_there():
    pytest.importorskip("pycocoevalcap")
    if caption.shutil.which("java") is None:
        pytest.skip("java is not installed")
    odd = "A dog\u2028runs \ud83d on\rgrass."
    rows = numbered(*(row(text, gold) for text, gold in zip([odd, "", None], GOLD)))
    report = caption.score(rows, "reference")
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR"} <= set(report["scores"])
    assert report["headline"] == "CIDEr" and report["scores"]["CIDEr"] > 0
