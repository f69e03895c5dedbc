"""Pictures of handwritten digits with questions that need looking and relating.

The digits are scikit-learn's (UCI, 1,797 of 8x8 pixels). They are split into train and held-out before any
picture is composed, so no held-out digit is ever seen in training.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from .folder import is_made, new_folder

CELLS = ("top left", "top right", "bottom left", "bottom right")
CLASSES = {
    "an even digit": lambda value: value % 2 == 0,
    "an odd digit": lambda value: value % 2 == 1,
    "a digit above 6": lambda value: value > 6,
    "a digit below 3": lambda value: value < 3,
}
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
# Pixels. A cell is what one visual token of the shipped teacher covers.
IMAGE_SIZE, CELL, DIGIT = 32, 16, 12
HELD_OUT_SHARE = 0.25
QUESTIONS_PER_TRAINING_IMAGE = 3
TEXT_ONLY_SHARE = 0.1


def make_digits(out, seed=0, train=12000, test=1200, named_presence=False):
    """Write PNG files, InternVL-style JSONL and a meta JSON per split.

    Args:
        out (str | Path): Folder to create; it appears whole or not at all. When it was made with the same
            arguments it is left alone.
        seed (int): Seed of the composition; the split of the digits does not depend on it.
        train (int): Training samples.
        test (int): Held-out questions.
        named_presence (bool): Ask whether a named digit is there, instead of one of a class.

    Returns:
        dict: ``train`` and ``test`` paths of the meta files.

    Raises:
        UserError: For counts below 1, a file, or a folder that holds something else.
    """
    out = Path(out)
    if train < 1 or test < 1:
        raise UserError(f"make-digits needs at least one sample a split, got train={train} and test={test}")
    settings = {"seed": seed, "train": train, "test": test}
    settings.update({"named_presence": True} if named_presence else {})
    questions = [_named_presence if named_presence and kind is _presence else kind for kind in QUESTIONS]
    metas = {split: str(out / f"{split}.json") for split in ("train", "test")}
    if is_made(out, settings, "make-digits"):
        return metas
    with new_folder(out, settings) as work:
        pools = split_digits()
        for number, (split, count) in enumerate((("train", train), ("test", test))):
            _write_split(work, split, count, pools[split], questions, np.random.default_rng([seed, number]))
    return metas


def split_digits():
    """Divide the digits by class into training and held-out ones.

    Returns:
        dict: ``train`` and ``test``, each ten arrays (n, 8, 8) of values 0 to 16, by digit.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    pools = {"train": [], "test": []}
    for value in range(10):
        images = digits.images[digits.target == value]
        images = images[rng.permutation(len(images))]
        held_out = round(len(images) * HELD_OUT_SHARE)
        pools["test"].append(images[:held_out])
        pools["train"].append(images[held_out:])
    return pools


def _write_split(folder, split, count, pool, questions, rng):
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        if split == "train" and rng.random() < TEXT_ONLY_SHARE:
            kinds = [text_question(rng)]
            item = {"id": f"{split}-{number:06d}"}
        else:
            values = rng.integers(0, 10, size=4)
            name = f"images/{split}-{number:06d}.png"
            Image.fromarray(compose([pool[v] for v in values], rng)).save(folder / name)
            asked = QUESTIONS_PER_TRAINING_IMAGE if split == "train" else 1
            # Where reading aloud comes first, later answers follow from text: that is how sums are learnt first.
            kinds = [questions[kind](values, rng) for kind in rng.choice(len(questions), size=asked, replace=False)]
            item = {"id": f"{split}-{number:06d}", "image": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        item["category"] = kinds[0][0]
        item["conversations"] = []
        for turn, (_, question, answer) in enumerate(kinds):
            question = f"<image>\n{question}" if turn == 0 and "image" in item else question
            item["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(item))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    entry = {
        "root": ".",
        "annotation": f"{split}.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": count,
    }
    (folder / f"{split}.json").write_text(json.dumps({f"digits_{split}": entry}, indent=2))


def compose(pools, rng):
    """Draw one digit per cell, at a random place in it.

    Args:
        pools (list[ndarray]): For each of the four cells the digits (n, 8, 8) to draw from.
        rng (numpy.random.Generator): Chooses digit, place and contrast.

    Returns:
        ndarray: (32, 32) uint8.
    """
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float64)
    for cell, pool in enumerate(pools):
        small = Image.fromarray((pool[rng.integers(len(pool))] / 16.0).astype(np.float32))
        digit = np.asarray(small.resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
        top, left = rng.integers(0, CELL - DIGIT + 1, size=2)
        top, left = top + CELL * (cell // 2), left + CELL * (cell % 2)
        canvas[top : top + DIGIT, left : left + DIGIT] = digit * rng.uniform(0.7, 1.0)
    canvas += rng.normal(0, 0.02, canvas.shape)
    return (canvas.clip(0, 1) * 255).astype(np.uint8)


def _which(values, rng):
    cell = rng.integers(4)
    return "which", f"Which digit is at the {CELLS[cell]}?", str(values[cell])


def _presence(values, rng):
    line = list(LINES)[rng.integers(4)]
    kind, belongs = list(CLASSES.items())[rng.integers(len(CLASSES))]
    there = any(belongs(values[cell]) for cell in LINES[line])
    return "presence", f"Is there {kind} in the {line}?", "yes" if there else "no"


def _named_presence(values, rng):
    place = (*CELLS, *LINES)[rng.integers(len(CELLS) + len(LINES))]
    there = [values[cell] for cell in LINES.get(place, ())] or [values[CELLS.index(place)]]
    wanted = int(there[rng.integers(len(there))]) if rng.random() < 0.5 else int(rng.integers(10))
    word = "at" if place in CELLS else "in"
    return "presence", f"Is there a {wanted} {word} the {place}?", "yes" if wanted in there else "no"


def _even(values, rng):
    parity = int(rng.integers(2))
    word = ("even", "odd")[parity]
    return "count", f"How many digits are {word}?", str(int((values % 2 == parity).sum()))


def _extreme(values, rng):
    line = list(LINES)[rng.integers(4)]
    first, second = (int(values[cell]) for cell in LINES[line])
    if rng.random() < 0.5:
        return "compare", f"What is the larger digit in the {line}?", str(max(first, second))
    return "compare", f"What is the smaller digit in the {line}?", str(min(first, second))


def _sum(values, rng):
    line = list(LINES)[rng.integers(4)]
    return "sum", f"What is the sum of the {line}?", str(int(sum(values[cell] for cell in LINES[line])))


def _read(values, rng):
    return "read", "Read all digits row by row.", " ".join(str(value) for value in values)


QUESTIONS = (_which, _presence, _even, _extreme, _sum, _read)


def text_question(rng):
    first, second = (int(value) for value in rng.choice(10, size=2, replace=False))
    kind = rng.integers(3)
    if kind == 0:
        return "text", f"Which is larger, {first} or {second}?", str(max(first, second))
    if kind == 1:
        return "text", f"Which is smaller, {first} or {second}?", str(min(first, second))
    return "text", f"What is {first} plus {second}?", str(first + second)
