"""Pictures of digits and their questions."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.sources import digits as source
from xtuner_ext.data.sources.digits import make_digits, split_digits
from xtuner_ext.errors import UserError

CATEGORIES = {
    "which": r"Which digit is at the (top|bottom) (left|right)\?",
    "presence": r"Is there (an even digit|an odd digit|a digit above 6|a digit below 3) "
    r"in the (top row|bottom row|left column|right column)\?",
    "count": r"How many digits are (even|odd)\?",
    "compare": r"What is the (larger|smaller) digit in the (top row|bottom row|left column|right column)\?",
    "sum": r"What is the sum of the (top row|bottom row|left column|right column)\?",
    "read": r"Read all digits row by row\.",
    "text": r"Which is (larger|smaller), \d or \d\?|What is \d plus \d\?",
}
CELLS = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}


def right_answer(question, values):
    """The answer, found from the words of the question and the digits of the picture, row by row."""
    numbers = [int(word) for word in re.findall(r"\d", question)]
    place = next((CELLS[name] for name in CELLS if name in question), None)
    line = next(([values[cell] for cell in LINES[name]] for name in LINES if name in question), numbers)
    if question.startswith("Which digit"):
        return str(values[place])
    if question.startswith("Is there"):
        if "above" in question or "below" in question:
            there = any(value > 6 if "above" in question else value < 3 for value in line)
        else:
            there = any(value % 2 == ("odd" in question) for value in line)
        return "yes" if there else "no"
    if question.startswith("How many"):
        return str(sum(value % 2 == ("odd" in question) for value in values))
    if "larger" in question:
        return str(max(line))
    if "smaller" in question:
        return str(min(line))
    if "sum" in question or "plus" in question:
        return str(sum(line))
    if question.startswith("Read"):
        return " ".join(map(str, values))
    raise AssertionError(question)


@pytest.mark.parametrize("number", range(len(source.QUESTIONS)))
def test_answers_follow_from_the_digits(number):
    rng = np.random.default_rng(number)
    for _ in range(200):
        values = rng.integers(0, 10, size=4)
        category, question, answer = source.QUESTIONS[number](values, rng)
        assert re.fullmatch(CATEGORIES[category], question)
        assert answer == right_answer(question, values.tolist())


def test_answers_of_text_questions_follow_from_their_words():
    rng = np.random.default_rng(0)
    for _ in range(200):
        category, question, answer = source.text_question(rng)
        assert category == "text" and re.fullmatch(CATEGORIES["text"], question)
        assert answer == right_answer(question, None)


def pool_bytes():
    """The digits of each split as bytes."""
    pools = split_digits()
    return ({image.tobytes() for group in pools[split] for image in group} for split in ("train", "test"))


def test_no_held_out_digit_is_a_training_digit():
    train, test = pool_bytes()
    assert not train & test
    assert len(train) + len(test) == 1797 and len(test) == pytest.approx(1797 / 4, abs=5)


def test_pictures_of_a_split_are_drawn_from_its_own_digits(tmp_path, monkeypatch):
    drawn = []
    compose = source.compose

    def recorded(pools, rng):
        drawn.append({digit.tobytes() for pool in pools for digit in pool})
        return compose(pools, rng)

    monkeypatch.setattr(source, "compose", recorded)
    make_digits(tmp_path / "out", train=20, test=10)
    train, test = pool_bytes()
    assert all(digits <= train for digits in drawn[:-10]) and all(digits <= test for digits in drawn[-10:])


def test_picture_shows_each_digit_in_its_cell():
    lit = [np.full((1, 8, 8), 16.0), np.zeros((1, 8, 8))]
    canvas = source.compose([lit[0], lit[1], lit[1], lit[0]], np.random.default_rng(0)).astype(float)
    cells = [canvas[y : y + 16, x : x + 16].mean() for y in (0, 16) for x in (0, 16)]
    assert canvas.shape == (32, 32) and min(cells[0], cells[3]) > 80 and max(cells[1], cells[2]) < 10


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_same_arguments_give_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_digits(tmp_path / name, seed=seed, train=12, test=6)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a["train.jsonl"] != c["train.jsonl"]


def test_files_and_counts(tmp_path):
    metas = make_digits(tmp_path / "out", train=80, test=6)
    assert metas == {split: str(tmp_path / "out" / f"{split}.json") for split in ("train", "test")}
    lines = {split: (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines() for split in metas}
    assert {split: len(found) for split, found in lines.items()} == {"train": 80, "test": 6}
    train, test = ([json.loads(line) for line in lines[split]] for split in ("train", "test"))
    assert all(item["category"] in CATEGORIES for item in train + test)
    assert all("image" in item and len(item["conversations"]) == 2 for item in test)
    text = [item for item in train if "image" not in item]
    assert 0 < len(text) < 20 and all(item["category"] == "text" for item in text)
    assert all(len(item["conversations"]) == 6 for item in train if "image" in item)
    with Image.open(tmp_path / "out" / test[0]["image"]) as picture:
        assert picture.size == (32, 32) and picture.mode == "L"


def test_meta_loads_as_training_samples(digits, digits_processor):
    dataset = ConversationDataset(digits / "train.json", digits_processor, "internlm2_chat")
    assert len(dataset) == 60
    images = [sample["pixel_values"].shape[0] for sample in (dataset[index] for index in range(60))]
    assert set(images) == {0, 1}


def test_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def fail(pools, rng):
        calls.append(pools)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.zeros((32, 32), np.uint8)

    monkeypatch.setattr(source, "compose", fail)
    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / "out", train=12, test=6)
    assert not list(tmp_path.iterdir())


def test_same_arguments_leave_an_existing_folder_alone(tmp_path):
    make_digits(tmp_path / "out", train=3, test=2)
    (tmp_path / "out" / "note").write_text("mine")
    make_digits(tmp_path / "out", train=3, test=2)
    assert (tmp_path / "out" / "note").read_text() == "mine"


def test_existing_folder_of_other_arguments_or_content_is_an_error(tmp_path):
    make_digits(tmp_path / "out", train=3, test=2)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="was made with .*'train': 3.*expected .*'train': 4"):
        make_digits(tmp_path / "out", train=4, test=2)
    assert files(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").touch()
    with pytest.raises(UserError, match="other is not empty and was not made by make-digits"):
        make_digits(tmp_path / "other", train=3, test=2)
    with pytest.raises(UserError, match="note is a file, expected a folder"):
        make_digits(tmp_path / "other" / "note", train=3, test=2)


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    make_digits(tmp_path / "out", train=1, test=1)
    assert (tmp_path / "out" / "test.json").is_file()


@pytest.mark.parametrize(("train", "test"), [(0, 1), (1, 0), (-1, 1)])
def test_counts_below_one_are_an_error(tmp_path, train, test):
    with pytest.raises(UserError, match=f"at least one sample a split, got train={train} and test={test}"):
        make_digits(tmp_path / "out", train=train, test=test)
    assert not list(tmp_path.iterdir())


def test_named_presence_asks_for_a_digit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 10, size=4)
        category, question, answer = source._named_presence(values, rng)
        wanted = int(re.search(r"\d", question).group())
        place = next(([values[CELLS[name]]] for name in CELLS if name in question), None)
        line = next(([values[cell] for cell in LINES[name]] for name in LINES if name in question), place)
        assert category == "presence" and answer == ("yes" if wanted in line else "no")
