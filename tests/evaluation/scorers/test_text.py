"""Text normalising."""

import pytest

from xtuner_ext.evaluation.scorers.text import evalai, first_line, yes_or_no

# What the public answer processor of the EvalAI server makes of them.
EVALAI = [
    ("Two dogs", "2 dogs"),
    ("The cat.", "cat"),
    ("A an the", ""),
    ("none", "0"),
    ("Ten", "10"),
    ("none of it", "0 of it"),
    ("dont", "don't"),
    ("cant", "can't"),
    ("she's", "she 's"),
    ("it's a dog's ball", "it 's dog 's ball"),
    ("couldnt've", "couldn't've"),
    ("Im", "im"),
    ("'ows'at", "'ow's'at"),
    ("somebody'd", "somebodyd"),
    ("twas", "'twas"),
    ("10:30", "10:30"),
    ("1,000", "1000"),
    ("U.S.A.", "usa"),
    ("3.5", "3.5"),
    ("v2.0.", "v2.0"),
    ("1.", "1"),
    ("a-b", "b"),
    ("a - b", "b"),
    ("x-y", "x y"),
    ("(red)", "red"),
    ("red/blue", "red blue"),
    ("ice-cream, please", "ice cream please"),
    ("what?", "what"),
    ("yes!", "yes"),
    ("?!", ""),
    ("50%", "50%"),
    ("$5", "$5"),
    ("  Blue  ", "blue"),
    ("line\nbreak", "line break"),
    ("tab\there", "tab here"),
    ("xx" + "." * 40, "xx" + "." * 8),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), EVALAI)
def test_answers_are_compared_as_on_the_server(text, expected):
    assert evalai(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is: red", "red"),
        ("Answer: red", "red"),
        ("**Answer:** red", "** red"),
        ("\n red\nbecause", "red"),
        ("the answers", "the answers"),
        ("", ""),
    ],
)
def test_first_line_says_the_answer(text, expected):
    assert first_line(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("NO", "no"),
        ("\nNo", "no"),
        ("No;", "no"),
        ("Yes, there is no doubt", "yes"),
        ("There is no dog", "no"),
        ("There isn’t a dog", "no"),
        ("The answer is yes", "yes"),
        ("是", "yes"),
        ("不是的", "no"),
        ("False", "no"),
        ("know", None),
        ("I am not sure", None),
        ("well yes and no", None),
        ("", None),
    ],
)
def test_yes_and_no(text, expected):
    assert yes_or_no(text) == expected
