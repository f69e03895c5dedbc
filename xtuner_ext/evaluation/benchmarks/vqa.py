"""Questions with short answers: VQAv2, OKVQA, TextVQA, VizWiz, ChartQA, DocVQA and InfographicVQA.

All of them come as lines of questions (InternVL's and LLaVA's), as the authors' own JSON, or as both, where the lines
ask and the JSON has the answers.
"""

import dataclasses
import json

from ...errors import UserError
from ..scorers import anls, chartqa
from ..scorers import vqa as scorer
from ..scorers.text import evalai
from .base import SHORT, Benchmark, question
from .files import read_json, read_lines, take

UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'. {SHORT}"
META = {
    "question_type": "question_type",
    "answer_type": "answer_type",
    "evidence": "evidence",
    "operation/reasoning": "operation",
}


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a split is: lines of questions, the authors' questions and answers, folders of images.

    ``image`` is the file name of a number, for authors' questions that give no more; ``category`` names what the file
    is of.
    """

    lines: tuple
    official: tuple = ()
    answers: tuple = ()
    images: tuple = ()
    image: str = "{}"
    category: str = "all"


def _read(folder, parts, prompt):
    if folder.file:
        return _part(folder, parts[0], prompt, folder.file, None, None)
    found = []
    for part in parts:
        lines, official = folder.find(*part.lines), folder.find(*part.official)
        if lines is None and official is None:
            folder.need(*part.lines, *part.official)
        answers = folder.need(*part.answers) if part.answers and lines is None else folder.find(*part.answers)
        found += _part(folder, part, prompt, lines, official, answers)
    if len(parts) > 1:
        # Ids are those of one file.
        found = [{**asked, "id": f"{asked['category']}-{asked['id']}"} for asked in found]
    return found


def _part(folder, part, prompt, lines, official, answers):
    items = _entries(lines or official)
    known = _known(official) | _known(answers)
    found, seen = [], set()
    for where, item in items:
        key = take(item, where, "question_id", "questionId", "id") if _has_id(item) else None
        words = item.get("question", item.get("query"))
        # LLaVA's lines of TextVQA have the image where the id belongs.
        asked = item.get("text", "").split("\n")
        pairs = ((name, line.lower()) for name in (key, item.get("image")) for line in [words or "", *asked])
        same = next((known[pair] for pair in pairs if pair in known), {})
        item = {**same, **known.get(key, {}), **item}
        text = item["text"] if "text" in item else f"{take(item, where, 'question', 'query')} {prompt}"
        gold = next((item[name] for name in ("answers", "answer", "label") if item.get(name) is not None), None)
        line = int(where.rsplit(":", 1)[-1])
        number = line if key is None else f"{key}#{line}" if key in seen else key
        seen.add(key)
        image = folder.image(_image(item, where, part), part.images, where)
        meta = {to: item[key] for key, to in META.items() if key in item} | {"image": image.name}
        found.append(question(number, f"<image>\n{text}", [image], _answers(gold), where, part.category, **meta))
    return found


def _has_id(item):
    return any(key in item for key in ("question_id", "questionId", "id"))


def _entries(path):
    """list[tuple[str, dict]]: ``file:item`` and item, of lines, a list, or a list under a name."""
    if path.suffix == ".jsonl":
        return read_lines(path)
    content = read_json(path)
    if isinstance(content, dict):
        content = next((content[key] for key in ("questions", "data", "annotations") if key in content), None)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f"{path} holds no list, expected one, or one under 'questions', 'data' or 'annotations'")
    return [(f"{path}:{number}", item) for number, item in enumerate(content, start=1)]


def _known(path):
    """dict: Items by id, and by image and question where both are there."""
    found = {}
    for _, item in _entries(path) if path else ():
        for key in ("question_id", "questionId"):
            if key in item:
                found[item[key]] = {**found.get(item[key], {}), **item}
        for key in ("image_id", "image"):
            if key in item and "question" in item:
                found[item[key], item["question"].lower()] = item
    return found


def _image(item, where, part):
    name = take(item, where, "image", "image_local_name", "imgname", "image_id")
    if "image_id" not in item or name != item["image_id"]:
        return name
    try:
        return part.image.format(name)
    except ValueError as error:
        raise UserError(f"{where}: image_id is {name!r}, expected a whole number") from error


def _answers(gold):
    """list[str] | None: Texts, of texts or of objects with an ``answer``."""
    if gold is None or gold == "":
        return None
    gold = gold if isinstance(gold, list) else [gold]
    return [str(one["answer"] if isinstance(one, dict) else one) for one in gold]


def _evalai(rows, path, split):
    """Write what EvalAI takes; a question without an answer has an empty one."""
    found = [{"question_id": row["id"], "answer": evalai(row["prediction"] or "")} for row in rows]
    path.write_text(json.dumps(found), encoding="utf-8")


def _vizwiz(rows, path, split):
    found = [{"image": row["meta"]["image"], "answer": evalai(row["prediction"] or "")} for row in rows]
    path.write_text(json.dumps(found), encoding="utf-8")


def _docvqa(rows, path, split):
    found = [{"questionId": row["id"], "answer": row["prediction"] or ""} for row in rows]
    path.write_text(json.dumps(found), encoding="utf-8")


def _benchmark(name, splits, module, subfolders, tokens, tiles, prompt=SHORT, upload=None):
    listed = []
    for split, parts in splits.items():
        for part in parts:
            asked = " or ".join(dict.fromkeys((*part.lines, *part.official)))
            answers = f", answers in {' or '.join(part.answers)}" if part.answers else ""
            listed.append(f"split {split}: {asked}{answers}, images in {' or '.join(part.images)}")
    return Benchmark(
        name=name,
        reader=lambda folder, split: _read(folder, splits[split], prompt),
        marker=module.mark,
        scorer=module.score,
        settings={"max_new_tokens": tokens, "min_new_tokens": 1, "max_tiles": tiles},
        files=tuple(listed),
        splits=tuple(splits),
        subfolders=subfolders,
        upload=upload,
    )


_COCO = {name: (name, f"coco/{name}", f"../coco/{name}") for name in ("val2014", "test2015")}
_VQA_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
VQAV2 = _benchmark(
    "vqav2",
    {
        "val": [
            Files(
                ("vqav2_val.jsonl",),
                (_VQA_QUESTIONS.format("val2014"),),
                ("v2_mscoco_val2014_annotations.json",),
                _COCO["val2014"],
                "COCO_val2014_{:012d}.jpg",
            )
        ],
        "test-dev": [
            Files(
                ("vqav2_testdev.jsonl", "llava_vqav2_mscoco_test-dev2015.jsonl"),
                (_VQA_QUESTIONS.format("test-dev2015"),),
                (),
                _COCO["test2015"],
                "COCO_test2015_{:012d}.jpg",
            )
        ],
        "test": [
            Files(
                ("llava_vqav2_mscoco_test2015.jsonl",),
                (_VQA_QUESTIONS.format("test2015"),),
                (),
                _COCO["test2015"],
                "COCO_test2015_{:012d}.jpg",
            )
        ],
    },
    scorer,
    ("vqav2",),
    10,
    6,
    upload=_evalai,
)
OKVQA = _benchmark(
    "okvqa",
    {
        "val": [
            Files(
                ("okvqa_val.jsonl",),
                ("OpenEnded_mscoco_val2014_questions.json",),
                ("mscoco_val2014_annotations.json",),
                _COCO["val2014"],
                "COCO_val2014_{:012d}.jpg",
            )
        ]
    },
    scorer,
    ("okvqa",),
    10,
    6,
)
_TEXTVQA_IMAGES = ("train_images", "train_val_images")
TEXTVQA = _benchmark(
    "textvqa",
    {
        "val": [
            Files(
                ("textvqa_val.jsonl",),
                ("TextVQA_0.5.1_val.json",),
                ("textvqa_val_annotations.json", "TextVQA_0.5.1_val.json"),
                _TEXTVQA_IMAGES,
                "{}.jpg",
            )
        ],
        "val_ocr": [
            Files(
                ("textvqa_val_llava.jsonl", "llava_textvqa_val_v051_ocr.jsonl"),
                (),
                ("textvqa_val_annotations.json", "TextVQA_0.5.1_val.json"),
                _TEXTVQA_IMAGES,
                "{}.jpg",
            )
        ],
    },
    scorer,
    ("textvqa",),
    10,
    6,
)
VIZWIZ = _benchmark(
    "vizwiz",
    {
        "val": [Files(("vizwiz_val.jsonl",), ("val.json",), ("vizwiz_val_annotations.json", "val.json"), ("val",))],
        "test": [Files(("vizwiz_test.jsonl", "llava_test.jsonl"), ("test.json",), (), ("test",))],
    },
    scorer,
    ("vizwiz",),
    10,
    6,
    UNANSWERABLE,
    _vizwiz,
)
CHARTQA = _benchmark(
    "chartqa",
    {
        "test": [
            Files(
                (f"test_{kind}.jsonl",),
                (f"test_{kind}.json", f"test/test_{kind}.json"),
                (),
                ("test/png", "png", "ChartQA Dataset/test/png"),
                category=kind,
            )
            for kind in ("human", "augmented")
        ]
    },
    chartqa,
    ("chartqa",),
    100,
    12,
)
DOCVQA = _benchmark(
    "docvqa",
    {
        "val": [Files(("val.jsonl",), ("val/val_v1.0.json", "val_v1.0.json", "val_v1.0_withQT.json"), (), ("val",))],
        "test": [Files(("test.jsonl",), ("test/test_v1.0.json", "test_v1.0.json"), (), ("test",))],
    },
    anls,
    ("docvqa",),
    100,
    18,
    upload=_docvqa,
)
_INFOVQA_IMAGES = ("infographicsvqa_images", "images")
INFOVQA = _benchmark(
    "infovqa",
    {
        "val": [Files(("val.jsonl",), ("infographicsVQA_val_v1.0_withQT.json",), (), _INFOVQA_IMAGES)],
        "test": [Files(("test.jsonl",), ("infographicsVQA_test_v1.0.json",), (), _INFOVQA_IMAGES)],
    },
    anls,
    ("infographicsvqa", "infovqa"),
    100,
    24,
    upload=_docvqa,
)
