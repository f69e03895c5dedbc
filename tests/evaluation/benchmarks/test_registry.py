"""The registry, joining, and messages about what must be where."""

import pickle

import pytest

from tests.evaluation.benchmarks.toys import answer, dump, embedded, lines, picture, table
from xtuner_ext.data.dataset import open_image
from xtuner_ext.errors import BadSample, UserError
from xtuner_ext.evaluation import benchmarks
from xtuner_ext.evaluation.benchmarks.files import EmbeddedImage, read_table, table_images


def test_names():
    assert benchmarks.get("POPE").name == "pope"
    with pytest.raises(UserError, match="there is no benchmark 'popo', expected one of gqa, pope, mme"):
        benchmarks.get("popo")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_an_empty_folder_is_answered_with_all_that_must_be_there(name, tmp_path):
    bench = benchmarks.get(name)
    for split in bench.splits:
        with pytest.raises(UserError) as error:
            bench.read(tmp_path, split)
        assert all(file in str(error.value) for file in bench.files) and str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match="does not exist, expected"):
        bench.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{name} has no split 'moon', expected one of {bench.splits[0]}"):
        bench.read(tmp_path, "moon")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_settings_are_those_of_the_kit(name):
    expected = {
        "gqa": 10,
        "pope": 100,
        "mme": 20,
        "mmbench": 100,
        "ccbench": 100,
        "seed": 100,
        "scienceqa": 100,
        "vqav2": 10,
        "textvqa": 10,
        "okvqa": 10,
        "vizwiz": 10,
        "chartqa": 100,
        "docvqa": 100,
        "infovqa": 100,
        "coco_caption": 30,
        "refcoco": 100,
        "mmvm": 1024,
        "mmvm_number": 1024,
    }
    settings = benchmarks.get(name).settings
    assert settings["max_new_tokens"] == expected[name]
    assert settings["min_new_tokens"] == (8 if name == "coco_caption" else 1)
    assert settings["max_tiles"] == {"chartqa": 12, "docvqa": 18, "infovqa": 24}.get(name, 6)


@pytest.fixture
def pope(tmp_path):
    """A file of three questions in POPE's form."""
    picture(tmp_path / "val2014" / "a.jpg")
    items = [{"question_id": n, "image": "a.jpg", "text": f"Is {n}?", "label": "yes"} for n in range(3)]
    lines(tmp_path / "my.jsonl", items)
    return tmp_path / "my.jsonl"


def test_rows_are_joined_by_id(pope):
    bench, questions, rows = answer("pope", pope, ["yes", None, "no"])
    assert [(row["id"], row["prediction"]) for row in rows] == [(0, "yes"), (1, None), (2, "no")]
    assert [row["correct"] for row in bench.mark(rows)] == [True, False, False]
    report = bench.score(rows)
    assert (report["missing"], report["count"]) == (1, 3)
    with pytest.raises(UserError, match="1 of 3 questions have no answer"):
        bench.score(rows, strict=True)
    with pytest.raises(UserError, match="id '0' of pope has two result rows"):
        bench.join(questions, [rows[0], {**rows[0], "id": "0"}])
    with pytest.raises(UserError, match="id 9 of pope is in a result row, but in no question"):
        bench.join(questions, [{**rows[0], "id": 9}])


def test_ids_are_unique(pope):
    pope.write_text(pope.read_text() * 2)
    with pytest.raises(UserError, match=r"my.jsonl:4: id 0 is that of .*my.jsonl:1 as well"):
        benchmarks.get("pope").read(pope)


def test_only_some_benchmarks_have_a_server(pope, tmp_path):
    bench, _, rows = answer("pope", pope, ["yes"] * 3)
    with pytest.raises(UserError, match="pope has no upload format"):
        bench.submission(rows, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"my.jsonl:1: malformed JSON"),
        ("3", r"my.jsonl:1: is int, expected a JSON object"),
        ("\n", "my.jsonl is empty"),
        (
            '{"question_id": 1, "label": "no"}',
            r"my.jsonl:1: has no 'text' or 'question', it has 'label', 'question_id'",
        ),
        (
            '{"question_id": 1, "text": "?", "image": "b.jpg", "label": "no"}',
            r"my.jsonl:1: image b.jpg of pope is not below",
        ),
    ],
)
def test_broken_lines_are_named(pope, text, message):
    pope.write_text(text)
    with pytest.raises(UserError, match=message):
        benchmarks.get("pope").read(pope)


