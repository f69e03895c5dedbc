"""GQA, POPE, MME and the families of visual question answering: read, asked as their kits do, scored by hand."""

import json

import pytest

from tests.evaluation.benchmarks.toys import answer, dump, lines, picture, prompt
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation import benchmarks

SHORT = "Answer the question using a single word or phrase."


def _gqa_questions():
    return {
        str(n): {
            "question": "Is it red?",
            "answer": gold,
            "imageId": f"n{n}",
            "isBalanced": True,
            "types": {"structural": kind, "semantic": "attr", "detailed": "x"},
            "groups": {"global": None, "local": "l"},
            "semantic": [{"operation": "select", "argument": "it"}],
            "entailed": [],
            "equivalent": [],
        }
        for n, gold, kind in ((1, "yes", "verify"), (2, "no", "verify"), (3, "dog", "query"))
    }


def _gqa_lines(kind):
    for number in (1, 2, 3):
        if kind == "internvl":
            more = {"image": f"data/gqa/images/n{number}.jpg", "question": "Is it red?", "answer": "unused"}
            yield {"question_id": str(number), **more}
        else:
            yield {"question_id": str(number), "image": f"n{number}.jpg", "text": f"Is it red?\n{SHORT}"}


@pytest.mark.parametrize("layout", ["internvl", "llava", "official"])
def test_gqa(tmp_path, layout):
    root = tmp_path / ("data/gqa" if layout != "llava" else "playground/data/eval/gqa")
    questions = (
        "testdev_balanced_questions.json" if layout != "llava" else "data/questions1.2/testdev_balanced_questions.json"
    )
    dump(root / questions, _gqa_questions())
    for number in (1, 2, 3):
        picture(root / ("images" if layout != "llava" else "data/images") / f"n{number}.jpg")
    if layout == "internvl":
        lines(root / "llava_gqa_testdev_balanced_qwen_format.jsonl", _gqa_lines(layout))
    if layout == "llava":
        lines(root / "llava_gqa_testdev_balanced.jsonl", _gqa_lines(layout))
    for data in (root, tmp_path):
        bench, questions, rows = answer("gqa", data, ["Yes.", "yes", "dog"])
        blank = "\n" if layout == "llava" else " "
        assert prompt(questions[0]) == f"<image>\nIs it red?{blank}{SHORT}"
        if layout != "official":
            assert bench.read(next(root.glob("llava_gqa*.jsonl"))) == questions
        assert questions[2]["images"][0].name == "n3.jpg" and questions[0]["category"] == "verify"
        report = bench.score(rows, "reference")
        assert {name: report["scores"][name] for name in ("accuracy", "binary", "open")} == {
            "accuracy": 2 / 3 * 100,
            "binary": 50.0,
            "open": 100.0,
        }
        assert report["by"]["words"] == {"3": {"accuracy": 2 / 3 * 100, "count": 3}}


def test_gqa_choices_and_plain_lines(tmp_path):
    picture(tmp_path / "images" / "n1.jpg")
    items = dict(list(_gqa_questions().items())[:1])
    dump(tmp_path / "val_balanced_questions.json", items)
    dump(tmp_path / "val_choices.json", {"1": {"valid": ["yes", "no"], "plausible": ["no"]}})
    bench, _, rows = answer("gqa", tmp_path, ["yes"], "val")
    assert (bench.score(rows)["scores"]["validity"], bench.score(rows)["scores"]["plausibility"]) == (100.0, 0.0)
    lines(tmp_path / "mine.jsonl", [{"question_id": 7, "image": "n1.jpg", "question": "What?", "answer": "dog"}])
    bench, _, rows = answer("gqa", tmp_path / "mine.jsonl", ["Dog"])
    assert bench.score(rows)["scores"] == {"accuracy": 100.0}


