"""XTuner's own scorers give the scores that stand under its name."""

import random
from types import SimpleNamespace

import pandas
import pytest

import xtuner_ext  # noqa: F401 - lets the installed xtuner be imported
from tests.evaluation.scorers.rows import row
from xtuner_ext.evaluation.scorers import mmbench, refcoco


def test_boxes():
    from xtuner.tools.eval_refcoco import eval_iou

    chance, rows, answers = random.Random(0), [], []
    for number in range(200):
        width, height = chance.randint(60, 600), chance.randint(60, 600)
        x, y, w, h = (chance.randint(1, side // 2) for side in (width, height, width, height))
        box = [x, y, x + w, y + h]
        true = [int(edge * 100 / side) for edge, side in zip(box, (width, height) * 2)]
        said = [max(0, edge + chance.randint(-12, 12)) for edge in true]
        said[2:] = max(said[0], said[2]), max(said[1], said[3])
        text = chance.choice(["{<%d><%d><%d><%d>}</s>" % tuple(said), "no box", "1 2 3"])
        rows.append(row(text, box, number, box=box, width=width, height=height))
        answers.append({"bbox": [x, y, w, h], "width": width, "height": height, "ans": text})
    score = refcoco.score(rows, "reference")["scores"]["accuracy (XTuner's boxes)"]
    assert score == eval_iou(answers) * 100 and 5 < score < 60


def test_letters():
    from xtuner.tools.mmbench import MMBenchDataset

    chance, table = random.Random(1), []
    texts = ["A", "B", "(C)", "B. dog", "Answer: A", "AB", "", "E", "it is A"]
    for index in range(40):
        for turn in range(chance.randint(1, 3)):
            table.append(
                {
                    "index": index + turn * 1_000_000,
                    "answer": chance.choice("AB"),
                    "category": chance.choice(["x", "y"]),
                    "prediction": chance.choice(texts),
                }
            )
    frame = pandas.DataFrame(table)
    dataset = SimpleNamespace(df=frame, has_l2_category=False, ABBRS=MMBenchDataset.ABBRS)
    expected = MMBenchDataset.eval_result(dataset, frame.copy(), show=False)
    options = {"A": "cat", "B": "dog", "C": "cow"}
    rows = [
        row(item["prediction"], item["answer"], item["index"], item["category"], index=item["index"], options=options)
        for item in table
    ]
    score = mmbench.score(rows, "reference")["scores"]["circular (XTuner's letters)"]
    assert score == pytest.approx(expected["Average"] * 100) and 5 < score < 60
