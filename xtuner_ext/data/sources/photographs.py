"""Eight photographs with questions, as LLaVA's JSON and as MMBench's TSV; enough to see a LLaVA learn in a minute.

The photographs lie in scikit-image's wheel. Training and questions show the same ones, cut a little differently.
"""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from .folder import is_made, new_folder

# Function of skimage.data -> what is to be seen, where.
PHOTOGRAPHS = {
    "astronaut": ("an astronaut", "people"),
    "chelsea": ("a cat", "animals"),
    "coffee": ("a cup of coffee", "things"),
    "rocket": ("a rocket", "things"),
    "hubble_deep_field": ("many stars", "nature"),
    "coins": ("old coins", "things"),
    "grass": ("green grass", "nature"),
    "horse": ("a black horse", "animals"),
}
QUESTIONS = ("What is in the picture?", "What do you see?")
LETTERS = "ABCD"
# As XTuner's mmbench asks.
CHOICE = "Which is in the picture?"
ORDER = "Answer with the option's letter from the given choices directly."
# Circular questions have the index of their first form plus multiples of this.
CIRCLE = 1_000_000
SIDE, SMALLEST = 96, 0.85  # pixels of the shorter side; share of it that a cut keeps at least
TEXT = (("Say hello.", "Hello!"), ("What is your name?", "I am a small model."))


def make_photographs(out, seed=0, views=4, choices=16):
    """Write PNG files, ``llava.json``, JSONL with a meta JSON, and ``mmbench_dev.tsv`` and ``mmbench_test.tsv``.

    Args:
        out (str | Path): Folder to create; it appears whole or not at all. When it was made with the same
            arguments it is left alone.
        seed (int): Seed of cuts and options.
        views (int): Cuts of each photograph.
        choices (int): Questions with four options for each cut.

    Returns:
        Path: The folder.

    Raises:
        UserError: For counts below 1, a file, or a folder that holds something else.
    """
    out = Path(out)
    if views < 1 or choices < 1:
        raise UserError(f"make_photographs got views={views} and choices={choices}, expected at least one of each")
    settings = {"seed": seed, "views": views, "choices": choices}
    if is_made(out, settings, "make_photographs"):
        return out
    random = np.random.default_rng(seed)
    with new_folder(out, settings) as work:
        (work / "images").mkdir()
        samples = []
        for name in PHOTOGRAPHS:
            for view in range(views):
                file = f"{name}_{view}.png"
                _cut(_photograph(name), random).save(work / "images" / file)
                samples += _samples(name, file, choices, random)
        samples += [{"conversations": _turns(*turn)} for turn in TEXT for _ in range(views)]
        samples.append(_two_turns())
        for number, sample in enumerate(samples):
            sample["id"] = str(number)
        (work / "llava.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
        lines = (json.dumps(sample) for sample in samples)
        (work / "llava.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        meta = {"photographs": {"root": "images", "annotation": "llava.jsonl", "repeat_time": 1}}
        (work / "train.json").write_text(json.dumps(meta), encoding="utf-8")
        rows = _benchmark(random)
        _write_table(work / "mmbench_dev.tsv", rows, split="dev")
        _write_table(work / "mmbench_test.tsv", [{**row, "answer": None} for row in rows], split="test")
    return out


def _photograph(name):
    import skimage.data

    pixels = getattr(skimage.data, name)()
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    image = Image.fromarray(pixels).convert("RGB")
    scale = SIDE / min(image.size)
    return image.resize([round(side * scale) for side in image.size])


def _cut(image, random):
    width, height = (round(side * random.uniform(SMALLEST, 1)) for side in image.size)
    left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def _samples(name, file, choices, random):
    answer = PHOTOGRAPHS[name][0]
    samples = [{"image": file, "conversations": _turns(f"<image>\n{question}", answer)} for question in QUESTIONS]
    for _ in range(choices):
        options, letter = _options(name, random)
        listed = "".join(f"{mark}. {option}\n" for mark, option in zip(LETTERS, options))
        samples.append({"image": file, "conversations": _turns(f"<image>\n{CHOICE}\n{listed}{ORDER}", letter)})
    return samples


def _options(name, random):
    """tuple[list[str], str]: Four things of which one is to be seen, and its letter."""
    others = [thing for other, (thing, _) in PHOTOGRAPHS.items() if other != name]
    options = [*random.choice(others, 3, replace=False), PHOTOGRAPHS[name][0]]
    random.shuffle(options)
    return [str(option) for option in options], LETTERS[options.index(PHOTOGRAPHS[name][0])]


def _turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _two_turns():
    questions = [f"<image>\n{QUESTIONS[0]}", "Say hello."]
    answers = [PHOTOGRAPHS["chelsea"][0], "Hello!"]
    turns = [turn for pair in zip(questions, answers) for turn in _turns(*pair)]
    return {"image": "chelsea_0.png", "conversations": turns}


def _benchmark(random):
    """Every photograph with one question, whose options go round in its other forms."""
    rows = []
    for index, (name, (_, category)) in enumerate(PHOTOGRAPHS.items()):
        file = io.BytesIO()
        _cut(_photograph(name), random).save(file, format="PNG")
        options, _ = _options(name, random)
        for turn in range(len(LETTERS)):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": index + turn * CIRCLE,
                    "question": CHOICE,
                    "hint": None,
                    **dict(zip(LETTERS, turned)),
                    "answer": LETTERS[turned.index(PHOTOGRAPHS[name][0])],
                    "category": category,
                    "l2-category": "coarse_perception" if category == "nature" else "attribute_reasoning",
                    # Later forms point at the picture of the first, as MMBench does.
                    "image": base64.b64encode(file.getvalue()).decode() if turn == 0 else str(index),
                }
            )
    return rows


def _write_table(path, rows, split):
    columns = [column for column in rows[0] if split == "dev" or column != "answer"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*columns, "split"], delimiter="\t", extrasaction="ignore")
        table.writeheader()
        table.writerows({**row, "split": split} for row in rows)