@pytest.mark.parametrize("layout", ["lines", "labels"])
def test_pope(tmp_path, layout):
    root, asked = tmp_path / "pope", []
    for category, golds in (("random", ("yes", "no")), ("popular", ("no",)), ("adversarial", ("yes",))):
        items = []
        for number, gold in enumerate(golds):
            item = {"question_id": number, "image": f"{number}.jpg", "text": f"Is there a {category}?"}
            items.append({**item, "label": gold})
            asked.append({**item, "question_id": len(asked), "category": category, "text": f"{item['text']}\n{SHORT}"})
            picture(root / "val2014" / f"{number}.jpg")
        lines(root / "coco" / f"coco_pope_{category}.json", items)
    if layout == "lines":
        lines(root / "llava_pope_test.jsonl", asked)
    bench, questions, rows = answer("pope", tmp_path, ["Yes", "Yes", "No", "yes"])
    assert prompt(questions[0]) == f"<image>\nIs there a random?\n{SHORT}"
    assert layout == "labels" or bench.read(root / "llava_pope_test.jsonl") == questions
    assert [question["gold"] for question in questions] == ["yes", "no", "no", "yes"]
    report = bench.score(rows, "reference")
    # F1: random 2/3 (one of two said is true), popular 0 (nothing said), adversarial 1.
    assert report["scores"]["macro_f1"] == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert report["scores"]["f1"] == pytest.approx(80.0) and report["scores"]["accuracy"] == 75.0


def test_pope_labels_must_be_there(tmp_path):
    picture(tmp_path / "val2014" / "0.jpg")
    item = {"question_id": 0, "image": "0.jpg", "text": f"Is it?\n{SHORT}", "category": "random"}
    lines(tmp_path / "llava_pope_test.jsonl", [item])
    with pytest.raises(
        UserError, match="has no coco/coco_pope_random.json or coco_pope_random.json; pope is read from"
    ):
        benchmarks.get("pope").read(tmp_path)
    lines(tmp_path / "coco_pope_random.json", [{"image": "0.jpg", "text": "Is that?", "label": "no"}])
    with pytest.raises(UserError, match="'Is it[?]' on 0.jpg has no yes or no, here or among the labels of 'random'"):
        benchmarks.get("pope").read(tmp_path)
    lines(tmp_path / "coco_pope_random.json", [{"image": "0.jpg", "text": "Is it?", "label": x} for x in ("no", "yes")])
    with pytest.raises(UserError, match="label is 'yes', an earlier line on the same has the other one"):
        benchmarks.get("pope").read(tmp_path)


MME = {"existence": ["Is it there?", "Is it not there?"], "code_reasoning": ["Is it 1?", "Is it 2?"]}
ORDER = "Please answer yes or no."


@pytest.mark.parametrize("layout", ["results", "release", "subfolders", "llava"])
def test_mme(tmp_path, layout):
    release = tmp_path / "mme" / "MME_Benchmark_release_version"
    pictures, texts = ("images", "questions_answers_YN") if layout == "subfolders" else (".", ".")
    asked = []
    for task, questions in MME.items():
        picture(release / task / pictures / "1.png")
        (release / task / texts).mkdir(exist_ok=True)
        pairs = [f"{question} {ORDER}\t{gold}" for question, gold in zip(questions, ("Yes", "No"))]
        (release / task / texts / "1.txt").write_text("\n".join(pairs))
        if layout == "results":
            path = tmp_path / "mme" / "Your_Results" / f"{task}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"1.png\t{pair}\n" for pair in pairs))
        item = {"question_id": f"{task}/1.png", "image": f"{task}/1.png", "category": task}
        asked += [{**item, "text": f"{question}\n{SHORT}"} for question in questions]
    if layout == "llava":
        lines(tmp_path / "mme" / "llava_mme.jsonl", asked)
    bench, questions, rows = answer("mme", tmp_path, ["Yes", "No", "Yes", "Yes"])
    expected = f"Is it there?\n{SHORT}" if layout == "llava" else f"Is it there? {ORDER} {SHORT}"
    assert prompt(questions[0]) == f"<image>\n{expected}"
    for mode in ("reference", "robust"):
        assert bench.score(rows, mode)["scores"] == {"perception": 200.0, "cognition": 50.0, "total": 250.0}


def test_mme_one_subtask(tmp_path):
    picture(tmp_path / "MME_Benchmark_release_version" / "OCR" / "1.jpg")
    (tmp_path / "OCR.txt").write_text("1.jpg\tIs it?\tYes\n")
    assert benchmarks.get("mme").read(tmp_path / "OCR.txt")[0]["category"] == "OCR"
    for text, message in (("1.jpg\tIs it?\n", "has 2 cells"), ("1.jpg\tIs it?\tMaybe\n", "answer is 'Maybe'")):
        (tmp_path / "OCR.txt").write_text(text)
        with pytest.raises(UserError, match=f"OCR.txt:1: {message}"):
            benchmarks.get("mme").read(tmp_path / "OCR.txt")


