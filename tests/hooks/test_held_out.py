"""Measures by training token: right, complete after an interruption, and without effect on the training."""

import json
import os
import random
import subprocess

import numpy as np
import pytest
import torch

from xtuner_ext.cli.loading import load_model
from xtuner_ext.cli.main import run
from xtuner_ext.compat import allow_checkpoint_types
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper
from xtuner_ext.distill.stages import read_checkpoint
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.comparison import compare
from xtuner_ext.hooks import HeldOutHook
from xtuner_ext.hooks.held_out import _precision

MEASURES = ("kl", "agreement", "perplexity", "teacher_perplexity")
# Stage 3 from nothing, once with one set of weights and once with a teacher besides.
STAGES = {
    "stage1": ("stage1", []),
    "stage3": ("stage3_linear", ["previous_stage=None"]),
    "all": ("stage3_linear", ["previous_stage=None", "model.trainable=all"]),
}


def train(project, stage, work_dir, *options):
    extra = ["--cfg-options", *options] if options else []
    assert run(["train", str(project / f"{stage}.py"), "--work-dir", str(work_dir), *extra]) == 0
    return lines(work_dir)


def lines(work_dir):
    path = work_dir / "held_out.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def make_dataset(digits, processor, name):
    return ConversationDataset(str(digits / f"{name}.json"), processor, "internlm2_chat", max_length=512)


@pytest.mark.parametrize("stage, options", STAGES.values(), ids=STAGES)
def test_lines_are_what_comparing_the_exported_models_says(
    small_project, tmp_path, digits, tiny_teacher, stage, options
):
    """The held-out samples are spread as those of ``compare`` are, and padding is never counted."""
    rows = train(small_project, stage, tmp_path / "run", *options)
    assert [row["iter"] for row in rows] == [0, 2, 4, 5]
    checkpoint, out = tmp_path / "run" / "iter_5.pth", tmp_path / "out"
    config = small_project / f"{stage}.py"
    change = ["--cfg-options", *(option for option in options if option.startswith("model"))] if options[1:] else []
    assert run(["convert", "pth_to_hf", str(config), str(checkpoint), str(out), "--fp32", *change]) == 0
    teacher, processor = load_model(str(tiny_teacher))
    expected = compare(teacher, load_model(str(out))[0], make_dataset(digits, processor, "test"), limit=5)
    assert {key: rows[-1][key] for key in MEASURES} == pytest.approx({key: expected[key] for key in MEASURES}, rel=1e-4)
    assert rows[0]["kl"] != rows[-1]["kl"] and rows[0]["teacher_perplexity"] == rows[-1]["teacher_perplexity"]
    data = make_dataset(digits, processor, "train")
    seen = [sum(len(data[i]["input_ids"]) for i in range(4 * done)) for done in (0, 2, 4, 5)]
    assert [row["tokens"] for row in rows] == seen
    assert all(0 <= one["seconds"] <= other["seconds"] for one, other in zip(rows, rows[1:]))


def test_curves_go_where_the_log_goes(small_project, tmp_path):
    rows = train(small_project, "stage1", tmp_path / "run")
    (path,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["held_out/kl"] for row in logged if "held_out/kl" in row] == [row["kl"] for row in rows]


def test_an_interrupted_run_ends_with_the_lines_of_an_uninterrupted_one(small_project, tmp_path):
    whole = train(small_project, "stage1", tmp_path / "whole")
    cut = tmp_path / "cut"
    assert timeless(train(small_project, "stage1", cut)) == timeless(whole)
    for name in ("iter_4.pth", "iter_5.pth"):
        (cut / name).unlink()
    with open(cut / "held_out.jsonl", "a") as file:
        # Killed while it wrote.
        file.write('{"iter": 5, "tok')
    assert timeless(train(small_project, "stage1", cut)) == timeless(whole)


def test_seconds_go_on_where_the_checkpoint_was(small_project, tmp_path):
    train(small_project, "stage1", tmp_path / "run")
    path = tmp_path / "run" / "iter_4.pth"
    allow_checkpoint_types()
    checkpoint = torch.load(path, weights_only=True)
    kept = checkpoint["message_hub"]["runtime_info"]["seconds_trained"]
    rows = lines(tmp_path / "run")
    assert rows[0]["seconds"] == 0 < kept <= rows[-1]["seconds"] + 0.05
    checkpoint["message_hub"]["runtime_info"]["seconds_trained"] = 1000.0
    torch.save(checkpoint, path)
    (tmp_path / "run" / "iter_5.pth").unlink()
    assert 1000 <= train(small_project, "stage1", tmp_path / "run")[-1]["seconds"] < 1000 + kept + 60


def test_tokens_of_every_process_count(small_project, tmp_path, digits, tiny_teacher, scripts):
    argv = [f"{scripts}/xtuner-ext", "train", str(small_project / "stage1.py"), "--work-dir", str(tmp_path / "run")]
    environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, env=environment, check=True, capture_output=True)
    data = make_dataset(digits, load_processor(str(tiny_teacher)), "train")
    seen = [sum(len(data[i]["input_ids"]) for i in range(2 * 4 * done)) for done in (0, 2, 4, 5)]
    assert [row["tokens"] for row in lines(tmp_path / "run")] == seen


def test_a_new_run_in_the_same_folder_begins_a_new_file(small_project, tmp_path):
    first = train(small_project, "stage1", tmp_path / "run")
    for path in (tmp_path / "run").glob("*.pth"):
        path.unlink()
    assert timeless(train(small_project, "stage1", tmp_path / "run")) == timeless(first)


@pytest.mark.parametrize("stage, options", STAGES.values(), ids=STAGES)
def test_measuring_changes_neither_weights_nor_random_numbers(small_project, tmp_path, stage, options):
    ends = []
    for name in ("with", "without"):
        if name == "without":
            path = small_project / f"{stage}.py"
            path.write_text(path.read_text() + "custom_hooks = []\n")
        rows = train(small_project, stage, tmp_path / name, *options)
        assert bool(rows) == (name == "with")
        randomness = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        ends.append((read_checkpoint(str(tmp_path / name / "iter_5.pth"))[0], *randomness))
    (ours, *numbers), (theirs, *others) = ends
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(numbers[0], others[0]) and numbers[1:] == others[1:]


@pytest.mark.parametrize("option", ["interval", "limit", "batch_size"])
def test_numbers_below_one_are_named(option):
    with pytest.raises(UserError, match=f"HeldOutHook.{option} is 0, expected at least 1"):
        HeldOutHook("test.json", **{option: 0})


def test_missing_data_ends_the_run_before_it_begins(small_project, tmp_path, capsys):
    argv = ["train", str(small_project / "stage1.py"), "--work-dir", str(tmp_path / "run")]
    assert run([*argv, "--cfg-options", "custom_hooks.0.meta=gone.json"]) == 2
    assert "meta file gone.json does not exist" in capsys.readouterr().err


def test_deepspeeds_wrapper_brings_no_precision_of_its_own():
    from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper

    model = torch.nn.Linear(2, 2)
    with _precision(DeepSpeedOptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0)), model):
        assert model(torch.zeros(1, 2)).dtype == torch.float32
    wrapper = Bfloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    wrapper.initialize_count_status(model, 0, 1)
    with _precision(wrapper, model):
        assert model(torch.zeros(1, 2)).dtype == torch.bfloat16
