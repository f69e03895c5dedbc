"""The verb `eval`: files, settings, mistakes."""

import json

import pytest

from xtuner_ext.cli.eval import main
from xtuner_ext.convert.digits_teacher import write_digits_teacher
from xtuner_ext.convert.init import random_digits_teacher
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.scorers import exact_match


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """A random digits teacher in HoVLE's layout."""
    tokenizer = str(digits / "tokenizer")
    sizes = dict(hidden_size=32, intermediate_size=48, heads=4, kv_heads=2, embedding_layers=1, llm_layers=1)
    out = tmp_path_factory.mktemp("models") / "teacher"
    write_digits_teacher(random_digits_teacher(tokenizer, **sizes), tokenizer, out)
    return str(out)


def scores(out):
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return rows, json.loads((out / "metrics.json").read_text())


def test_rows_and_metrics(digits, teacher, tmp_path, capsys):
    data, out = str(digits / "test.json"), tmp_path / "new" / "scores"
    assert (
        main([teacher, "--data", data, "--out", str(out), "--batch-size", "5", "--max-new-tokens", "3"]) == 0
    )
    output = capsys.readouterr()
    assert "all" in output.out and "12/12" in output.err
    rows, metrics = scores(out)
    assert [row["id"] for row in rows] == [f"test-{n:06d}" for n in range(12)]
    assert all((row["parsed"], row["correct"]) == exact_match(row["prediction"], row["gold"]) for row in rows)
    assert metrics["accuracy"] == sum(row["correct"] for row in rows) / 12 and metrics["count"] == 12
    assert {name: score["count"] for name, score in metrics["by_category"].items()} == {
        name: sum(row["category"] == name for row in rows) for name in {row["category"] for row in rows}
    }
    assert metrics["settings"] == {
        "template": "internlm2_chat",
        "decoding": "greedy",
        "max_new_tokens": 3,
        "batch_size": 5,
        "dtype": "torch.float32",
        "scorer": "exact_match",
    }
    assert (metrics["model"], metrics["data"]) == (teacher, data)
    assert metrics["layer_types"] == ["full_attention"] * 2
    # Two layers of keys and values, 2 heads of width 8 each, in 2 bytes.
    assert metrics["cache_bytes"] == {"1024": 2 * 2 * 2 * 8 * 2 * 1024, "65536": 2 * 2 * 2 * 8 * 2 * 65536}
    assert metrics["parameters"] > 0 and metrics["versions"]["torch"]
    assert [path.name for path in out.parent.iterdir()] == ["scores"]


def test_limit_template_and_json(digits, teacher, tmp_path, capsys):
    argv = [teacher, "--data", str(digits / "test.json"), "--out", str(tmp_path / "s"), "--limit", "2"]
    assert main([*argv, "--max-new-tokens", "2", "--prompt-template", "internlm2-chat", "--json"]) == 0
    rows, metrics = scores(tmp_path / "s")
    assert json.loads(capsys.readouterr().out) == metrics and metrics["count"] == len(rows) == 2
    assert metrics["settings"]["template"] == "internlm2-chat"
    assert rows[0]["prompt"].startswith("<|im_start|>system\n你是")


def test_scores_are_replaced_but_no_other_files(digits, teacher, tmp_path):
    argv = [teacher, "--data", str(digits / "test.json"), "--max-new-tokens", "1", "--limit"]
    out = tmp_path / "s"
    main([*argv, "1", "--out", str(out)])
    main([*argv, "2", "--out", str(out)])
    assert scores(out)[1]["count"] == 2
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="s holds thesis.txt, expected a folder of scores or a new one"):
        main([*argv, "1", "--out", str(out)])
    assert (out / "thesis.txt").read_text() == "mine" and scores(out)[1]["count"] == 2
    with pytest.raises(UserError, match="thesis.txt is a file, expected a folder of scores or a new one"):
        main([*argv, "1", "--out", str(out / "thesis.txt")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data", "gone.json"], "meta file gone.json does not exist"),
        (["--limit", "0"], "--limit is 0, expected at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--prompt-template", "vicunia"], "unknown prompt template 'vicunia'"),
    ],
)
def test_mistakes_leave_nothing_behind(digits, teacher, tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        main([teacher, "--data", str(digits / "test.json"), "--out", str(tmp_path / "s"), *changed])
    assert not list(tmp_path.iterdir())


def test_missing_model_folder_is_named(digits, tmp_path):
    with pytest.raises(UserError, match="model folder .*gone does not exist"):
        main([str(tmp_path / "gone"), "--data", str(digits / "test.json"), "--out", str(tmp_path / "s")])


def test_text_model_on_questions_with_images_is_an_error(digits, tiny_model, digits_processor, tmp_path):
    model = tiny_model()
    config = type(model.config).from_dict({**model.config.to_dict(), "vision": None, "image_token_id": None})
    type(model)(config).save_pretrained(tmp_path / "text")
    digits_processor.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="text has no image front end, but .*test.jsonl:1 asks about"):
        main([str(tmp_path / "text"), "--data", str(digits / "test.json"), "--out", str(tmp_path / "s")])