def _ten(word, count):
    return [{"answer": word, "answer_id": n} for n in range(count)] + [{"answer": "other"}] * (10 - count)


@pytest.mark.parametrize("layout", ["lines", "official"])
@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_vqa_of_coco(tmp_path, name, layout):
    root, prefix = tmp_path / name, "v2_" if name == "vqav2" else ""
    numbers = (262148000, 262148001, 393225000)
    for number in numbers:
        picture(tmp_path / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    gold = [
        {
            "question_id": n,
            "image_id": n,
            "answers": _ten("two", count),
            "question_type": "how many",
            "answer_type": "number",
        }
        for n, count in zip(numbers, (10, 3, 1))
    ]
    dump(root / f"{prefix}mscoco_val2014_annotations.json", {"annotations": gold})
    asked = [{"question_id": n, "image_id": n, "question": "How many?"} for n in numbers]
    if layout == "official":
        dump(root / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    else:
        image = "data/coco/val2014/COCO_val2014_{:012d}.jpg"
        lines(
            root / f"{name}_val.jsonl",
            [{"question_id": n, "image": image.format(n), "question": "How many?", "answer": "two"} for n in numbers],
        )
    bench, questions, rows = answer(name, root, ["2", "Two.", "two"])
    assert prompt(questions[0]) == f"<image>\nHow many? {SHORT}" and questions[1]["gold"].count("two") == 3
    report = bench.score(rows, "reference")
    assert report["scores"]["accuracy"] == pytest.approx((1 + 0.9 + 0.3) / 3 * 100)
    assert report["by"]["answer_type"]["number"]["count"] == 3


def test_vqav2_test_is_handed_in(tmp_path):
    picture(tmp_path / "vqav2" / "test2015" / "a.jpg")
    asked = [
        {"question_id": n, "image": "a.jpg", "text": f"How many?\n{SHORT}", "category": "default"} for n in (5, 6, 7)
    ]
    lines(tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", asked)
    bench, questions, rows = answer("vqav2", tmp_path, ["Two dogs.", None, "the cat"], "test")
    assert prompt(questions[0]) == f"<image>\nHow many?\n{SHORT}"
    assert bench.score(rows)["scores"] == {}
    bench.submission(rows, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 5, "answer": "2 dogs"},
        {"question_id": 6, "answer": ""},
        {"question_id": 7, "answer": "cat"},
    ]


@pytest.mark.parametrize("layout", ["internvl", "official", "llava"])
def test_textvqa(tmp_path, layout):
    root = tmp_path / "textvqa"
    picture(root / "train_images" / "0a1.jpg")
    # Two questions on one image.
    items = [
        {
            "question_id": n,
            "image_id": "0a1",
            "question": f"What {n}?",
            "answers": ["stop"] * count + ["x"] * (10 - count),
        }
        for n, count in ((34602, 10), (34603, 2))
    ]
    if layout == "internvl":
        dump(
            root / "textvqa_val_annotations.json",
            {
                "annotations": [
                    {"question_id": item["question_id"], "answers": [{"answer": text} for text in item["answers"]]}
                    for item in items
                ]
            },
        )
        lines(
            root / "textvqa_val.jsonl",
            [
                {
                    "question_id": item["question_id"],
                    "image": "data/textvqa/train_images/0a1.jpg",
                    "question": item["question"],
                }
                for item in items
            ],
        )
    else:
        dump(root / "TextVQA_0.5.1_val.json", {"data": items})
    if layout == "llava":
        lines(
            root / "llava_textvqa_val_v051_ocr.jsonl",
            [
                {
                    "question_id": "0a1",
                    "image": "0a1.jpg",
                    "text": f"{item['question']}\nReference OCR token: STOP\n{SHORT}",
                }
                for item in items
            ],
        )
    bench, questions, rows = answer("textvqa", tmp_path, ["Stop", "stop"], "val_ocr" if layout == "llava" else "val")
    assert bench.score(rows, "reference")["scores"]["accuracy"] == pytest.approx((1 + 0.6) / 2 * 100)
    assert prompt(questions[1]).startswith("<image>\nWhat 34603?") and prompt(questions[1]).endswith(SHORT)
    assert ("OCR" in prompt(questions[1])) is (layout == "llava")


@pytest.mark.parametrize("layout", ["internvl", "official"])
def test_vizwiz(tmp_path, layout):
    root, name = tmp_path / "vizwiz", "VizWiz_val_00000000.jpg"
    picture(root / "val" / name)
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    if layout == "official":
        dump(
            root / "val.json", [{"image": name, "question": "What?", "answers": answers, "answer_type": "unanswerable"}]
        )
    else:
        key = f"data/vizwiz/val/{name}"
        lines(root / "vizwiz_val.jsonl", [{"question_id": key, "image": key, "question": "What?", "answer": "x"}])
        dump(root / "vizwiz_val_annotations.json", {"annotations": [{"question_id": key, "answers": answers}]})
    bench, questions, rows = answer("vizwiz", tmp_path, ["Unanswerable"])
    hint = "When the provided information is insufficient, respond with 'Unanswerable'. "
    assert prompt(questions[0]) == f"<image>\nWhat? {hint}{SHORT}"
    assert bench.score(rows, "reference")["scores"] == {"accuracy": 100.0}
    bench.submission(rows, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [{"image": name, "answer": "unanswerable"}]


@pytest.mark.parametrize("layout", ["internvl", "official"])
def test_chartqa(tmp_path, layout):
    root = tmp_path / "chartqa"
    picture(root / "test" / "png" / "1.png")
    for kind, gold in (("human", "100"), ("augmented", "Blue")):
        if layout == "internvl":
            item = {"image": "data/chartqa/test/png/1.png", "question": "How?", "question_id": 0, "answer": gold}
            lines(root / f"test_{kind}.jsonl", [item])
        else:
            dump(root / "test" / f"test_{kind}.json", [{"imgname": "1.png", "query": "How?", "label": gold}])
    bench, questions, rows = answer("chartqa", tmp_path, ["95", "blue"])
    assert prompt(questions[0]) == f"<image>\nHow? {SHORT}"
    assert (bench.score(rows, "reference")["scores"]["mean"], bench.score(rows)["scores"]["mean"]) == (50.0, 100.0)


@pytest.mark.parametrize("layout", ["internvl", "official"])
def test_docvqa(tmp_path, layout):
    root = tmp_path / "docvqa"
    picture(root / "val" / "documents" / "p1.png")
    item = {"questionId": 49153, "question": "Who?", "image": "documents/p1.png", "answers": ["Ann Lee", "Ann"]}
    dump(root / "val" / "val_v1.0.json", {"dataset_name": "docvqa", "data": [item]})
    if layout == "internvl":
        more = {"image": "data/docvqa/val/documents/p1.png", "answer": ["Ann Lee", "Ann"]}
        lines(root / "val.jsonl", [{"question_id": 49153, "question": "Who?", **more}])
    bench, questions, rows = answer("docvqa", tmp_path, ["Ann  Lea"])
    assert questions[0]["gold"] == ["Ann Lee", "Ann"] and prompt(questions[0]) == f"<image>\nWho? {SHORT}"
    assert bench.score(rows, "reference")["scores"]["anls"] == pytest.approx((1 - 1 / 8) * 100)
    bench.submission(rows, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [{"questionId": 49153, "answer": "Ann  Lea"}]


def test_infovqa(tmp_path):
    root = tmp_path / "infographicsvqa"
    picture(root / "infographicsvqa_images" / "1.jpeg")
    item = {
        "questionId": 1,
        "question": "Who?",
        "image_local_name": "1.jpeg",
        "answers": ["Ann"],
        "answer_type": ["single span"],
        "evidence": ["Text", "Map"],
        "operation/reasoning": [],
    }
    dump(root / "infographicsVQA_val_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": [item]})
    bench, _, rows = answer("infovqa", tmp_path, ["ann"])
    report = bench.score(rows, "reference")
    assert report["scores"]["anls"] == 100.0 and set(report["by"]["evidence"]) == {"Map", "Text"}


def test_own_lines_of_answers(tmp_path):
    picture(tmp_path / "a.png")
    items = [
        {"image": "a.png", "question": "What?", "answer": "dog"},
        {"image": "a.png", "question": "Who?", "answers": ["x", "y"]},
    ]
    lines(tmp_path / "mine.jsonl", items)
    bench, questions, rows = answer("vqav2", tmp_path / "mine.jsonl", ["a dog", "y"])
    assert [question["id"] for question in questions] == [1, 2] and bench.score(rows)["scores"]["accuracy"] == 100.0
