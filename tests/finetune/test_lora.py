"""Which layers get which rank, and adapters that plain PEFT loads."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from xtuner_ext.convert.export import probe_logits
from xtuner_ext.errors import UserError
from xtuner_ext.finetune.lora import saved_modules
from xtuner_ext.finetune.parts import part_of
from xtuner_ext.modeling import HybridVLForCausalLM

ALL = dict(language=dict(r=4), mixers=dict(r=2, alpha=3), vision=dict(r=3), projector=dict(r=5))


def ranks(model):
    layers = {name: module for name, module in model.llm.named_modules() if isinstance(module, LoraLayer)}
    return {name: (module.r["default"], module.lora_alpha["default"]) for name, module in layers.items()}


def test_every_part_has_its_own_rank_and_all_its_linear_layers(build, student):
    found = ranks(build(student, lora=ALL))
    attention = {f"model.layers.0.mixer.{name}_proj" for name in "qkvo"}
    mlp = {f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")}
    mixer = {f"model.layers.1.mixer.{name}_proj" for name in ("q", "k", "v", "o", "g", "dt", "share")}
    assert {name for name, rank in found.items() if rank == (4, 8)} == attention | mlp
    assert {name for name, rank in found.items() if rank == (2, 3)} == mixer
    vision = [name for name, rank in found.items() if rank == (3, 6)]
    # Of each of the tower's three layers q, k, v and their projection, and two of the MLP.
    assert len(vision) == 18 and all(name.startswith("vision.tower.") for name in vision)
    assert {name for name, rank in found.items() if rank == (5, 10)} == {"vision.projector.1", "vision.projector.3"}
    assert len(found) == 10 + 7 + 18 + 2


@pytest.mark.parametrize("first", ["mixers", "language"])
def test_ranks_do_not_depend_on_the_order_in_the_config(build, student, first):
    order = sorted(ALL, key=lambda part: part != first)
    assert ranks(build(student, lora={part: ALL[part] for part in order})) == ranks(build(student, lora=ALL))


def test_targets_narrow_a_part(build, student):
    found = ranks(build(student, lora=dict(language=dict(r=1, targets=["q_proj", "v_proj"]))))
    assert set(found) == {"model.layers.0.mixer.q_proj", "model.layers.0.mixer.v_proj"}


@pytest.mark.parametrize(
    "options, trained",
    [
        (dict(lora=dict(language=dict(r=2))), set()),
        (dict(lora=dict(language=dict(r=2)), freeze=dict(projector=False)), {"projector"}),
        (dict(freeze=dict(vision=True)), {"language", "mixers", "projector", "embeddings", "head"}),
        (dict(freeze=dict(language=True, vision=True, mixers=True)), {"projector", "embeddings", "head"}),
        (dict(lora=dict(mixers=dict(r=2)), freeze=dict(language=False, head=False)), {"language", "head"}),
    ],
)
def test_what_trains_as_a_whole(build, student, options, trained):
    model = build(student, **options)
    found = {part_of(model.llm, n) for n, p in model.llm.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert found == trained
    assert set(model.state_dict()) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_towers_last_layers(build, student):
    model = build(student, lora=dict(language=dict(r=2)), freeze=dict(unfreeze_vit_layers=2))
    trained = {name.split(".")[4] for name, p in model.llm.named_parameters() if p.requires_grad and "tower" in name}
    assert trained == {"1", "2"}
    assert saved_modules(model.llm) == ["vision.tower.encoder.layer.1", "vision.tower.encoder.layer.2"]


PLAIN_CASES = {
    "one part": dict(lora=dict(language=dict(r=4))),
    "all parts": dict(lora=ALL),
    "projector beside it": dict(lora=dict(language=dict(r=4)), freeze=dict(projector=False)),
    "tower's last layer": dict(lora=dict(mixers=dict(r=4)), freeze=dict(unfreeze_vit_layers=1)),
    "embeddings and head": dict(lora=dict(vision=dict(r=4)), freeze=dict(embeddings=False, head=False)),
    "whole language part": dict(lora=dict(vision=dict(r=4)), freeze=dict(language=False)),
}


@pytest.mark.parametrize("options", PLAIN_CASES.values(), ids=PLAIN_CASES)
def test_plain_peft_loads_the_adapter(build, student, tmp_path, options):
    model = build(student, **options).eval()
    model._write_adapter(str(student), tmp_path / "adapter", False)
    base = HybridVLForCausalLM.from_pretrained(student)
    untuned = probe_logits(base.eval())
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = probe_logits(model.llm)
    assert (untuned - expected).abs().max() > 1e-2
    torch.testing.assert_close(probe_logits(tuned.base_model.model), expected, rtol=1e-4, atol=1e-4)
    names = {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "tokenizer.json"}
    assert names <= {path.name for path in (tmp_path / "adapter").iterdir()}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(student)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lora=dict(speech=dict(r=2))), "unknown key model.lora.speech"),
        (dict(lora=dict(dropout=0.1)), "model.lora names no part"),
        (dict(lora=dict()), "model.lora names no part"),
        (dict(lora=dict(language=16)), "model.lora.language is 16, expected a dict"),
        (dict(lora=dict(language=dict(r=2, alpha=0))), "model.lora.language.alpha is 0, expected a number above 0"),
        (dict(lora=dict(language=dict(r=2), dropout="x")), "model.lora.dropout is 'x'"),
        (dict(freeze="vision"), "model.freeze is 'vision', expected a dict"),
        (dict(lora=dict(language=dict(r=0))), "model.lora.language.r is 0"),
        (dict(lora=dict(language=dict(alpha=4))), "model.lora.language.r is None"),
        (dict(lora=dict(language=dict(r=2, rank=2))), "unknown key model.lora.language.rank"),
        (dict(lora=dict(language=dict(r=2, targets=["wqkv"]))), "model.lora.language.targets names 'wqkv', expected"),
        (dict(lora=dict(language=dict(r=2), dropout=1)), "model.lora.dropout is 1"),
        (dict(lora=dict(language=dict(r=2)), freeze=dict(language=False)), "which model.freeze leaves to train"),
        (dict(freeze=dict(tower=True)), "unknown key model.freeze.tower"),
        (dict(freeze=dict(vision="yes")), "model.freeze.vision is 'yes'"),
        (dict(freeze=dict(vision=True, unfreeze_vit_layers=9)), "unfreeze_vit_layers is 9, expected 0 to 3"),
        (dict(loss_reduction="mean"), "model.loss_reduction is 'mean'"),
        (
            dict(freeze=dict.fromkeys(("language", "mixers", "vision", "projector", "embeddings", "head"), True)),
            "no parameter of the model trains",
        ),
    ],
)
def test_settings_that_contradict_are_named(build, student, options, message):
    with pytest.raises(UserError, match=message):
        build(student, **options)


@pytest.mark.parametrize("part", ["mixers", "vision"])
def test_a_part_that_is_not_there(build, tiny_teacher, part):
    """The digits' teacher has attention alone, and a front end of patches, of which only the projector is linear."""
    with pytest.raises(UserError, match=f"model.lora.{part}: the model has no linear layer there"):
        build(tiny_teacher, lora={part: dict(r=2)})


def test_an_adapter_inside_of_a_module_that_trains_in_part_can_not_be_saved(build, tiny_teacher, tmp_path):
    model = build(tiny_teacher, lora=dict(projector=dict(r=2)), freeze=dict(vision=False))
    with pytest.raises(UserError, match="vision trains in part and has adapters inside"):
        model._write_adapter(str(tiny_teacher), tmp_path / "adapter", False)
    assert not (tmp_path / "adapter").exists()


def test_training_weights_have_a_precision_of_their_own(build, student):
    model = build(student, lora=ALL, freeze=dict(embeddings=False), trainable_dtype="float32")
    model.llm.to(torch.bfloat16)
    model.cast_trainable("float32")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32} and model.llm.lm_head.weight.dtype == torch.bfloat16
