"""Text, one picture, several pictures and video, mixed in one JSONL, with questions that are new to the digits teacher.

What a tuned model answers right of them it learnt by tuning. A share of the samples asks what the teacher knows,
which keeps it. Digits and numbers of the held-out split are never seen in training; of the photographs, which are
scikit-image's, both splits have windows of random place and size.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from .digits import CELL, DIGIT, IMAGE_SIZE, QUESTIONS, compose, split_digits, text_question
from .folder import is_made, new_folder

# Those that lie in scikit-image's wheel and differ at 32 pixels, by function of skimage.data.
PHOTOGRAPHS = {
    "astronaut": "astronaut",
    "chelsea": "cat",
    "coffee": "coffee",
    "rocket": "rocket",
    "hubble_deep_field": "stars",
    "immunohistochemistry": "cells",
    "coins": "coins",
    "grass": "grass",
}
SMALLEST_WINDOW, PHOTOGRAPH_SIZE = 0.6, 48  # share of the shorter side; pixels
HELD_OUT_NUMBERS = 4  # triples whose sum this divides are held out
FRAMES, FRAMES_PER_SECOND = 4, 4
MOVES = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
BIT_RATE = 1_000_000  # of MP4, which keeps the digits readable
KNOWN_TEXT = 0.1  # share of text in what the teacher knows
EMPTY = np.zeros((1, 8, 8))


def make_kinds(out, seed=0, train=6000, test=600, known=0.3):
    """Write pictures, videos, InternVL-style JSONL and a meta JSON per split.

    Args:
        out (str | Path): Folder to create; it appears whole or not at all. When it was made with the same
            arguments it is left alone.
        seed (int): Seed of the composition; the split of digits and numbers does not depend on it.
        train (int): Training samples.
        test (int): Held-out questions.
        known (float): Share of samples that ask what the digits teacher knows, from 0 to below 1.

    Returns:
        dict: ``train`` and ``test`` paths of the meta files.

    Raises:
        UserError: For counts below 1, another share, a file, or a folder that holds something else.
    """
    out = Path(out)
    if train < 1 or test < 1:
        raise UserError(f"make-kinds needs at least one sample a split, got train={train} and test={test}")
    if not 0 <= known < 1:
        raise UserError(f"make-kinds got known={known}, expected a share from 0 to below 1")
    settings = {"seed": seed, "train": train, "test": test, "known": known}
    metas = {split: str(out / f"{split}.json") for split in ("train", "test")}
    if is_made(out, settings, "make-kinds"):
        return metas
    with new_folder(out, settings) as work:
        pools, photographs = split_digits(), _photographs()
        for number, (split, count) in enumerate((("train", train), ("test", test))):
            drawer = _Drawer(split, pools[split], photographs, np.random.default_rng([seed, number]))
            _write_split(work, split, count, drawer, known)
    return metas


def _write_split(folder, split, count, drawer, known):
    for name in ("images", "videos"):
        (folder / name).mkdir(exist_ok=True)
    kinds = (drawer.text, drawer.image, drawer.images, drawer.video, drawer.known)
    chosen = drawer.rng.choice(len(kinds), size=count, p=[*[(1 - known) / 4] * 4, known])
    lines = []
    for number, kind in enumerate(chosen):
        item = {"id": f"{split}-{number:06d}", **kinds[kind]()}
        if pictures := item.pop("pictures", None):
            names = [f"images/{item['id']}-{place}.png" for place in range(len(pictures))]
            for name, pixels in zip(names, pictures):
                Image.fromarray(pixels).save(folder / name)
            item["image"] = names if len(names) > 1 else names[0]
        if frames := item.pop("frames", None):
            write, ending = _VIDEOS[number % len(_VIDEOS)]
            item["video"] = f"videos/{item['id']}{ending}"
            write(folder / item["video"], frames)
        question, answer = item.pop("question"), item.pop("answer")
        item["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(item))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": ".", "annotation": f"{split}.jsonl", "data_augment": False, "repeat_time": 1, "length": count}
    (folder / f"{split}.json").write_text(json.dumps({f"kinds_{split}": entry}, indent=2))


def _photographs():
    import skimage.data

    return {word: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name, word in PHOTOGRAPHS.items()}


class _Drawer:
    """Draws samples of one split: category, question, answer, and pictures or frames, uint8 (H, W) or (H, W, 3)."""

    def __init__(self, split, pool, photographs, rng):
        self.split, self.pool, self.photographs, self.rng = split, pool, photographs, rng

    def text(self):
        numbers = [0, 0, 0]
        while len(set(numbers)) < 3 or held_out(numbers) != (self.split == "test"):
            numbers = self.rng.integers(0, 10, size=3).tolist()
        word, choose = (("largest", max), ("smallest", min))[self.rng.integers(2)]
        first, second, third = numbers
        question = f"Which is the {word} of {first}, {second} and {third}?"
        return {"category": "three numbers", "question": question, "answer": str(choose(numbers))}

    def image(self):
        words = list(self.photographs)
        answer = int(self.rng.integers(len(words)))
        photograph = self.photographs[words[answer]]
        side = int(min(photograph.size) * self.rng.uniform(SMALLEST_WINDOW, 1))
        left, top = (int(self.rng.integers(edge - side + 1)) for edge in photograph.size)
        window = photograph.crop((left, top, left + side, top + side))
        choice = ", ".join(f"{number} {word}" for number, word in enumerate(words))
        return {
            "category": "photograph",
            "question": f"<image>\nWhich photograph: {choice}?",
            "answer": str(answer),
            "pictures": [np.asarray(window.resize((PHOTOGRAPH_SIZE, PHOTOGRAPH_SIZE)))],
        }

    def images(self):
        count, asked, choose = ((2, "sum of both", sum), (3, "largest digit", max))[self.rng.integers(2)]
        values = self.rng.integers(0, 10, size=count).tolist()
        places = ", ".join(f"Picture {number}: <image>" for number in range(1, count + 1))
        return {
            "category": "several pictures",
            "question": f"{places}. What is the {asked}?",
            "answer": str(choose(values)),
            "pictures": [self._alone(value) for value in values],
        }

    def video(self):
        value, way = int(self.rng.integers(10)), list(MOVES)[self.rng.integers(len(MOVES))]
        sample = {"category": "video", "frames": self._moving(value, MOVES[way])}
        if self.rng.random() < 0.5:
            return {**sample, "question": "<video>\nWhich digit moves?", "answer": str(value)}
        asked = way if self.rng.random() < 0.5 else list(MOVES)[self.rng.integers(len(MOVES))]
        question = f"<video>\nDoes the digit move {asked}?"
        return {**sample, "question": question, "answer": "yes" if asked == way else "no"}

    def known(self):
        if self.rng.random() < KNOWN_TEXT:
            category, question, answer = text_question(self.rng)
            return {"category": f"known: {category}", "question": question, "answer": answer}
        values = self.rng.integers(0, 10, size=4)
        category, question, answer = QUESTIONS[self.rng.integers(len(QUESTIONS))](values, self.rng)
        pictures = [compose([self.pool[value] for value in values], self.rng)]
        question = f"<image>\n{question}"
        return {"category": f"known: {category}", "question": question, "answer": answer, "pictures": pictures}

    def _alone(self, value):
        """A digit in one of the four cells."""
        pools = [EMPTY] * 4
        pools[self.rng.integers(4)] = self.pool[value]
        return compose(pools, self.rng)

    def _moving(self, value, step):
        """A digit that crosses the picture from edge to edge, within a row or a column of cells."""
        pool, way = self.pool[value], IMAGE_SIZE - DIGIT
        small = Image.fromarray((pool[self.rng.integers(len(pool))] / 16.0).astype(np.float32))
        digit = np.asarray(small.resize((DIGIT, DIGIT), Image.Resampling.BILINEAR)) * self.rng.uniform(0.7, 1.0)
        across, frames = int(CELL * self.rng.integers(2) + self.rng.integers(CELL - DIGIT + 1)), []
        for number in range(FRAMES):
            along = round(way * (number if sum(step) > 0 else FRAMES - 1 - number) / (FRAMES - 1))
            top, left = (along, across) if step[0] else (across, along)
            canvas = self.rng.normal(0, 0.02, (IMAGE_SIZE, IMAGE_SIZE))
            canvas[top : top + DIGIT, left : left + DIGIT] += digit
            frames.append((canvas.clip(0, 1) * 255).astype(np.uint8))
        return frames


def held_out(numbers):
    """bool: Whether three numbers, in any order, are of the held-out split."""
    return sum(numbers) % HELD_OUT_NUMBERS == 0


def _write_gif(path, frames):
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=1000 // FRAMES_PER_SECOND, loop=0)


def _write_mp4(path, frames):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = IMAGE_SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", BIT_RATE
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.stack([frame] * 3, axis=-1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_frames(path, frames):
    path.mkdir()
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(path / f"{number}.png")


_VIDEOS = ((_write_gif, ".gif"), (_write_mp4, ".mp4"), (_write_frames, ""))
