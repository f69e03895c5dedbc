"""The verb `select-layers`: the files it leaves, who reads them, and what it refuses."""

import contextlib
import json

import pytest
import torch
from PIL import Image
from xtuner.registry import BUILDER

from xtuner_ext.cli.config_options import load_config
from xtuner_ext.cli.main import run


def write_checkpoint(config, path):
    """The checkpoint of a stage whose weights have moved a little."""
    model = BUILDER.build(load_config(str(config)).model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "meta": {"distill": model.describe()}}, path)
    return path


@pytest.fixture
def checkpoint(small_project, tmp_path):
    """A checkpoint of stage 2."""
    return write_checkpoint(small_project / "stage2.py", tmp_path / "work" / "stage2" / "iter_5.pth")


def select(project, checkpoint, *argv):
    return run(["select-layers", str(project / "stage2.py"), str(checkpoint), *argv])


def test_files_and_the_stage_that_reads_them(small_project, checkpoint, tmp_path, capsys):
    assert select(small_project, checkpoint, "--keep", "1", "--limit", "6", "--batch-size", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    out = tmp_path / "work" / "attention_layers.json"
    assert json.loads(out.read_text()) == found
    names = ["attention_layers.json", "attention_layers.png", "stage2"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    assert Image.open(out.with_suffix(".png")).size[0] > 100
    (kept,) = found["attention_layers"]
    assert found["ranking"][str(kept)] == min(found["ranking"].values()) == found["greedy"][0]
    data = load_config(str(small_project / "stage2.py")).eval_data
    assert (found["checkpoint"], found["data"]) == (str(checkpoint), data)
    options = [f"model.attention_layers={out}", f"model.pretrained_pth={checkpoint}", "train_cfg.max_iters=1"]
    assert run(["train", str(small_project / "stage3_linear.py"), "--cfg-options", *options]) == 0
    meta = torch.load(tmp_path / "work" / "stage3_linear" / "iter_1.pth", weights_only=True)["meta"]
    words = meta["distill"]["layer_types"]
    assert [index for index, word in enumerate(words) if word == "full_attention"] == [kept]
    # The start of stage 3 is the student that was measured.
    line = json.loads((tmp_path / "work" / "stage3_linear" / "held_out.jsonl").read_text().splitlines()[0])
    capsys.readouterr()
    assert select(small_project, checkpoint, "--keep", "1", "--limit", "5", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert line["kl"] == pytest.approx(again["ranking"][str(kept)], rel=1e-4)


def test_table_other_data_and_another_place(small_project, checkpoint, tmp_path, digits, capsys):
    out, data = tmp_path / "new" / "layers.json", str(digits / "train.json")
    argv = ["--keep", "2", "--limit", "3", "--data", data, "--out", str(out)]
    assert select(small_project, checkpoint, *argv) == 0
    output = capsys.readouterr()
    assert "evenly spaced" in output.out and f"written to {out} and {out.with_suffix('.png')}" in output.out
    assert "select-layers: 5/5" in output.err
    found = json.loads(out.read_text())
    assert found["data"] == data and len(found["attention_layers"]) == 2


def test_stage_one_will_do_and_a_bf16_teacher_too(small_project, tmp_path):
    config = small_project / "stage1.py"
    text = config.read_text().replace('dtype="float32"', 'dtype="bfloat16"')
    config.write_text(text + 'model.update(trainable_dtype="float32")\n')
    checkpoint = write_checkpoint(config, tmp_path / "work" / "stage1" / "iter_5.pth")
    assert select(small_project, checkpoint, "--keep", "1", "--limit", "3") == 0
    assert (tmp_path / "work" / "attention_layers.json").is_file()


MISTAKES = {
    "none": (["--keep", "0"], "--keep is 0, expected 1 to 2: the model has 3 layers"),
    "all": (["--keep", "3"], "--keep is 3, expected 1 to 2"),
    "limit": (["--keep", "1", "--limit", "0"], "--limit is 0"),
    "data": (["--keep", "1", "--data", "gone.json"], "meta file gone.json does not exist"),
}


@pytest.mark.parametrize("argv, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_nothing_behind(small_project, checkpoint, tmp_path, argv, message, capsys):
    assert select(small_project, checkpoint, *argv) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["stage2"]


def test_other_checkpoints_are_refused(small_project, checkpoint, tmp_path, capsys):
    late = write_checkpoint(small_project / "stage3_linear.py", tmp_path / "late" / "iter_5.pth")
    for path, message in (
        (late, f"checkpoint {late} comes from stage 3, expected stage 1 or 2"),
        (tmp_path / "gone.pth", "gone.pth does not exist"),
    ):
        assert select(small_project, path, "--keep", "1") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "work" / "attention_layers.json").exists() and not list(tmp_path.glob("*.json"))


def test_a_config_that_names_no_held_out_data_is_told_so(small_project, checkpoint, capsys):
    path = small_project / "stage2.py"
    path.write_text(path.read_text() + "eval_data = None\n")
    assert select(small_project, checkpoint, "--keep", "1") == 2
    assert "names no eval_data, give the held-out samples with --data" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_leaves_no_half_of_it(small_project, checkpoint, tmp_path, monkeypatch):
    """The disk fills up while the picture is drawn."""
    import matplotlib.figure

    def full(figure, file, **options):
        with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        select(small_project, checkpoint, "--keep", "1", "--limit", "2")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["stage2"]
