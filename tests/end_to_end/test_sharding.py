"""Weights and optimizer states spread over two processes end where whole ones do."""

import importlib.util
import shutil

import pytest
import torch

from xtuner_ext.distill.stages import read_checkpoint

from .conftest import DIST, ROOT, SMALL, run

FSDP = """
from mmengine.config import read_base

from xtuner_ext.distill.sharding import FullyShardStrategy

with read_base():
    from .{} import *

runner_type = "FlexibleRunner"
strategy = dict(type=FullyShardStrategy)
"""


@pytest.fixture(scope="module")
def train(pipeline, tmp_path_factory):
    """Function that trains a stage on two processes and returns its last checkpoint; ``fsdp_STAGE`` is sharded."""
    folder, _ = pipeline
    projects = tmp_path_factory.mktemp("projects")
    for name in ("_base_", "digits"):
        shutil.copytree(ROOT / "projects" / "mmmamba" / name, projects / name)
    for name in ("stage1", "stage3_hybrid"):
        (projects / "digits" / f"fsdp_{name}.py").write_text(FSDP.format(name))

    def train(stage, work_dir, *arguments, iterations=4):
        options = [f"train_cfg.max_iters={iterations}", *SMALL]
        if "stage3" in stage:
            previous = folder / "work_dirs" / "digits" / "stage2" / "iter_4.pth"
            options += [f"model.pretrained_pth={previous}", "model.attention_layers=1,5"]
        command = ["bash", DIST, "train", projects / "digits" / f"{stage}.py", 2, "--work-dir", work_dir, *arguments]
        result = run([*command, "--cfg-options", *options], folder)
        assert result.returncode == 0, result.stderr[-3000:]
        return work_dir / f"iter_{iterations}.pth"

    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Checkpoint of stage 3 without sharding, after two and after four iterations."""
    folder = tmp_path_factory.mktemp("whole")
    half = train("stage3_hybrid", folder / "half", iterations=2)
    return half, train("stage3_hybrid", folder / "all")


def largest_difference(one, two):
    one, two = read_checkpoint(str(one))[0], read_checkpoint(str(two))[0]
    assert set(one) == set(two)
    return max((one[key] - two[key]).abs().max().item() for key in one)


def test_fsdp_goes_on_from_a_whole_checkpoint_and_writes_one(train, whole, tmp_path):
    half, end = whole
    shutil.copytree(half.parent, tmp_path / "run")
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / half.name))
    found = train("fsdp_stage3_hybrid", tmp_path / "run")
    assert largest_difference(end, found) < 1e-6
    one, two = (torch.load(path, weights_only=False)["optimizer"]["state"] for path in (end, found))
    for index, states in one.items():
        assert all(torch.allclose(value, two[index][key], atol=1e-6) for key, value in states.items())


def test_fsdp_is_refused_where_layers_back_propagate_alone(train, tmp_path):
    with pytest.raises(AssertionError, match="take it in stage 3 only"):
        train("fsdp_stage1", tmp_path / "never")
    assert not (tmp_path / "never" / "iter_4.pth").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_ends_in_the_same_weights(train, whole, tmp_path, name):
    assert largest_difference(whole[1], train("stage3_hybrid", tmp_path / "run", "--deepspeed", name)) < 1e-6


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
def test_deepspeed_aligns_layers_bit_by_bit(train, tmp_path):
    expected = train("stage1", tmp_path / "plain")
    assert largest_difference(expected, train("stage1", tmp_path / "zero", "--deepspeed", "deepspeed_zero2")) == 0
