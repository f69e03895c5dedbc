"""Quantised frozen layers under adapters."""

import pytest
import torch

from xtuner_ext.errors import UserError
from xtuner_ext.finetune.quantization import dequantise

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")

LORA = dict(language=dict(r=4), mixers=dict(r=4), vision=dict(r=2), dropout=0.0)
FOUR, EIGHT = dict(bits=4, type="nf4", double_quant=True), dict(bits=8)


@pytest.mark.parametrize("options", [FOUR, EIGHT, dict(bits=4, type="fp4", double_quant=False)])
def test_the_decoders_linear_layers_are_quantised_and_no_others(build, student, batch, options):
    model = build(student, lora=LORA, quantization=options).train()
    kind = bitsandbytes.nn.Linear4bit if options["bits"] == 4 else bitsandbytes.nn.Linear8bitLt
    found = {name for name, module in model.llm.named_modules() if isinstance(module, kind)}
    names = {f"model.layers.{i}.mlp.{name}_proj.base_layer" for i in (0, 1) for name in ("gate", "up", "down")}
    names |= {f"model.layers.{i}.mixer.{name}_proj.base_layer" for i in (0, 1) for name in "qkvo"}
    assert found == names | {"model.layers.1.mixer.g_proj.base_layer"}
    mixer = model.llm.model.layers[1].mixer
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    model.compute_loss(**batch(model.llm, (1, 9, 4), (0, 12, 3)))["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if p.requires_grad)
    # Adapters and nothing else, as without quantisation.
    assert set(model.state_dict()) == set(build(student, lora=LORA).state_dict())


@pytest.mark.parametrize("options, tolerance", [(FOUR, 0.5), (EIGHT, 0.1)])
def test_losses_are_near_those_of_whole_weights(build, student, batch, options, tolerance):
    whole, small = build(student, lora=LORA).eval(), build(student, lora=LORA, quantization=options).eval()
    data = batch(whole.llm, (1, 9, 4), (0, 12, 3))
    expected, found = (model.compute_loss(**data)["loss"].item() for model in (whole, small))
    assert found != expected and found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("options", [FOUR, EIGHT])
def test_dequantised_layers_compute_the_same(build, student, batch, options):
    model = build(student, freeze=dict(language=True, mixers=True), quantization=options).eval()
    data = batch(model.llm, (1, 9, 4), (0, 12, 3))
    before = model.compute_loss(**data)["loss"].item()
    dequantise(model.llm)
    assert not any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    # 8-bit layers round their inputs too.
    assert model.compute_loss(**data)["loss"].item() == pytest.approx(before, rel=1e-5 if options["bits"] == 4 else 0.1)


def test_gradient_checkpointing_goes_with_it(build, student, batch):
    losses = []
    for checkpointing in (False, True):
        options = dict(lora=LORA, quantization=FOUR, use_activation_checkpointing=checkpointing)
        model = build(student, **options).train()
        loss = model.compute_loss(**batch(model.llm, (1, 9, 4), (0, 12, 3)))["loss"]
        loss.backward()
        losses.append((loss.item(), sum(p.grad.norm().item() for p in model.parameters() if p.requires_grad)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(quantization=True), "model.quantization is True, expected a dict"),
        (dict(quantization=dict(bits=3)), "model.quantization.bits is 3, expected 4 or 8"),
        (dict(quantization=dict(type="int4")), "model.quantization.type is 'int4'"),
        (dict(quantization=dict(nf4=True)), "unknown key model.quantization.nf4"),
        (dict(freeze=dict(vision=True), quantization=FOUR), "the decoder has no frozen linear layer"),
    ],
)
def test_mistakes_are_named(build, student, options, message):
    with pytest.raises(UserError, match=message):
        build(student, **{"lora": None, **options, **({} if "freeze" in options else dict(lora=LORA))})
