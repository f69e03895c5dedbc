"""`train`: checking the command, preparing data, and whole runs of a toy config."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xtuner_ext.cli import main, train
from xtuner_ext.cli.config_options import load_config
from xtuner_ext.errors import UserError

TOY_MODULE = '''
import json
import pathlib

import torch
from mmengine.model import BaseModel

from xtuner_ext.errors import UserError


class ToyModel(BaseModel):
    def __init__(self, fail=False):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fail = fail

    def forward(self, data, data_samples=None, mode="loss"):
        if self.fail:
            raise UserError("row 3 of x.jsonl: 2 images were found, 1 was expected")
        return {"loss": self.layer(data["x"]).square().mean()}


class ToyData(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.tensor([index / 64, 1.0])


def collate(rows):
    return {"data": {"x": torch.stack(rows)}, "data_samples": None}


def prepare(out, size):
    if not size:
        raise UserError("nothing to prepare")
    folder = pathlib.Path(out)
    if (folder / "meta.json").exists():
        return
    folder.mkdir(exist_ok=True)
    with open(folder / "calls.txt", "a") as file:
        file.write(f"{size} ")
    (folder / "meta.json").write_text(json.dumps({"size": size}))
'''

TOY_CONFIG = """
from mmengine.config import read_base
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import OptimWrapper
from toy_module import ToyData, ToyModel, collate, prepare
from torch.optim import SGD
from xtuner.engine.runner import TrainLoop

with read_base():
    from ._base import *

