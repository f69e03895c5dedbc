"""The verbs `data check` and `data show`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.malformed import LINE_CASES, META_CASES, write
from xtuner_ext.cli.main import run
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.dataset import ConversationDataset

MODEL = ["--model", "digits-teacher"]


def turns(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def meta(tmp_path, monkeypatch):
    """Meta file over a text, a wide and a small picture; its folder is the current one."""
    wide = np.zeros((128, 192, 3), dtype=np.uint8)
    wide[:, :64], wide[:, 128:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.new("RGB", (40, 40), (0, 120, 0)).save(tmp_path / "small.png")
    lines = [
        {"conversations": [*turns("What [bold]now[/bold]?", "Nothing."), *turns("And then?", "More.")]},
        {"image": ["wide.png", "small.png"], "conversations": turns("<image> beside <image>?")},
    ]
    (tmp_path / "d.jsonl").write_text("\n \n".join(map(json.dumps, lines)))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", "max_dynamic_patch": 12}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "meta.json"


def test_good_data(digits, tmp_path, capsys):
    report = tmp_path / "new" / "report.json"
    assert run(["data", "check", str(digits / "train.json"), *MODEL, "--json", str(report)]) == 0
    output = capsys.readouterr().out
    assert "digits_train" in output and "nothing would be lost in training" in output and "internlm2_chat" in output
    found = json.loads(report.read_text())
    dataset = ConversationDataset(digits / "train.json", load_processor("digits-teacher"), "internlm2_chat")
    tokens = [dataset.count_tokens(0, line) for line in range(len(dataset))]
    assert (found["template"], found["model"], found["lost"]) == ("internlm2_chat", "digits-teacher", [])
    assert found["total"]["tokens_per_epoch"] == sum(tokens) and found["datasets"][0]["tokens"]["max"] == max(tokens)


@pytest.mark.parametrize("case", LINE_CASES, ids=lambda case: case.name)
def test_bad_lines_are_named(case, tmp_path, capsys):
    meta, fragments, reason = write(tmp_path, case)
    out = tmp_path / "report.json"
    argv = ["data", "check", str(meta), *MODEL, "--prompt-template", "internlm2_chat", "--max-length", "4096"]
    assert run([*argv, "--json", str(out)]) == 1
    (bad,) = json.loads(out.read_text())["datasets"][0]["bad_lines"]
    # How a decoder names what is wrong depends on how far it went.
    spoken = [fragment for fragment in fragments if fragment not in ("truncated",)]
    assert bad["line"] == 3 and bad["reason"] == reason and all(fragment in bad["message"] for fragment in spoken)
    output = capsys.readouterr().out
    assert f"{bad['message']} ({reason})\n" in output and "lost in training: 1 of 5 lines are bad (20.00%)\n" in output


@pytest.mark.parametrize("case", META_CASES, ids=lambda case: case.name)
def test_broken_meta_files_are_named(case, tmp_path, capsys):
    meta, fragments, _ = write(tmp_path, case)
    status = run(["data", "check", str(meta)])
    output = capsys.readouterr()
    # An annotation file that is not there is one dataset's loss; the others are still checked.
    assert status == (1 if case.name.startswith("annotation-") else 2)
    said = output.out + output.err
    assert all(fragment in said for fragment in fragments), said


def test_every_bad_line_is_reported_and_a_limit_allows_some(tmp_path, capsys):
    lines = [json.dumps({"conversations": turns("q")})] * 90 + ["{"] * 10
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
    argv = ["data", "check", str(tmp_path / "meta.json"), "--json", str(tmp_path / "r.json")]
    assert run([*argv, "--max-bad-fraction", "0.09"]) == 1
    (found,) = json.loads((tmp_path / "r.json").read_text())["datasets"]
    assert [line["line"] for line in found["bad_lines"]] == [*range(91, 101)]
    assert "all bad lines are named in" in capsys.readouterr().out
    assert run([*argv, "--max-bad-fraction", "0.1"]) == 0


def test_template(meta, tmp_path, capsys):
    argv = ["data", "check", str(meta), *MODEL, "--prompt-template"]
    assert run([*argv, "phi3-chat"]) == 2
    error = capsys.readouterr().err
    assert "prompt template 'phi3-chat' does not fit the tokenizer" in error
    assert run([*argv, "qwen2"]) == 0
    assert "warning: template qwen2, the model's own is internlm2_chat" in capsys.readouterr().out
    assert run(["data", "check", str(meta), "--prompt-template", "qwen2"]) == 2
    assert "--prompt-template was given without --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--frames", "max_frames"], "--frames max_frames has no value, expected KEY=VALUE"),
        (["--frames", "most=3"], "frames has unknown key 'most'"),
        (["--json", "meta.json/r.json"], "--json meta.json/r.json cannot be written"),
    ],
)
def test_mistakes_in_the_command(meta, capsys, argv, message):
    assert run(["data", "check", str(meta), *argv]) == 2
    assert message in capsys.readouterr().err


def test_frames_decide_how_long_videos_are(tmp_path):
    meta, *_ = write(tmp_path, LINE_CASES[0])
    lengths = []
    for most in (3, 6):
        out = tmp_path / "r.json"
        argv = ["--frames", f"min_frames={most}", f"max_frames={most}", "sampling=middle", "--json", str(out)]
        run(["data", "check", str(meta), *MODEL, *argv])
        lengths.append(json.loads(out.read_text())["datasets"][0]["tiles"])
    assert lengths == [1 + 3, 1 + 6]


def test_show_marks_what_is_trained(meta, capsys):
    assert run(["data", "show", str(meta), "--index", "0", *MODEL]) == 0
    output = capsys.readouterr().out
    assert f"{meta.parent / 'd.jsonl'}:1  (text)" in output
    first = "What [bold]now[/bold]?<|im_end|>\n<|im_start|>assistant\n{+Nothing.<|im_end|>+}\n"
    assert f"{first}<|im_start|>user\nAnd then?<|im_end|>\n" in output
    sample = ConversationDataset(meta, load_processor("digits-teacher"), "internlm2_chat")[0]
    trained = int((sample["labels"] != -100).sum())
    assert f"{{+trained+}} {trained}  visual 0  other {len(sample['labels']) - trained}" in output
    assert not list(meta.parent.glob("*-0.png"))


def test_show_draws_the_tiles_that_the_model_gets(meta, capsys):
    assert run(["data", "show", str(meta), "--index", "1", "--out", "t.png"]) == 0
    output = capsys.readouterr().out
    # 12 tiles for two pictures: 3 x 2 and a thumbnail of the one, one of the other, 256 tokens each.
    assert "<img><IMG_CONTEXT> x 1792</img> beside <img><IMG_CONTEXT> x 256</img>?" in output
    assert f"{meta.parent / 'd.jsonl'}:3  (images)" in output and "tiles 7 + 1, drawn in t.png" in output
    with Image.open("t.png") as image:
        pixels = np.asarray(image).astype(int)
    side, gap = 448 + 6, 12
    assert pixels.shape == (2 * gap + 2 * side + gap + side, 3 * gap + 4 * side, 3)
    middle = side // 2

    def colour(column, row, top=gap, left=gap):
        return pixels[top + row * side + middle, left + column * side + middle]

    assert [colour(column, 1).tolist() for column in range(3)] == [[255, 0, 0], [0, 0, 0], [0, 0, 255]]
    # The thumbnail is the whole picture, in a frame of its own colour.
    thumbnail = pixels[gap : gap + side, 2 * gap + 3 * side :]
    assert thumbnail[middle, 30].tolist() == [255, 0, 0] and thumbnail[middle, side - 30].tolist() == [0, 0, 255]
    assert thumbnail[middle, 0].tolist() != pixels[gap + middle, gap].tolist()
    assert colour(0, 0, top=2 * gap + 2 * side).tolist() == [0, 120, 0]


def test_show_names_its_picture_after_the_line_and_replaces_only_its_own(meta, capsys):
    argv = ["data", "show", str(meta), "--index", "1", *MODEL]
    assert run(argv) == 0 and run(argv) == 0
    assert "<IMG_CONTEXT> x 4" in capsys.readouterr().out
    shutil.copy("small.png", "meta-1.png")
    before = (meta.parent / "meta-1.png").read_bytes()
    assert run(argv) == 2
    assert "meta-1.png exists and was not written by `xtuner-ext data show`" in capsys.readouterr().err
    assert (meta.parent / "meta-1.png").read_bytes() == before
    assert run([*argv, "--out", "picture.jpg"]) == 2
    assert "--out is picture.jpg, expected a name that ends with .png" in capsys.readouterr().err


def test_show_video(tmp_path, monkeypatch, capsys):
    meta, *_ = write(tmp_path, LINE_CASES[0])
    monkeypatch.chdir(tmp_path)
    argv = ["--frames", "sampling=middle", "min_frames=10", "max_frames=10"]
    assert run(["data", "show", str(meta), "--index", "4", *MODEL, *argv]) == 0
    output = capsys.readouterr().out
    assert "Frame-1: <img><IMG_CONTEXT> x 4</img>\n" in output and "tiles 10, drawn in meta-4.png" in output
    with Image.open("meta-4.png") as image:
        # Two rows of frames of 32 pixels, enlarged four times.
        assert image.size == (8 * (128 + 6) + 24, 2 * (128 + 6) + 24)


def test_show_what_cannot_be_shown(tmp_path, capsys):
    meta, *_ = write(tmp_path, LINE_CASES[0])
    assert run(["data", "show", str(meta), "--index", "1", *MODEL]) == 2
    assert "d.jsonl:3: malformed JSON" in capsys.readouterr().err
    for index in ("5", "-1"):
        assert run(["data", "show", str(meta), "--index", index, *MODEL]) == 2
        assert f"--index is {index}, but {meta} has 5 lines, expected 0 to 4" in capsys.readouterr().err
