"""Packed rows give the loss and the gradients of their samples alone."""

import pytest
import torch

from xtuner_ext.convert import load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.distill import DistillModel
from xtuner_ext.finetune import SupervisedModel

# Shorter than every sample, so that sink and state matter.
WINDOWED = dict(qk_norm="l2", use_rope=True, window=4, sink=True, chunk_size=16)
MODELS = {
    "stage1": dict(stage=1),
    "stage1-windowed": dict(stage=1, mixer=WINDOWED, alignment=dict(scale=1.0, normalise=True)),
    "stage2": dict(stage=2, mixer=WINDOWED),
    "stage2-projections": dict(stage=2, trainable="projections", alignment=dict(after_projection=True)),
    "stage3-mixers": dict(stage=3, mixer=WINDOWED),
    "stage3-hybrid": dict(
        stage=3, attention_layers=[1], divergence=dict(tokens="all", reduction="batchmean", chunk_rows=7)
    ),
    "stage3-all": dict(stage=3, trainable="all", mixer=WINDOWED, divergence=dict(direction="js")),
    "supervised": dict(),
}


@pytest.fixture(scope="module")
def batches(digits, digits_processor):
    """Nine samples, with images and without, alone and as a few rows of unequal lengths."""
    dataset = ConversationDataset(str(digits / "train.json"), digits_processor, "internlm2_chat", max_length=512)
    dataset.index = dataset.index[:9]
    packed = PackedDataset(dataset, 300)
    rows = [packed[row] for row in range(len(packed))]
    assert 1 < len(rows) < 5 and len({len(row["input_ids"]) for row in rows}) > 1
    single = conversation_collate([dataset[index] for index in range(9)])["data"]
    return single, conversation_collate(rows)["data"]


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request, tiny_teacher):
    llm = dict(type=load_teacher, pretrained_model_name_or_path=str(tiny_teacher), dtype="float32")
    model = DistillModel(llm=llm, **request.param) if request.param else SupervisedModel(llm=llm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Away from the seeded weights, among which a sink, for one, is zero.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def measure(model, data):
    model.zero_grad()
    losses = model.compute_loss(**data)
    losses["loss"].backward()
    return {key: value.detach() for key, value in losses.items()}, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_packed_rows_give_the_samples_own_loss_and_gradients(model, batches):
    single, packed = batches
    assert single["attention_mask"].sum() == packed["attention_mask"].sum()
    expected, gradients = measure(model, single)
    found, packed_gradients = measure(model, packed)
    assert found.keys() == expected.keys() and packed_gradients.keys() == gradients.keys()
    for key, value in expected.items():
        assert torch.isclose(found[key], value, rtol=1e-5), key
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 and torch.isfinite(packed_gradients[name]).all(), name
        assert (packed_gradients[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


def test_without_segments_the_samples_would_see_each_other(model, batches):
    single, packed = batches
    loss = model.compute_loss(**single)["loss"]
    leaking = model.compute_loss(**{key: value for key, value in packed.items() if key != "segment_ids"})["loss"]
    assert not torch.isclose(leaking, loss, rtol=1e-3)
