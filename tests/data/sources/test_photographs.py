"""Photographs as LLaVA's JSON, InternVL's JSONL and MMBench's TSV."""

import base64
import io
import json

import pandas as pd
import pytest
from PIL import Image

from xtuner_ext.data.annotation import JsonlAnnotations
from xtuner_ext.data.meta import read_meta
from xtuner_ext.data.sources.photographs import CIRCLE, PHOTOGRAPHS, make_photographs
from xtuner_ext.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs") / "data", views=2, choices=1)


def test_every_photograph_is_cut_and_asked_about(folder):
    samples = json.loads((folder / "llava.json").read_text())
    assert {sample["image"] for sample in samples if "image" in sample} == {path.name for path in folder.glob("images/*")}
    assert len(list(folder.glob("images/*.png"))) == 2 * len(PHOTOGRAPHS)
    assert len({sample["id"] for sample in samples}) == len(samples)
    assert any("image" not in sample for sample in samples)


def test_the_same_samples_are_read_as_jsonl(folder):
    (entry,) = read_meta(folder / "train.json")
    annotations = JsonlAnnotations(entry.annotation, entry.root)
    assert len(annotations) == len(json.loads((folder / "llava.json").read_text()))


def test_circular_questions_turn_the_options(folder):
    table = pd.read_csv(folder / "mmbench_dev.tsv", sep="\t")
    assert len(table) == 4 * len(PHOTOGRAPHS)
    for _, forms in table.groupby(table["index"] % CIRCLE):
        things = {row[row["answer"]] for _, row in forms.iterrows()}
        assert len(things) == 1 and things <= {thing for thing, _ in PHOTOGRAPHS.values()}
        assert sorted(forms["answer"]) == list("ABCD")
    first = table[table["index"] == 0].iloc[0]
    assert min(Image.open(io.BytesIO(base64.b64decode(first["image"]))).size) > 16
    # Later forms point at the first one's picture.
    assert table[table["index"] == CIRCLE].iloc[0]["image"] == "0"
    assert "answer" not in pd.read_csv(folder / "mmbench_test.tsv", sep="\t")


def test_made_once_and_never_over_something_else(folder, tmp_path):
    before = (folder / "llava.json").stat().st_mtime_ns
    assert make_photographs(folder, views=2, choices=1) == folder
    assert (folder / "llava.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with"):
        make_photographs(folder, views=3, choices=1)
    with pytest.raises(UserError, match="at least one of each"):
        make_photographs(tmp_path / "new", views=0)
