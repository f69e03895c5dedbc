"""Exports that give the trained model's logits, or do not appear."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.dynamic_module_utils import get_imports

from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.export import MODELLING_FILES, PACKAGE, export_student, logits_difference
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.distill import DistillModel
from xtuner_ext.errors import UserError


@pytest.fixture
def trained():
    """A hybrid stage-3 model of the shipped teacher whose mixers have moved."""
    model = DistillModel(
        llm=dict(type=load_teacher, pretrained_model_name_or_path="digits-teacher", dtype="float32"),
        stage=3,
        attention_layers=[0, 4],
        mixer=dict(qk_norm="l2", use_rope=True, gate_bias=True),
        seeding=dict(gate="open"),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model._activate("linear_attention")
    return model.eval()


def test_the_written_code_asks_for_no_package_that_only_gpus_need():
    # transformers refuses to load a folder from a hub where any of its files imports what is not installed.
    found = {name for path in MODELLING_FILES for name in get_imports(PACKAGE / path)}
    assert {"torch", "transformers"} <= found and not found & {"triton", "mamba_ssm", "causal_conv1d", "fla"}


def export(model, out, **options):
    options = {"dtype": torch.float32, "trained_model": model.llm, **options}
    export_student(model.student_config, model.student_state(), "digits-teacher", out, **options)


def test_the_written_model_gives_the_trained_models_logits(trained, tmp_path):
    export(trained, tmp_path / "out", max_shard_size="1MB")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert logits_difference(written, trained.llm) < 1e-5
    for index, layer in enumerate(written.model.layers):
        if index not in (0, 4):
            mamba = trained.llm.model.layers[index].mixer.mamba
            assert torch.equal(layer.mixer.dt_bias, mamba.dt_bias) and torch.equal(layer.mixer.A_log, mamba.A_log)


def test_bf16_keeps_decays_in_fp32(trained, tmp_path):
    export(trained, tmp_path / "out", dtype=torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    mixer, mamba = written.model.layers[1].mixer, trained.llm.model.layers[1].mixer.mamba
    assert mixer.A_log.dtype == torch.float32 and torch.equal(mixer.A_log, mamba.A_log)


def test_an_export_that_is_not_the_trained_model_does_not_appear(trained, tmp_path):
    state = trained.student_state()
    state["model.layers.1.mixer.dt_bias"] = state["model.layers.1.mixer.dt_bias"] + 1.0
    with pytest.raises(UserError, match="failed its check: the logits of the assembled student"):
        export_student(
            trained.student_config, state, "digits-teacher", tmp_path / "out", torch.float32, trained_model=trained.llm
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_is_named(trained, tmp_path):
    state = trained.student_state()
    del state["model.layers.1.mixer.A_log"]
    with pytest.raises(UserError, match="does not hold model.layers.1.mixer.A_log"):
        export_student(trained.student_config, state, "digits-teacher", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_end_that_the_teacher_names_is_kept(trained, tmp_path):
    trained.student_config.eos_token_id = [2, 9]
    export(trained, tmp_path / "out")
    tokenizer = load_processor(tmp_path / "out").tokenizer
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == sorted({2, 9, tokenizer.eos_token_id}) and found.pad_token_id == tokenizer.pad_token_id
