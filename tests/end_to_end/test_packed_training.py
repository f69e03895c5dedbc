"""Training on packed rows and on batches of like lengths, through the command line."""

import json

import pytest
import torch

from xtuner_ext.cli.main import run
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.distill.stages import read_checkpoint

PACKED = """
from mmengine.config import read_base
from xtuner_ext.data.packing import PackedDataset

with read_base():
    from .{stage} import *

train_dataloader["batch_size"] = 2
train_dataloader["dataset"] = dict(
    type=PackedDataset, dataset=train_dataloader["dataset"], row_length=300, cache_dir=base + "/lengths"
)
train_dataloader["sampler"] = dict(type=ResumableInfiniteSampler, shuffle=True)
"""
GROUPED = """
from mmengine.config import read_base
from xtuner_ext.data.samplers import LengthGroupedSampler

with read_base():
    from .{stage} import *

train_dataloader["sampler"] = dict(type=LengthGroupedSampler, batch_size=4, cache_dir=base + "/lengths")
"""
KINDS = {"packed": PACKED, "grouped": GROUPED}


@pytest.fixture
def train(small_project, tmp_path):
    """Function that trains a stage of a kind of config in a folder, and returns that folder."""

    def train(kind, stage, folder, *options):
        path = small_project / f"{stage}_{kind}.py"
        path.write_text(KINDS[kind].format(stage=stage))
        work_dir = tmp_path / folder
        command = ["train", str(path), "--work-dir", str(work_dir), "--seed", "0"]
        assert run([*command, "--cfg-options", "previous_stage=None", *options]) == 0
        return work_dir

    return train


def weights(work_dir):
    return read_checkpoint(str(work_dir / "iter_5.pth"))[0]


@pytest.mark.parametrize(
    "kind, stage, options",
    [
        ("packed", "stage1", []),
        ("packed", "stage3_linear", ["model.trainable=all", "train_dataloader.num_workers=2"]),
        ("grouped", "stage1", []),
    ],
    ids=["packed-stage1", "packed-stage3", "grouped"],
)
def test_a_run_that_goes_on_ends_with_the_weights_of_an_uninterrupted_one(train, kind, stage, options):
    whole = weights(train(kind, stage, "whole", *options))
    cut = train(kind, stage, "cut", *options)
    for name in ("iter_4.pth", "iter_5.pth"):
        (cut / name).unlink()
    (cut / "last_checkpoint").write_text(str(cut / "iter_2.pth"))
    resumed = weights(train(kind, stage, "cut", *options))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)
    logs = [path.read_text() for path in cut.glob("*/*.log")]
    assert any("resumed epoch: 0, iter: 2" in log for log in logs)


def test_held_out_lines_count_the_rows_tokens_and_measure_single_samples(train, digits, digits_processor):
    packed, plain = (
        [json.loads(line) for line in (train(kind, "stage1", kind) / "held_out.jsonl").read_text().splitlines()]
        for kind in ("packed", "grouped")
    )
    assert packed[0]["kl"] == plain[0]["kl"]
    dataset = ConversationDataset(str(digits / "train.json"), digits_processor, "internlm2_chat", max_length=512)
    rows = PackedDataset(dataset, 300)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    assert [line["tokens"] for line in packed] == [
        sum(int(rows.lengths[rows.samples(row)].sum()) for row in order[: 2 * line["iter"]]) for line in packed
    ]


def test_a_packed_run_can_be_exported_and_its_layers_selected(train, small_project, tmp_path):
    work_dir, config = train("packed", "stage2", "run"), str(small_project / "stage2_packed.py")
    checkpoint, out = str(work_dir / "iter_5.pth"), tmp_path / "out"
    assert run(["convert", "pth_to_hf", config, checkpoint, str(out), "--fp32"]) == 0
    assert (out / "model.safetensors").is_file()
    chosen = tmp_path / "layers.json"
    assert run(["select-layers", config, checkpoint, "--keep", "1", "--limit", "4", "--out", str(chosen)]) == 0
    assert len(json.loads(chosen.read_text())["attention_layers"]) == 1
