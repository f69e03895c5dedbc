"""The estimate of a run beside what a run takes."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from xtuner.registry import BUILDER

from tests.reference.hovle import hovle_config
from xtuner_ext.cli import config_names
from xtuner_ext.cli.config_options import load_config
from xtuner_ext.distill.autocast import autocast_dtype
from xtuner_ext.distill.estimate import activation_bytes, build_structure, estimate_stage

TRAINABLE = {"stage1": 135_664_640, "stage2": 404_100_096, "stage3_linear": 404_100_096, "stage3_hybrid": 303_075_072}


@pytest.fixture
def hovle(tmp_path, monkeypatch):
    """The current directory holds HoVLE's config.json where the shipped configs look for it."""
    folder = tmp_path / "pretrained" / "HoVLE"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hovle_config(full=True)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def small_smollm2(tmp_path_factory):
    """SmolLM2's widths with four layers and a small vocabulary, random weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = LlamaConfig(
        **dict(vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, tie_word_embeddings=True),
        **dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100000.0),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", list(TRAINABLE))
def test_full_size_without_a_weight(hovle, stage):
    report = estimate_stage(load_config(config_names()[f"mmmamba/hovle/{stage}"]), gpus=8, length=1024)
    count = TRAINABLE[stage]
    assert report["trainable"] == count
    # Frozen weights are bf16, trained ones and their two moments fp32.
    assert report["weight_bytes"] == 2 * (report["parameters"] - count) + 4 * count
    assert report["optimizer_bytes"] == 8 * count and report["checkpoint_bytes"] == pytest.approx(12 * count, rel=0.001)
    plain, one, two, three = report["zero"].values()
    assert one["optimizer"] == two["optimizer"] == 12 * count // 8
    assert one["gradients"] == 4 * count == 8 * two["gradients"]
    assert three["weights"] == report["weight_bytes"] // 8 and plain["weights"] == report["weight_bytes"]
    assert three["possible"] == stage.startswith("stage3") and plain["fits"]
    # The paper's 20,000 steps of 128 or 64 rows.
    assert report["steps"] == 20_000
    assert report["tokens_per_step"] == (64 if stage.startswith("stage3") else 128) * 1024


def test_memory_and_recomputation_decide_what_fits(hovle):
    config, fits = load_config(config_names()["mmmamba/hovle/stage3_linear"]), {}
    for recompute, memory in ((False, 24), (False, 80), (True, 24)):
        config.model.use_activation_checkpointing = recompute
        fits[recompute, memory] = estimate_stage(config, 8, memory)["zero"]["2"]["fits"]
    assert fits == {(False, 24): False, (False, 80): True, (True, 24): True}


def measured_peak(model, data, autocast=None):
    """Bytes that the allocator had handed out at most during one step, gradients of the weights left out."""

    def step():
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model.compute_loss(**data)["loss"]
        loss.backward()

    # Kernels that allocate once.
    step()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def batch(model, rows, length):
    ids = torch.randint(20, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=ids.clone())


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3_linear", "stage3_hybrid"])
def test_activations_of_digits(name):
    config = load_config(config_names()[f"mmmamba/digits/{name}"])
    config.model.attention_layers = [1, 5] if name == "stage3_hybrid" else None
    model = BUILDER.build(config.model)
    expected = measured_peak(model, batch(model, 8, 96))
    found = activation_bytes(build_structure(config), 8, 96, kernels=False)
    assert found["total"] == pytest.approx(expected, rel=0.35)
    if model.stage == 3:
        model.train().gradient_checkpointing_enable()
        expected = measured_peak(model, batch(model, 8, 96))
        assert found["checkpointed"] == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3_linear", "stage3_hybrid"])
def test_activations_of_smollm2s_shape(small_smollm2, name):
    config = load_config(config_names()[f"mmmamba/smollm2/{name}"])
    config.model.llm.pretrained_model_name_or_path = str(small_smollm2)
    if name == "stage3_hybrid":
        config.model.attention_layers = [2]
    model = BUILDER.build(config.model)
    autocast = autocast_dtype(config.optim_wrapper)
    expected = measured_peak(model, batch(model, 2, 256), autocast)
    found = activation_bytes(build_structure(config), 2, 256, autocast, kernels=False)
    assert found["total"] == pytest.approx(expected, rel=0.35)
    # A fused scan keeps less, and recomputed layers less still.
    fused = activation_bytes(build_structure(config), 2, 256, autocast)
    assert fused["total"] < found["total"]
    assert model.stage < 3 or fused["checkpointed"] < fused["total"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["stage1", "stage3_linear"])
def test_activations_on_a_gpu(small_smollm2, name):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = load_config(config_names()[f"mmmamba/smollm2/{name}"])
    config.model.llm.pretrained_model_name_or_path = str(small_smollm2)
    model = BUILDER.build(config.model).cuda()
    data = {key: value.cuda() for key, value in batch(model, 4, 1024).items()}
    for _ in range(2):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.compute_loss(**data)["loss"]
        loss.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    expected = torch.cuda.max_memory_allocated() - before - gradients
    found = activation_bytes(build_structure(config), 4, 1024, torch.bfloat16, kernels=True)
    assert found["total"] == pytest.approx(expected, rel=0.25)
