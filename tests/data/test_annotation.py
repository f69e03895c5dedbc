"""JSONL: what is read, and how each mistake is named."""

import json
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from xtuner_ext.data.annotation import JsonlAnnotations
from xtuner_ext.errors import UserError


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = {"conversations": turns("q", "a")}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def annotations(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return JsonlAnnotations(path, folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="annotation file .*a.jsonl does not exist"):
        JsonlAnnotations(tmp_path / "a.jsonl", tmp_path)


def test_text_line(folder):
    (record,) = annotations(folder, {"conversations": turns(" hi ", "yo", "more", "no")})
    assert record.turns == [("hi", "yo"), ("more", "no")]
    assert (record.id, record.images, record.system, record.category) == (1, [], None, "all")
    assert record.where == f"{folder / 'data.jsonl'}:1"


@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_single_image_gets_a_placeholder_in_front(folder, image):
    item = {"id": "x", "category": "c", "image": image, "conversations": turns("what?", "a", "and?", "b")}
    (record,) = annotations(folder, item)
    assert record.turns == [("<image>\nwhat?", "a"), ("and?", "b")]
    assert (record.id, record.category, record.images) == ("x", "c", [folder / "a.png"])


def test_placeholder_stays_where_it_is(folder):
    (record,) = annotations(folder, {"image": "a.png", "conversations": turns("hi", "a", "see <image>", "b")})
    assert record.turns == [("hi", "a"), ("see <image>", "b")]


def test_several_images_over_turns_and_system(folder):
    conversation = turns("<image> one", "a", "two <image>", "b")
    item = {
        "image": ["b.png", "a.png"],
        "conversations": [{"from": "system", "value": "Be brief."}, *conversation],
    }
    (record,) = annotations(folder, item)
    assert record.images == [folder / "b.png", folder / "a.png"]
    assert record.system == "Be brief."
    assert record.turns == [("<image> one", "a"), ("two <image>", "b")]


def test_plain_text_line(folder):
    item = {"id": "x", "category": "c", "text": " Once\n<image>, twice. ", "end": True}
    whole, part = annotations(folder, item, {"text": "No more", "image": ""})
    assert (whole.text, whole.ended, whole.id, whole.category) == (" Once\n<image>, twice. ", True, "x", "c")
    assert (part.text, part.ended, part.id, part.category) == ("No more", False, 2, "all")
    assert whole.turns == whole.images == [] and whole.system is None


def test_answer_that_was_cut_off(folder):
    cut, whole = annotations(folder, {"end": False, **GOOD}, GOOD)
    assert (cut.ended, whole.ended) == (False, True)
    assert cut.text is whole.text is None


@pytest.mark.parametrize("image", ["", [], None])
def test_empty_image_means_text(folder, image):
    (record,) = annotations(folder, {"image": image, "conversations": turns("q", "a")})
    assert record.images == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversations": [', "malformed JSON"),
        ("[1]", "expected an object with a list 'conversations' or a 'text'"),
        ({"txt": "q"}, "expected an object with a list 'conversations' or a 'text'"),
        ({"conversations": "q"}, "'conversations' is str, expected a list"),
        ({"text": "q", **GOOD}, "has both 'text' and 'conversations', expected one of them"),
        ({"text": ["q"]}, "'text' is list, expected a string"),
        ({"text": None}, "'text' is NoneType, expected a string"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "q", "image": "a.png"}, "has images beside 'text', expected them with 'conversations' only"),
        ({"text": "q", "end": 1}, "'end' is 1, expected true or false"),
        ({"end": "no", **GOOD}, "'end' is 'no', expected true or false"),
        ({"image": "gone.png", "conversations": turns("q", "a")}, "image .*gone.png does not exist"),
        ({"image": 3, "conversations": turns("q", "a")}, "'image' is 3, expected a path or a list of paths"),
        ({"image": ["a.png", None], "conversations": turns("q", "a")}, "'image' is .*, expected a path"),
        (
            {"image": ["a.png", "b.png"], "conversations": turns("q", "a")},
            "2 images but 0 <image> placeholders",
        ),
        (
            {"image": "a.png", "conversations": turns("<image><image>", "a")},
            "1 images but 2 <image> placeholders",
        ),
        ({"conversations": turns("<image>", "a")}, "0 images but 1 <image> placeholders"),
        ({"image": "a.png", "conversations": turns("q", "<image>")}, r"\[1\] has <image> outside a question"),
        ({"conversations": turns("q")}, "must alternate human and gpt and end with gpt"),
        ({"conversations": []}, "must alternate human and gpt and end with gpt"),
        ({"conversations": turns("q", "a")[::-1]}, "must alternate human and gpt"),
        ({"conversations": [*turns("q", "a"), {"from": "system", "value": "s"}]}, r"\[2\] is from 'system'"),
        ({"conversations": [{"from": "bot", "value": "s"}]}, r"\[0\] is from 'bot', expected human or gpt"),
        ({"conversations": [{"from": "human", "text": "s"}]}, r"conversations\[0\] has no text 'value'"),
        ({"conversations": [{"from": "human", "value": 7}]}, r"conversations\[0\] has no text 'value'"),
    ],
)
def test_line_mistakes_name_file_and_line(folder, line, message):
    with pytest.raises(UserError, match=message) as caught:
        annotations(folder, GOOD, "", line)
    assert str(caught.value).startswith(f"{folder / 'data.jsonl'}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_file_without_lines_is_an_error(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="data.jsonl is empty"):
        JsonlAnnotations(tmp_path / "data.jsonl", tmp_path)


@pytest.mark.parametrize(
    "content", [f"{json.dumps(GOOD)}\n".encode("utf-16"), b'{"conversations": "\xff"}\n']
)
def test_bytes_that_are_not_utf8_name_the_line(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="data.jsonl:1: malformed JSON"):
        JsonlAnnotations(tmp_path / "data.jsonl", tmp_path)


def test_utf8_with_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    line = json.dumps({"conversations": turns("é", "a")}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode("utf-8-sig"))
    found = JsonlAnnotations(tmp_path / "data.jsonl", tmp_path)
    assert [record.turns for record in found] == [[("é", "a")]] * 2


def test_blank_lines_are_skipped_and_counted(folder):
    found = annotations(folder, "", GOOD, "   ", "", {"id": "x", **GOOD})
    assert len(found) == 2
    assert [found[i].where.rsplit(":", 1)[1] for i in (0, 1)] == ["2", "5"]
    assert [found[i].id for i in (0, 1)] == [2, "x"]


class Questions(JsonlAnnotations):
    def __getitem__(self, index):
        return super().__getitem__(index).turns[0][0]


def test_workers_and_pickled_copies_read_the_same(folder):
    annotations(folder, *({"conversations": turns(f"q{n}", "a")} for n in range(5)))
    found = Questions(folder / "data.jsonl", folder)
    expected = [found[index] for index in range(5)]
    copy = pickle.loads(pickle.dumps(found))
    assert expected == [f"q{n}" for n in range(5)] == [copy[index] for index in range(5)]
    assert [text for batch in DataLoader(found, batch_size=2, num_workers=2) for text in batch] == expected


@pytest.mark.parametrize(
    "question, expected",
    [
        ("what?", "<video>\nwhat?"),
        ("<video>\nwhat?", "<video>\nwhat?"),
        # InternVL replaces a placeholder only where a new line follows.
        ("<video> what?", "<video> what?"),
        ("what is <video>", "what is <video>"),
    ],
)
def test_a_video_gets_one_placeholder(folder, question, expected):
    item = {"video": "a.png", "clip": [1, 2.5], "conversations": turns(question, "a", "and?", "b")}
    (record,) = annotations(folder, item)
    assert record.turns == [(expected, "a"), ("and?", "b")]
    assert (record.video, record.clip, record.images, record.kind) == (folder / "a.png", (1.0, 2.5), [], "video")


def test_a_video_may_come_in_a_later_turn_and_be_a_folder(folder):
    item = {"video": ".", "clip": None, "image": None, "conversations": turns("hi", "a", "see <video>", "b")}
    (record,) = annotations(folder, item)
    assert record.turns == [("hi", "a"), ("see <video>", "b")] and record.clip is None


def test_kinds(folder):
    lines = [GOOD, {"text": "t"}, {"image": "a.png", **GOOD}, {"image": ["a.png"], **GOOD}, {"video": "a.png", **GOOD}]
    several = {"image": ["a.png", "b.png"], "conversations": turns("<image><image>", "a")}
    found = annotations(folder, *lines, several)
    assert [found[index].kind for index in range(6)] == ["text", "text", "image", "image", "video", "images"]
    assert found.has_video and not annotations(folder, GOOD).has_video


def test_a_file_is_looked_for_once(folder, monkeypatch):
    import os

    looked, stat = [], os.stat
    monkeypatch.setattr(
        "xtuner_ext.data.annotation.os.stat", lambda path, **kwargs: looked.append(str(path)) or stat(path, **kwargs)
    )
    annotations(folder, *[{"image": "a.png", **GOOD}] * 5, {"image": "b.png", **GOOD}, {"image": "a.png", **GOOD})
    assert [path for path in looked if path.endswith("png")] == [str(folder / "a.png"), str(folder / "b.png")]


def test_indices_do_not_depend_on_which_lines_are_bad(folder):
    path, found = folder / "data.jsonl", []
    path.write_text("\n".join([json.dumps({"image": "gone.png", **GOOD}), "", "{", json.dumps(GOOD)]))
    read = JsonlAnnotations(path, folder, lambda *where: found.append(where))
    assert (len(read), read.good.tolist(), read.number(2), read[2].where) == (3, [2], 4, f"{path}:4")
    assert [(index, number, error.reason) for index, number, error in found] == [(0, 1, "missing_file"), (1, 3, "json")]


def test_text_outside_the_basic_plane_is_read_however_it_is_written(folder):
    (record,) = annotations(folder, {"text": "\U0001f600"})
    assert record.text == "\U0001f600" and "\\ud83d" in (folder / "data.jsonl").read_text()