def test_missing_images_are_named_with_what_is_expected(pope):
    (pope.parent / "val2014" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"my.jsonl:1: image a.jpg of pope is not below .*val2014/ of COCO"):
        benchmarks.get("pope").read(pope)


def test_images_within_tables_are_opened_like_files(tmp_path):
    table(
        tmp_path / "t.tsv",
        [{"index": 1, "image": embedded("blue")}, {"index": 2, "image": 1}, {"index": 3, "image": 2}],
    )
    images = table_images(read_table(tmp_path / "t.tsv", ("index",)))
    assert images[0] is images[1] is images[2]
    for image in (images[0], images[0], pickle.loads(pickle.dumps(images[0]))):
        assert open_image(image, "here").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(BadSample, match=r"in column 'image' of .*x.tsv:7"):
        open_image(EmbeddedImage(b"no image", "x.tsv:7"), "here")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": 1, "image": 2}], r"t.tsv:2: has the image of row '2', which has none"),
        ([{"index": 1, "image": 2}, {"index": 2, "image": 1}], r"t.tsv:2: has the image of row '1', which has none"),
        ([{"index": 1, "image": None}], r"which has none"),
        ([{"index": 1, "image": "?" * 99}], r"t.tsv:2: column 'image' is no base64"),
    ],
)
def test_broken_images_within_tables(tmp_path, rows, message):
    table(tmp_path / "t.tsv", rows)
    with pytest.raises(UserError, match=message):
        table_images(read_table(tmp_path / "t.tsv", ("index",)))


def test_broken_tables(tmp_path):
    path = tmp_path / "t.tsv"
    for text, message in (
        ("a\tb\n1\n", "t.tsv:2: has 1 cells, expected 2"),
        ("a\n", "t.tsv has no row"),
        ("b\n1\n", "t.tsv has no column 'a', it has b"),
        ("", "it has nothing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_table(path, ("a",))


def test_cells_may_be_quoted_and_hold_lines(tmp_path):
    (tmp_path / "t.tsv").write_text('a\tb\n"x\n""y"""\tnan\n2\t"None"\n')
    assert [row for _, row in read_table(tmp_path / "t.tsv", ("a",))] == [
        {"a": 'x\n"y"', "b": None},
        {"a": "2", "b": "None"},
    ]


def test_lines_may_be_a_json_list(pope):
    dump(pope.with_suffix(".json"), [{"question_id": 5, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    assert benchmarks.get("pope").read(pope.with_suffix(".json"))[0]["gold"] == "no"


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("gqa", "testdev_balanced_questions.json", {"1": 5}),
        ("seed", "SEED-Bench.json", {"items": []}),
        ("coco_caption", "coco_karpathy_test.json", [{"image": 5, "caption": "x"}]),
        ("vqav2", "v2_mscoco_val2014_annotations.json", {"annotations": [1]}),
    ],
)
def test_json_of_another_form_is_named(tmp_path, name, file, content):
    dump(tmp_path / file, content)
    dump(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [{"question_id": 1}]})
    with pytest.raises(UserError, match=f"{tmp_path}.*"):
        benchmarks.get(name).read(tmp_path)


def test_options_of_a_scorer_are_handed_on():
    meta = {"box": [0, 0, 50, 50], "width": 100, "height": 100}
    row = {"id": 1, "prediction": "[0, 0, 50, 50]", "gold": meta["box"], "category": "all", "meta": meta}
    bench = benchmarks.get("refcoco")
    assert bench.score([row], box_format="percent")["scores"] == {"accuracy": 100.0}
    assert bench.mark([row], box_format="thousand")[0]["correct"] is False
