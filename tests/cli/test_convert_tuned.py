"""`convert pth_to_hf` of tuning runs: a whole folder where all weights trained, refusals where the config is another."""

import json

import pytest
import torch
from mmengine.config import Config

from tests.finetune.models import batch, build, internvl2, student  # noqa: F401
from xtuner_ext.cli.main import run
from xtuner_ext.convert.export import logits_difference
from xtuner_ext.modeling import HybridVLForCausalLM

CONFIG = """
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.finetune import SupervisedModel

model = dict(
    type=SupervisedModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path={base!r}, dtype="float32"),
    lora={lora},
    freeze={freeze},
    quantization={quantization},
)
processor = dict(type=load_processor, pretrained_model_name_or_path={base!r})
train_dataloader = dict(dataset=dict(dataset=dict(processor=processor)))
"""


@pytest.fixture
def trained(build, student, tmp_path):  # noqa: F811
    """Function that writes config and checkpoint of a run; returns its model."""

    def trained(name="config", base=student, lora=None, freeze=None, quantization=None):
        settings = dict(base=str(base), lora=lora, freeze=freeze, quantization=quantization)
        (tmp_path / f"{name}.py").write_text(CONFIG.format(**settings))
        model = build(base, lora=lora, freeze=freeze, quantization=quantization).eval()
        meta = {"distill": model.describe()}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / f"{name}.pth")
        return model.llm

    return trained


def convert(tmp_path, config="config", checkpoint="config"):
    argv = ["convert", "pth_to_hf", tmp_path / f"{config}.py", tmp_path / f"{checkpoint}.pth", tmp_path / "out"]
    return run([*map(str, argv), "--fp32"])


@pytest.mark.parametrize("freeze", [None, dict(vision=True, language=True)])
def test_whole_weights_become_a_whole_folder(trained, student, tmp_path, freeze):  # noqa: F811
    tuned = trained(freeze=freeze)
    assert convert(tmp_path) == 0
    written = HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logits_difference(written, tuned) < 1e-5
    assert (tmp_path / "out" / "README.md").read_text().count("student, fine-tuned") == 1
    config = Config.fromfile(tmp_path / "out" / "xtuner_config.py")
    assert config.model.llm.pretrained_model_name_or_path == str(student)


def test_beside_quantised_layers_the_folder_has_the_bases_own(trained, student, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    tuned = trained(freeze=dict(language=True, vision=True, mixers=True), quantization=dict(bits=4))
    assert convert(tmp_path) == 0
    written = HybridVLForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(written.lm_head.weight, tuned.lm_head.weight)
    base = HybridVLForCausalLM.from_pretrained(student)
    assert torch.equal(written.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_adapters_become_an_adapter(trained, tmp_path):
    trained(lora=dict(mixers=dict(r=3)))
    assert convert(tmp_path) == convert(tmp_path) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_checkpoint_of_another_config_is_refused(trained, internvl2, tmp_path, capsys):  # noqa: F811
    trained(lora=dict(language=dict(r=3)))
    trained("rank", lora=dict(language=dict(r=4)))
    trained("base", base=internvl2, lora=dict(language=dict(r=3)))
    trained("whole")
    for name, message in (("rank", "another lora"), ("base", "another layer_types"), ("whole", "another lora")):
        assert convert(tmp_path, name) == 2
        assert f"was trained with {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