lr = 1e-2
batch_size = 4
prepare_data = dict(type=prepare, out="prepared", size=size)
model = dict(type=ToyModel, fail=False)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(type=ToyData),
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=dict(type=collate),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=lr))
train_cfg = dict(type=TrainLoop, max_iters=4)
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=1),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=2, max_keep_ckpts=2),
)
scales = [dict(side=1), dict(side=2)]
env_cfg = dict(dist_cfg=dict(backend="nccl"))
randomness = dict(seed=0)
log_processor = dict(by_epoch=False)
load_from = None
resume = False
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a toy config, which is the current directory; its module is importable."""
    (tmp_path / "toy_module.py").write_text(TOY_MODULE)
    (tmp_path / "toy.py").write_text(TOY_CONFIG)
    (tmp_path / "_base.py").write_text("size = 3\nname = 'toy'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # The stock tool sets LOCAL_RANK for good; set here first, it is taken back after the test.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    yield tmp_path
    sys.modules.pop("toy_module", None)


class TestOptions:
    def test_existing_keys_change(self, toy):
        options = ["optim_wrapper.optimizer.lr=3", "scales.1.side=7", "work_dir=w", "name=n"]
        config = load_config("toy.py", options)
        assert config.optim_wrapper.optimizer.lr == 3
        assert [scale.side for scale in config.scales] == [1, 7]
        assert config.work_dir == "w" and config.name == "n"

    @pytest.mark.parametrize(
        ("option", "parts"),
        [
            ("optim_wrapper.optimizr.lr=3", ["optimizr.lr", "toy.py", "optim_wrapper.optimizer.lr"]),
            ("train_cfg.max_iter=3", ["train_cfg.max_iter:", "train_cfg.max_iters"]),
            ("scales.2.side=3", ["scales.2.side", "scales.0.side"]),
            ("train_cfg.max_iters.x=3", ["train_cfg.max_iters.x"]),
            ("lr=3", ["lr is a variable", "optim_wrapper.optimizer.lr"]),
            ("batch_size=3", ["batch_size is a variable", "train_dataloader.batch_size"]),
            ("size=4", ["size is a variable", "prepare_data.size"]),
            ("novalue", ["novalue", "key=value"]),
        ],
    )
    def test_a_key_that_would_change_nothing_is_refused(self, toy, option, parts):
        with pytest.raises(UserError) as error:
            load_config("toy.py", [option])
        assert all(part in str(error.value) for part in parts)

    def test_syntax_error_names_the_line(self, toy):
        (toy / "broken.py").write_text("x = 1\ny = (\n")
        with pytest.raises(UserError, match="broken.py, line 2"):
            load_config("broken.py")

    def test_options_given_twice_add_up(self):
        argv = ["toy.py", "--cfg-options", "a=1", "--seed", "3", "--cfg-options", "b=2", "c=3"]
        args = train.parse_args(argv)
        assert args.cfg_options == ["a=1", "b=2", "c=3"]
        assert train.parse_args(["toy.py"]).resume is None
        assert train.parse_args(["toy.py", "--resume"]).resume == "auto"
        assert train.parse_args(["toy.py", "--resume", "x.pth"]).resume == "x.pth"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["toy.py", "--resume", "gone.pth"], "--resume gone.pth does not exist"),
        (["tyo.py"], "config tyo.py is neither a file nor the name of a config"),
        (["toy.py", "--cfg-options", "no.such=1"], "--cfg-options no.such"),
    ],
)
def test_mistakes_end_before_anything_is_written(toy, argv, message, capsys):
    assert main.run(["train", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (toy / "work_dirs").exists() and not (toy / "prepared").exists()


def test_deepspeed_is_asked_for_by_name(toy, monkeypatch, capsys):
    for found, message in ((None, "pip install"), (object(), "deepspeed_zero2")):
        util = SimpleNamespace(find_spec=lambda name, found=found: found)
        monkeypatch.setattr(train, "importlib", SimpleNamespace(util=util))
        assert main.run(["train", "toy.py", "--deepspeed", "zero2"]) == 2
        assert message in capsys.readouterr().err


def test_a_deepspeed_configuration_that_is_none_is_refused(toy, monkeypatch, tmp_path, capsys):
    util = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(train, "importlib", SimpleNamespace(util=util))
    # Without a launcher the front door would start one.
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "zero.json").write_text("not json")
    assert main.run(["train", "toy.py", "--deepspeed", str(tmp_path / "zero.json")]) == 2
    assert "not a DeepSpeed configuration" in capsys.readouterr().err


@pytest.mark.parametrize("stage, message", [("stage2", "take deepspeed_zero2"), ("stage3_linear", "gone.pth")])
def test_zero3_waits_for_stage_3(toy, monkeypatch, stage, message, capsys):
    util = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(train, "importlib", SimpleNamespace(util=util))
    monkeypatch.setenv("LOCAL_RANK", "0")
    options = ["--resume", "gone.pth", "--cfg-options", "model.pretrained_pth=gone.pth"]
    assert main.run(["train", f"mmmamba/digits/{stage}", "--deepspeed", "deepspeed_zero3", *options]) == 2
    assert message in capsys.readouterr().err


def test_processes_that_prepare_the_same_data_take_turns(toy):
    """Also those of several machines, which have no first process in common."""
    config, order = load_config("toy.py", ["prepare_data.size=5"]), []

    def slow(out, size):
        order.append("begin")
        time.sleep(0.1)
        order.append("end")

    config._cfg_dict["prepare_data"] = {"type": slow, "out": "prepared", "size": 5}
    threads = [threading.Thread(target=train.prepare_data, args=(config,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["begin", "end"] * 3


def test_finished_data_may_lie_where_nothing_can_be_written(toy):
    config, calls = load_config("toy.py"), []
    config._cfg_dict["prepare_data"] = {"type": lambda out: calls.append(out), "out": "/proc/prepared"}
    train.prepare_data(config)
    assert calls == ["/proc/prepared"]


def test_a_step_without_a_result_of_its_own_is_for_the_first_process(toy, monkeypatch):
    config, calls = load_config("toy.py"), []
    config._cfg_dict["prepare_data"] = {"type": lambda size: calls.append(size), "size": 1}
    for name, rank in (("LOCAL_RANK", "1"), ("LOCAL_RANK", "0"), ("SLURM_LOCALID", "1"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, rank)
        train.prepare_data(config)
        monkeypatch.delenv(name)
    assert calls == [1, 1]


STEPS = """
with read_base():
    from .toy import *

