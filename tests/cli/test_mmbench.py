"""Tables for `mmbench`, before a model is loaded for them."""

import pandas as pd
import pytest

from xtuner_ext.cli import main
from xtuner_ext.cli.main import run
from xtuner_ext.data.sources.photographs import make_photographs


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    data = make_photographs(tmp_path_factory.mktemp("photographs") / "data", views=1, choices=2)
    return pd.read_csv(data / "mmbench_dev.tsv", sep="\t")


def break_it(table, fault):
    table = table.copy()
    table["image"] = table["image"].astype(object)
    if fault == "broken":
        table.loc[0, "image"] = "!!!not base64 at all"
    elif fault == "empty":
        table.loc[0, "image"] = None
    elif fault == "text":
        table.loc[0, "image"] = "aGVsbG8gaGVsbG8gaGVsbG8="
    elif fault == "dangling":
        table.loc[0, "image"] = "4711"
    elif fault == "silent":
        table.loc[1, "question"] = None
    elif fault == "twice":
        table.loc[1, "index"] = table.loc[0, "index"]
    elif fault == "rowless":
        table = table.iloc[:0]
    else:
        table = table.drop(columns=fault)
    return table


@pytest.mark.parametrize(
    "fault, message",
    [
        *((name, f"table.tsv has no column {name}") for name in ("index", "question", "image", "category", "A")),
        ("broken", "table.tsv, row 1 (index 0): the image '!!!not base64 at' can not be read"),
        ("empty", "row 1 (index 0): the image 'nan' can not be read"),
        ("text", "row 1 (index 0): the image 'aGVsbG8gaGVsbG8g' can not be read"),
        ("dangling", "the image is that of index 4711, which holds none"),
        ("silent", "row 2 (index 1000000): the question is nan"),
        ("twice", "a number of its own for each row"),
        ("rowless", "table.tsv has no rows"),
    ],
)
def test_a_table_that_would_end_a_run_is_refused_before(table, tmp_path, capsys, fault, message):
    break_it(table, fault).to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    assert run(["mmbench", "llm", "--data-path", str(tmp_path / "table.tsv"), "--llava", "hf"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, message", [(b"", "is no table"), (b"\xff\xfe\x00", "is no table"), (None, "does not exist")]
)
def test_a_file_that_is_none(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "table.tsv").write_bytes(content)
    assert run(["mmbench", "llm", "--data-path", str(tmp_path / "table.tsv")]) == 2
    assert message in capsys.readouterr().err
    assert run(["mmbench", "llm"]) == 2
    assert "--data-path" in capsys.readouterr().err


@pytest.mark.parametrize("dropped", [[], ["l2-category", "split", "hint"], ["answer"]])
def test_published_kinds_of_tables_go_on_to_xtuner(table, tmp_path, monkeypatch, dropped):
    """MMBench's development split, CCBench, which knows no abilities, and a test split; shared images too."""
    table = table.drop(columns=dropped)
    table.loc[1, "image"] = str(table.loc[0, "index"])
    table.to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    called = []
    monkeypatch.setattr(main, "run_stock", lambda *words: called.append(words) or 0)
    arguments = ["llm", f"--data-path={tmp_path / 'table.tsv'}", "--work-dir", "out"]
    assert run(["mmbench", *arguments]) == 0 and called == [("mmbench", arguments)]
