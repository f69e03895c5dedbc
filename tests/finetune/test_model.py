"""The loss of supervised fine-tuning and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub

from xtuner_ext.convert import load_teacher
from xtuner_ext.errors import UserError
from xtuner_ext.finetune.model import REDUCTIONS, SupervisedModel

LORA = dict(language=dict(r=4), mixers=dict(r=4), vision=dict(r=4), dropout=0.0)
# Tiles, text tokens, trained tokens.
SAMPLES = [(1, 11, 5), (0, 17, 9), (2, 9, 2), (0, 6, 1)]


def gradients(model, *batches, step=True):
    """Loss of one optimizer step, as means over its iterations, and its gradients."""
    model.train().zero_grad()
    if step:
        model.begin_step([{"data": data} for data in batches])
    total = 0
    for data in batches:
        loss = model.parse_losses(model.compute_loss(**data))[0] / len(batches)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-3, atol=1e-5, msg=name)


def packed(data):
    """The batch's rows behind one another in one, as PackedDataset gives them."""
    real = data["attention_mask"].bool()
    labels = data["labels"].clone()
    labels[:, 0] = -100
    segments = torch.arange(len(real))[:, None].expand_as(real)
    return {
        "input_ids": data["input_ids"][real][None],
        "labels": labels[real][None],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
        "segment_ids": segments[real][None],
        "pixel_values": data["pixel_values"],
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tokens_weigh_what_internvl_gives_them(build, student, batch, reduction):
    """sum(loss * w) / sum(w), with w of 1, 1/n and 1/sqrt(n) in a sample of n trained tokens."""
    model = build(student, lora=LORA, loss_reduction=reduction).eval()
    data = batch(model.llm, *SAMPLES)
    logits = model.llm(**{key: value for key, value in data.items() if key != "labels"}).logits
    total = weight = 0
    for row, labels in zip(logits, data["labels"]):
        trained = (labels != -100).sum().item()
        w = {"token": 1.0, "sample": 1 / trained, "square": trained**-0.5}[reduction]
        total += w * F.cross_entropy(row[:-1], labels[1:], reduction="sum")
        weight += w * trained
    assert model.compute_loss(**data)["loss"].item() == pytest.approx((total / weight).item(), rel=1e-5)


def test_of_all_tokens_alike_it_is_transformers_loss(build, student, batch):
    model = build(student).eval()
    data = batch(model.llm, *SAMPLES)
    assert model.compute_loss(**data)["loss"].item() == pytest.approx(model.llm(**data).loss.item(), rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(build, student, batch, reduction):
    model = build(student, lora=LORA, loss_reduction=reduction)
    data = batch(model.llm, *SAMPLES)
    assert_same(gradients(model, data), gradients(model, packed(data)))


def test_a_packed_samples_first_token_is_not_foretold_by_the_sample_before(build, student, batch):
    """Even where the dataset's labels would train it."""
    model = build(student, lora=LORA)
    data = packed(batch(model.llm, (0, 8, 8), (0, 9, 9)))
    marked = {**data, "labels": data["input_ids"]}
    assert_same(gradients(model, data), gradients(model, marked))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 2, 1], [0]]])
def test_a_step_of_several_iterations_is_one_of_one(build, student, batch, reduction, parts):
    """However many samples and trained tokens each iteration has."""
    model = build(student, lora=LORA, loss_reduction=reduction)
    order = [index for part in parts for index in part]
    # Drawn one by one, so that every sample is the same in all batches.
    singles = [batch(model.llm, SAMPLES[index], seed=index) for index in range(4)]

    def join(indices):
        pad = torch.nn.utils.rnn.pad_sequence
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        chosen = [singles[index] for index in indices]
        rows = {k: pad([c[k][0] for c in chosen], batch_first=True, padding_value=v) for k, v in fill.items()}
        return {**rows, "pixel_values": torch.cat([c["pixel_values"] for c in chosen])}

    assert_same(gradients(model, *map(join, parts)), gradients(model, join(order)))


def test_gradient_checkpointing_changes_nothing(build, student, batch):
    model = build(student, lora=LORA)
    data = batch(model.llm, *SAMPLES)
    expected = gradients(model, data)
    assert_same(expected, gradients(build(student, lora=LORA, use_activation_checkpointing=True), data))


def test_a_batch_with_nothing_trained_moves_nothing(build, student, batch):
    model = build(student, lora=LORA)
    data = batch(model.llm, *SAMPLES)
    for step in (True, False):
        empty = {**data, "labels": torch.full_like(data["labels"], -100)}
        loss, found = gradients(model, empty, step=step)
        assert loss == 0 and all(gradient.abs().max() == 0 for gradient in found.values())
    # Beside another it leaves that one's mean alone.
    one, other = gradients(model, data, empty), gradients(model, data)
    assert_same(one, other)


def test_a_loss_that_is_no_number_stops_the_run(build, student, batch):
    model = build(student, lora=LORA).train()
    with torch.no_grad():
        model.llm.model.norm.weight.fill_(float("nan"))
    MessageHub.get_current_instance().update_info("iter", 4)
    with pytest.raises(UserError, match="the loss is nan at iteration 5"):
        model.parse_losses(model.compute_loss(**batch(model.llm, *SAMPLES)))


def test_only_the_decoders_frozen_weights_stay_behind(build, student):
    model = build(student, lora=LORA, freeze=dict(projector=False))
    state = model.state_dict()
    assert all(".lora_" in name or name.startswith("llm.vision.projector.") for name in state)
    again = build(student, move=0.0, lora=LORA, freeze=dict(projector=False))
    assert not again.load_state_dict(state, strict=False).missing_keys
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())


def test_describe_can_be_kept_in_a_checkpoint(build, student, tmp_path):
    from mmengine.config import ConfigDict

    model = build(student, lora=ConfigDict(LORA), quantization=ConfigDict(bits=4))
    torch.save(model.describe(), tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True)["lora"]["mixers"] == {"r": 4}


@pytest.mark.parametrize("freeze", [dict(vision=False), dict(unfreeze_vit_layers=1), dict(projector=False, head=False)])
def test_parts_train_in_fp32_beside_frozen_bf16_ones(student, batch, freeze):
    llm = dict(type=load_teacher, pretrained_model_name_or_path=str(student), dtype="bfloat16")
    model = SupervisedModel(llm=llm, lora=dict(language=dict(r=4)), freeze=freeze, trainable_dtype="float32").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.compute_loss(**batch(model.llm, (1, 9, 4), (0, 12, 3)))["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad and ".lora_A." not in n)
