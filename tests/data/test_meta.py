"""Meta JSON: what is read, and how each mistake is named."""

import json

import pytest

from xtuner_ext.data.meta import read_meta
from xtuner_ext.errors import UserError


def write_meta(folder, **fields):
    path = folder / "meta.json"
    path.write_text(json.dumps({"d": fields}))
    return path


def test_meta_paths_count_from_the_meta_file(tmp_path):
    fields = dict(
        root="images", annotation="lines/a.jsonl", data_augment=False, length=3, max_dynamic_patch=4
    )
    (entry,) = read_meta(write_meta(tmp_path, **fields, repeat_time=0.5))
    assert (entry.root, entry.annotation) == (tmp_path / "images", tmp_path / "lines" / "a.jsonl")
    assert (entry.name, entry.repeat_time, entry.max_dynamic_patch) == ("d", 0.5, 4)


def test_meta_defaults_and_absolute_paths(tmp_path):
    (entry,) = read_meta(write_meta(tmp_path, annotation="/elsewhere/a.jsonl"))
    assert str(entry.annotation) == "/elsewhere/a.jsonl"
    assert (entry.root, entry.repeat_time, entry.max_dynamic_patch) == (tmp_path, 1.0, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(annotation="a.jsonl", rot="."), "dataset 'd' has unknown key 'rot', expected"),
        (dict(root="."), "dataset 'd' has no key 'annotation'"),
        (dict(annotation="a.jsonl", repeat_time=0), "has repeat_time 0, expected a number above 0"),
        (dict(annotation="a.jsonl", repeat_time=-0.5), "has repeat_time -0.5, expected a number above 0"),
        (dict(annotation="a.jsonl", repeat_time="2"), "has repeat_time '2', expected a number above 0"),
        (dict(annotation="a.jsonl", max_dynamic_patch=0), "has max_dynamic_patch 0, expected 1 tile or more"),
        (dict(annotation="a.jsonl", max_dynamic_patch="6"), "max_dynamic_patch '6', expected 1 tile"),
        (dict(annotation=["a.jsonl"]), r"has annotation \['a.jsonl'\], expected a path"),
        (dict(annotation="a.jsonl", root=None), "has root None, expected a path"),
    ],
)
def test_meta_mistakes_name_file_dataset_and_key(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read_meta(write_meta(tmp_path, **fields))
    assert str(tmp_path / "meta.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"d": ', "is not valid JSON: Expecting value"),
        ('{"d": {}}'.encode("utf-16"), "is not valid JSON: 'utf-8' codec"),
        (b"[]", "must hold at least one dataset"),
        (b"{}", "must hold at least one dataset"),
        (b'{"d": 3}', "dataset 'd' is int, expected an object"),
    ],
)
def test_broken_meta_files_are_named(tmp_path, content, message):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_meta(path)
    assert str(path) in str(caught.value)


def test_a_missing_meta_file_is_named(tmp_path):
    with pytest.raises(UserError, match="meta file .*meta.json does not exist"):
        read_meta(tmp_path / "meta.json")


@pytest.mark.parametrize("path, found", [("", "Is a directory"), ("d.jsonl/m.json", "Not a directory")])
def test_a_meta_file_that_cannot_be_read_is_named(tmp_path, path, found):
    (tmp_path / "d.jsonl").write_text("{}")
    with pytest.raises(UserError, match=f"^meta file {tmp_path / path} cannot be read: {found}$"):
        read_meta(tmp_path / path)
