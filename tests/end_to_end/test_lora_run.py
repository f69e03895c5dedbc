"""The shipped InternVL configs on a tiny InternVL2: train, convert, merge; one process, two, and DeepSpeed."""

import importlib.util
import json
import shutil

import pytest
import torch
from xtuner.registry import BUILDER

from tests.finetune.models import internvl2, student  # noqa: F401
from xtuner_ext.cli import config_names, main
from xtuner_ext.cli.config_options import load_config
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.export import logits_difference
from xtuner_ext.distill.stages import read_checkpoint
from xtuner_ext.distill.teacher_cache import weights_digest
from xtuner_ext.finetune.lora import has_lora
from xtuner_ext.modeling import HybridVLForCausalLM

from .conftest import DIST, ROOT, run

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# Optimizer steps of eight samples, in numbers that do not hide a difference.
STEPS = (
    "total_batch_size=8",
    "save_steps=2",
    "model.loss_reduction=square",
    "optim_wrapper.optimizer.lr=0.01",
    "model.trainable_dtype=None",
    "model.llm.dtype=float32",
    "model.lora.dropout=0.0",
    "optim_wrapper.type=mmengine.optim.OptimWrapper",
)


@pytest.fixture(scope="module")
def train(internvl2, student, digits, tmp_path_factory):  # noqa: F811
    """Function that trains a shipped config on the tiny model and returns its work_dir."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, work_dir, *options, processes=1, base=None, arguments=(), iterations=2):
        base = base or (student if name == "student_lora" else internvl2)
        options = [
            f"model.llm.pretrained_model_name_or_path={base}",
            f"train_dataloader.dataset.processor.pretrained_model_name_or_path={base}",
            f"train_dataloader.dataset.meta={digits / 'train.json'}",
            "train_dataloader.dataset.template=internlm2-chat",
            "train_dataloader.num_workers=0",
            f"train_dataloader.sampler.cache_dir={folder / 'lengths'}",
            "default_hooks.logger.interval=1",
            "log_processor.window_size=1",
            *([] if iterations is None else ["train_cfg.max_epochs=None", f"train_cfg.max_iters={iterations}"]),
            *options,
        ]
        config = ROOT / "projects" / "internvl" / f"{name}.py"
        command = ["bash", DIST, "train", config, processes, "--work-dir", work_dir, *arguments, "--cfg-options", *options]
        result = run(command, folder)
        assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
        return work_dir

    return train


def losses(work_dir):
    """Of every iteration of a run's last start."""
    path = max(work_dir.glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("name", ["internvl2_2b_qlora", "student_lora"])
def test_a_shipped_config_trains_converts_and_merges(train, internvl2, student, digits, tmp_path, name):  # noqa: F811
    # One epoch of twelve samples: three iterations of four, rounded up to one optimizer step of sixteen.
    run_dir = train(name, tmp_path / "run", f"train_dataloader.dataset.meta={digits / 'test.json'}", iterations=None)
    assert len(losses(run_dir)) == 4
    # The run's own config, which holds what the command line changed.
    config, checkpoint = str(run_dir / f"{name}.py"), str(run_dir / "iter_4.pth")
    assert main.run(["convert", "pth_to_hf", config, checkpoint, str(tmp_path / "adapter")]) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (16, 32, 0.05)
    digest = json.loads((tmp_path / "adapter" / "base_model.json").read_text())["weights_digest"]
    assert digest == weights_digest(load_teacher(student if "student" in name else internvl2))
    for source in (tmp_path / "adapter", run_dir):
        assert main.run(["merge", str(source), str(tmp_path / "merged")]) == 0
    merged = HybridVLForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not has_lora(merged)
    difference = logits_difference(merged, load_teacher(student if "student" in name else internvl2))
    assert 0 < difference < 0.5


@pytest.mark.parametrize("name, rank", [("internvl2_2b_lora", 16), ("internvl2_2b_lora_coco", 128), ("habitat_lora", 16)])
def test_shipped_configs_tune_the_language_part_alone(internvl2, name, rank):  # noqa: F811
    config = load_config(config_names()[f"internvl/{name}"], [f"model.llm.pretrained_model_name_or_path={internvl2}"])
    model = BUILDER.build(config.model)
    assert {len(p) for name, p in model.named_parameters() if ".lora_A." in name} == {rank}
    assert all(key.startswith("llm.model.layers.") and ".lora_" in key for key in model.state_dict())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """One process, two iterations an optimizer step, a checkpoint after two and after four steps."""
    options = [*STEPS, "default_hooks.checkpoint.max_keep_ckpts=9"]
    return train("habitat_lora", tmp_path_factory.mktemp("alone") / "run", *options, iterations=8)


def assert_same_run(alone, other):
    """The same losses of optimizer steps to 1e-5, and the same weights."""
    one = losses(alone)
    # A step's loss is the mean of its iterations'.
    assert losses(other) == pytest.approx([(a + b) / 2 for a, b in zip(one[::2], one[1::2])], abs=1e-5)
    first, second = (read_checkpoint(str(path))[0] for path in (alone / "iter_8.pth", other / "iter_4.pth"))
    assert set(first) == set(second) and all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_two_processes_do_what_one_does(train, alone, tmp_path):
    assert_same_run(alone, train("habitat_lora", tmp_path / "two", *STEPS, processes=2, iterations=4))


def test_a_resumed_run_ends_in_the_same_bits(train, alone, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(alone / "iter_4.pth", again)
    (again / "last_checkpoint").write_text(str(again / "iter_4.pth"))
    train("habitat_lora", again, *STEPS, iterations=8)
    assert len(losses(again)) == 4
    one, two = (read_checkpoint(str(folder / "iter_8.pth"))[0] for folder in (alone, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_number_of_processes_that_does_not_divide_is_refused(capsys, tmp_path):
    options = ["--work-dir", str(tmp_path), "--cfg-options", "train_dataloader.batch_size=5"]
    assert main.run(["train", "internvl/internvl2_2b_lora", *options]) == 2
    assert "total_batch_size is 16, which 5 samples a process x 1 processes = 5 do not" in capsys.readouterr().err


@pytest.mark.skipif(not DEEPSPEED, reason="needs the package deepspeed")
@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_trains_saves_resumes_and_converts(train, alone, tmp_path, name):
    """And ends where one process without it does, also after a break."""
    arguments = dict(processes=2, arguments=["--deepspeed", name])
    options = [*STEPS, "default_hooks.checkpoint.max_keep_ckpts=9"]
    run_dir = train("habitat_lora", tmp_path / "run", *options, iterations=4, **arguments)
    assert_same_run(alone, run_dir)
    shutil.rmtree(run_dir / "iter_4.pth")
    (run_dir / "last_checkpoint").write_text(str(run_dir / "iter_2.pth"))
    train("habitat_lora", run_dir, *options, iterations=4, **arguments)
    expected, found = (read_checkpoint(str(path))[0] for path in (alone / "iter_8.pth", run_dir / "iter_4.pth"))
    assert all(torch.allclose(expected[key], found[key], atol=1e-6) for key in expected)
    assert main.run(["merge", str(run_dir), str(tmp_path / "merged")]) == 0
    assert not has_lora(HybridVLForCausalLM.from_pretrained(tmp_path / "merged"))
