"""The verb `pipeline` on a project that has its layers chosen by measurement."""

import json

import pytest

from xtuner_ext.cli import main, pipeline

HYBRID = """
from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = base + "/stage3_hybrid"
attention_layers = {layers!r}
layer_selection = dict(keep=1, limit=4, batch_size=4)
model.update(attention_layers=attention_layers)
"""


@pytest.fixture
def project(small_project, monkeypatch):
    """Stages 1 and 2 and a hybrid; training runs in this process, which saves its start."""
    (small_project / "stage3_linear.py").rename(small_project / "_linear.py")
    monkeypatch.setattr(pipeline.subprocess, "call", lambda command, env: main.run(command[3:]))
    return small_project


def write_hybrid(project, layers):
    text = HYBRID.format(layers=layers).replace("stage3_linear", "_linear")
    (project / "stage3_hybrid.py").write_text(text)


def run(project, work_dir):
    argv = ["pipeline", str(project), "--work-dir", str(work_dir), "--cfg-options", "train_cfg.max_iters=1"]
    return main.run(argv)


def kept(config):
    words = json.loads(config.read_text())["layer_types"]
    return [index for index, word in enumerate(words) if word == "full_attention"]


def test_layers_are_chosen_once_and_exported(project, tmp_path, capsys):
    write_hybrid(project, "elsewhere/layers.json")
    base = tmp_path / "all"
    assert run(project, base) == 0
    first = capsys.readouterr()
    assert first.err.count("choosing layers") == 1 and f"choosing layers -> {base / 'layers.json'}" in first.err
    selection = json.loads((base / "layers.json").read_text())
    assert selection["checkpoint"] == str(base / "stage2" / "iter_1.pth") and (base / "layers.png").is_file()
    assert kept(base / "export_hybrid" / "config.json") == selection["attention_layers"]
    assert set(json.loads((base / "metrics.json").read_text())) == {"teacher", "hybrid"}
    assert not (tmp_path / "elsewhere").exists()
    times = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.suffix in (".pth", ".safetensors")}
    times[base / "layers.json"] = (base / "layers.json").stat().st_mtime_ns
    assert run(project, base) == 0
    second = capsys.readouterr().err
    assert "choosing layers" not in second and second.count("done before") == 6
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_layers_that_the_config_lists_are_not_chosen(project, tmp_path, capsys):
    write_hybrid(project, [2])
    assert run(project, tmp_path / "all") == 0
    assert "choosing layers" not in capsys.readouterr().err
    assert kept(tmp_path / "all" / "export_hybrid" / "config.json") == [2]


@pytest.mark.parametrize("variable", ["NODE_RANK", "PORT"])
def test_variables_that_are_no_numbers_are_named(project, tmp_path, monkeypatch, capsys, variable):
    write_hybrid(project, "elsewhere/layers.json")
    monkeypatch.setenv(variable, "first")
    assert run(project, tmp_path / "all") == 2
    assert f"{variable} is first, a number is expected" in capsys.readouterr().err


def test_of_several_machines_the_first_does_all_but_the_training(project, tmp_path, monkeypatch, capsys):
    write_hybrid(project, "elsewhere/layers.json")
    base, environments = tmp_path / "all", []
    monkeypatch.setenv("PORT", "29500")
    monkeypatch.setattr(pipeline.subprocess, "call", lambda command, env: environments.append(env) or 7)
    monkeypatch.setattr(pipeline, "SHARED_TIMEOUT", 0.1)
    monkeypatch.setenv("NODE_RANK", "1")
    assert run(project, base) == 2
    assert "pipeline.json of the first machine did not appear within 0.1 s" in capsys.readouterr().err
    monkeypatch.setenv("NODE_RANK", "0")
    assert run(project, base) == 7
    # Each process of a real run has a machine of its own; this one trains alone.
    train = lambda command, env: environments.append(env) or main.run(command[3:])  # noqa: E731
    monkeypatch.setattr(pipeline.subprocess, "call", train)
    assert run(project, base) == 0
    assert [env["PORT"] for env in environments] == ["29500", "29500", "29501", "29502"]
    (base / "metrics.json").unlink()
    monkeypatch.setenv("NODE_RANK", "1")
    capsys.readouterr()
    assert run(project, base) == 0
    assert capsys.readouterr().err.count("done before") == 3 and not (base / "metrics.json").exists()
