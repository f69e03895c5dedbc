"""Letters of options in answers: what each kit finds, and what we do."""

import pytest

from xtuner_ext.evaluation.scorers import letters

OPTIONS = {"A": "dog", "B": "hot dog", "C": "a cat", "D": "nothing"}
# Answer, VLMEvalKit, MMVM's kit of 2024, XTuner, InternVL, LLaVA: each as its own code says.
KITS = [
    ("B", "B", "B", "B", "B", "B"),
    ("(B)", "B", "B", "B", "B", "FAILED"),
    ("B.", "B", "B", "B", "B", "FAILED"),
    ("B. hot dog", "B", "B", "B", "B", "B"),
    ("The answer is B", "B", "B", "B", "The answer is B", "FAILED"),
    ("Answer: C", "C", "C", "A", "A", "FAILED"),
    ("A dog", "A", "A", "A", "A", "FAILED"),
    ("A or B", None, None, "A", "A", "FAILED"),
    ("hot dog", None, None, "", "A", "FAILED"),
    ("It is a cat", "C", "C", "", "C", "FAILED"),
    ("b", None, None, "", "b", "FAILED"),
    ("Z", "Z", "Z", "", "Z", "FAILED"),
    ("E", None, None, "", "E", "E"),
    ("Cannot determine the answer", "Z", "Z", "C", "C", "FAILED"),
    ("Failed to obtain answer via API", None, None, "A", "Failed to obtain answer via API", "FAILED"),
    ("The correct answer is **B**. Here is why: they do.", "B", "B", "B", None, "FAILED"),
    ("I say (C) is right because it sits on the mat", None, "C", "C", None, "FAILED"),
    ("", None, None, "", "", "FAILED"),
]


@pytest.mark.parametrize(("text", "now", "then", "xtuner", "internvl", "llava"), KITS)
def test_kits(text, now, then, xtuner, internvl, llava):
    assert letters.vlmevalkit(text, OPTIONS) == now
    assert letters.vlmevalkit(text, OPTIONS, 2024) == then
    assert letters.xtuner(text) == xtuner
    assert letters.internvl(text, OPTIONS) == (text if internvl is None else internvl)
    assert letters.llava_scienceqa(text) == llava


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B. dog", "B"),
        ("(C)", "C"),
        ("the dog", "B"),
        ("Because cat", "B"),
        ("Answer: C", "A"),
        ("The answer is B.", "The answer is B."),
        ("a", "a"),
        ("(C", letters.CRASH),
        (" (C)  ", "C"),
        ("x. no", "x"),
    ],
)
def test_internvl_takes_the_first_character(text, expected):
    assert letters.internvl(text, {"A": "cow", "B": "dog", "C": "bird"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("B. hot dog", "B"),
        ("B: because", "B"),
        ("The answer is B", "B"),
        ("Answer: C", "C"),
        ("First I took option A, but the answer is (D).", "D"),
        ("A dog", "A"),
        ("A nice hot dog", "B"),
        ("I see C here", "C"),
        ("It is a cat", "C"),
        ("HOT DOG.", "B"),
        ("A or B", None),
        ("either dog or a cat", None),
        ("a bulldog", None),
        ("E", None),
        ("Z", None),
        ("", None),
        ("The answer is another", None),
    ],
)
def test_strict_letter_never_guesses(text, expected):
    assert letters.strict_letter(text, OPTIONS) == expected


def test_options_are_read_from_lines():
    assert letters.parse_options("A. 1\nB. a. b\n\nno option\nC.3") == {"A": "1", "B": "a. b", "C": "3"}
