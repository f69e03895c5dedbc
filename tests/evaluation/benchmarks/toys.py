"""Small files in the benchmarks' formats."""

import base64
import io
import json

from PIL import Image

from xtuner_ext.evaluation import benchmarks


def picture(path, colour="red"):
    """Write a small image file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def embedded(colour="red"):
    """str: A small PNG file in base64."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def lines(path, items):
    """Write a JSONL file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def dump(path, content):
    """Write a JSON file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def table(path, rows):
    """Write a TSV file with the columns of the first row."""
    text = "\n".join("\t".join("" if cell is None else str(cell) for cell in row) for row in [list(rows[0])])
    text += "\n" + "\n".join("\t".join("" if v is None else str(v) for v in row.values()) for row in rows) + "\n"
    path.write_text(text, encoding="utf-8")


def answer(name, data, said, split=None):
    """tuple: The benchmark, its questions, and joined rows as a runner would make them, last question first."""
    bench = benchmarks.get(name)
    questions = bench.read(data, split)
    assert len(said) == len(questions)
    rows = [
        {
            "id": question["id"],
            "question": question["turns"][-1][0],
            "prompt": question["turns"][-1][0],
            "prediction": text,
            "parsed": None,
            "gold": question["gold"],
            "correct": None,
            "category": question["category"],
            "meta": {"source": question["where"], **question["meta"]},
        }
        for question, text in zip(questions, said)
        if text is not None
    ]
    return bench, questions, bench.join(questions, json.loads(json.dumps(rows[::-1])))


def prompt(question):
    """str: What is asked."""
    assert question["video"] is question["clip"] is question["system"] is None and len(question["turns"]) == 1
    text, answer = question["turns"][0]
    assert answer is None and text.count("<image>") == len(question["images"])
    return text