prepare_data = [dict(type=prepare, out="first", size=1), dict(type=prepare, out="second", size=2)]
"""


@pytest.fixture
def steps(toy):
    """The toy config with two steps of preparation."""
    head = "from mmengine.config import read_base\nfrom toy_module import prepare\n"
    (toy / "steps.py").write_text(head + STEPS)
    return toy


def test_steps_of_preparation_run_in_order(steps, monkeypatch, capsys):
    train.prepare_data(load_config("steps.py", ["prepare_data.1.size=7"]))
    first, second = (steps / name / "calls.txt" for name in ("first", "second"))
    assert (first.read_text(), second.read_text()) == ("1 ", "7 ")
    assert first.stat().st_mtime_ns <= second.stat().st_mtime_ns
    second.unlink()
    assert main.run(["train", "steps.py", "--cfg-options", "prepare_data.0.size=0"]) == 2
    assert "nothing to prepare" in capsys.readouterr().err
    # What comes after a step that failed is not done.
    assert not second.exists() and not (steps / "work_dirs").exists()


def test_a_step_that_is_no_function_is_named(steps):
    config = load_config("steps.py")
    config.prepare_data[1].type = "toy_module.nothing"
    with pytest.raises(UserError, match="prepare_data.type: toy_module.nothing"):
        train.prepare_data(config)


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _dist(repository, *argv, **environment):
    return subprocess.run(
        ["bash", str(repository / "tools" / "dist.sh"), *argv],
        capture_output=True,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if key not in ("NNODES", "DEEPSPEED")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            **environment,
        },
    )


def test_resumed_run_ends_as_an_uninterrupted_one(toy, capsys):
    arguments = ["train", str(toy / "toy.py"), "--seed", "1"]
    assert main.run([*arguments, "--work-dir", "whole"]) == 0
    assert main.run([*arguments, "--work-dir", "parts", "--cfg-options", "train_cfg.max_iters=2"]) == 0
    assert main.run([*arguments, "--work-dir", "parts", "--resume"]) == 0
    whole, parts = _weights("whole/iter_4.pth"), _weights("parts/iter_4.pth")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert Path("parts/last_checkpoint").read_text().endswith("iter_4.pth")

    capsys.readouterr()
    assert main.run([*arguments, "--work-dir", "bad", "--cfg-options", "model.fail=True"]) == 2
    assert capsys.readouterr().err.endswith(
        "xtuner-ext: error: row 3 of x.jsonl: 2 images were found, 1 was expected\n"
    )


def test_two_machines_train_as_two_processes(toy, repository):
    result = _dist(repository, "train", "toy.py", "2", "--work-dir", "one", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    shared = dict(NNODES="2", MASTER_ADDR="127.0.0.1", PORT=str(_free_port()), OMP_NUM_THREADS="1")
    results = {}

    def machine(rank):
        results[rank] = _dist(repository, "train", "toy.py", "1", "--work-dir", "two", NODE_RANK=rank, **shared)

    threads = [threading.Thread(target=machine, args=(rank,)) for rank in ("0", "1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank].returncode for rank in ("0", "1")] == [0, 0], results["0"].stderr[-2000:]
    one, two = _weights("one/iter_4.pth"), _weights("two/iter_4.pth")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (toy / "prepared" / "calls.txt").read_text() == "3 "


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "PORT"])
def test_several_machines_need_to_know_of_each_other(toy, repository, missing):
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "PORT": "29500", missing: ""}
    result = _dist(repository, "train", "toy.py", "1", **variables)
    assert result.returncode == 2 and f"NNODES is 2 and {missing} is not set" in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "toy.py", "1"], "trian was given, train, test or pipeline is expected"),
        (["train", "toy.py", "none"], "none was given for GPUS"),
        (["train", "toy.py"], "usage"),
        (["train", "gone.py", "1"], "config gone.py is neither a file"),
        (["test", "gone.py", "1"], "config gone.py is neither a file"),
    ],
)
def test_dist_passes_the_status_on(toy, repository, argv, message):
    result = _dist(repository, *argv)
    assert result.returncode == 2 and message in result.stderr
