"""`xtuner-ext estimate`."""

import json

import pytest

from xtuner_ext.cli import main


def test_a_project_has_a_table_a_stage(capsys):
    assert main.run(["estimate", "projects/mmmamba/digits", "--gpus", "2", "--length", "64"]) == 0
    printed = capsys.readouterr().out
    for name in ("stage1", "stage2", "stage3_linear", "stage3_hybrid"):
        assert printed.count(f"{name}: memory of each of 2 GPUs") == 1
    assert "not before stage 3" in printed
    assert "4,096 tokens a step (32 rows of up to 64 x 1 iterations x 2 GPUs)" in printed


def test_one_config_as_json_with_changes(capsys):
    argv = ["estimate", "mmmamba/digits/stage1", "--json", "--length", "64", "--no-kernels"]
    assert main.run([*argv, "--cfg-options", "train_dataloader.batch_size=4"]) == 0
    report = json.loads(capsys.readouterr().out)["stage1"]
    assert (report["batch_size"], report["trainable"], report["parameters"]) == (4, 82_432, 1_033_120)
    assert set(report["zero"]) == {"0", "1", "2", "3"}
    assert main.run([*argv[:5], "--cfg-options", "train_dataloader.batch_size=4"]) == 0
    fused = json.loads(capsys.readouterr().out)["stage1"]
    assert fused["activation_bytes"]["total"] < report["activation_bytes"]["total"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.py"], "config nothing.py is neither a file"),
        (["mmmamba/hovle/stage1"], "model folder pretrained/HoVLE does not exist"),
        (["mmmamba/digits/stage1", "--gpus", "0"], "--gpus is 0, expected more than 0"),
        (["mmmamba/digits/teacher"], "model.type is no DistillModel"),
        (["mmmamba/digits/stage1", "--cfg-options", "model.stage=4"], "model.stage is 4"),
    ],
)
def test_mistakes_are_named(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(["estimate", *argv]) == 2
    assert message in capsys.readouterr().err
