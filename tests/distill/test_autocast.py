"""Mixed precision: products in bf16, weights, gradients and updates in fp32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.hovle import hovle_config, random_hovle_checkpoint
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
STAGES = {
    "stage1": dict(stage=1),
    "stage2": dict(stage=2),
    "stage3": dict(stage=3, attention_layers=[0]),
    "all": dict(stage=3, attention_layers=[0], trainable="all"),
}


class Products(TorchDispatchMode):
    """Collects the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.dtypes.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle")
    random_hovle_checkpoint(folder, hovle_config(), seed=3)
    return folder


def build(teacher, dtype="bfloat16", **options):
    return DistillModel(
        llm=dict(type=load_teacher, pretrained_model_name_or_path=str(teacher), dtype=dtype),
        mixer=dict(qk_norm="l2", use_rope=True, window=4, sink=True),
        alignment=dict(scale=1.0, normalise=False),
        trainable_dtype="float32",
        **options,
    )


def batch(rows, seed=0):
    """Rows of 12 tokens, the last 6 of them supervised; each has one tile."""
    generator = torch.Generator().manual_seed(seed)
    image = hovle_config()["embedding_config"]["img_context_token_id"]
    ids = torch.randint(3, image, (rows, 12), generator=generator)
    ids[:, 1:5] = image
    labels = ids.clone()
    labels[:, :6] = -100
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def wrapper_of(model, **options):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapper = Bfloat16OptimWrapper(torch.optim.SGD(trained, lr=1.0), **options)
    wrapper.initialize_count_status(model, 0, options.get("accumulative_counts", 1))
    return wrapper


def test_products_are_in_bf16_and_weights_and_gradients_stay_fp32():
    model = torch.nn.Linear(8, 4)
    wrapper = wrapper_of(model)
    with wrapper.optim_context(model), Products() as products:
        output = model(torch.randn(3, 8))
    assert output.dtype == torch.bfloat16 and products.dtypes == {torch.bfloat16}
    output.float().square().mean().backward()
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32
    assert model(torch.randn(3, 8)).dtype == torch.float32


@pytest.mark.parametrize("options", STAGES.values(), ids=STAGES)
def test_every_stage_trains_a_step_beside_a_bf16_teacher(teacher, options):
    model = build(teacher, **options)
    wrapper, data = wrapper_of(model), batch(2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with wrapper.optim_context(model), Products() as products:
        losses = model(data, mode="loss")
    assert products.dtypes == {torch.bfloat16}
    losses["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    wrapper.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and moved <= trained


@pytest.mark.parametrize("options", STAGES.values(), ids=STAGES)
def test_losses_are_those_of_fp32_but_for_rounding(teacher, options):
    exact = build(teacher, dtype="float32", **options)
    expected = exact(batch(2), mode="loss")["loss"]
    rounded = build(teacher, **options)
    with wrapper_of(rounded).optim_context(rounded):
        found = rounded(batch(2), mode="loss")["loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("options", STAGES.values(), ids=STAGES)
def test_two_accumulated_batches_move_the_weights_as_one_of_twice_the_size(teacher, options):
    whole, updates = batch(4), []
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(0, 2), slice(2, 4))]
    for batches in ([whole], halves):
        model = build(teacher, **options)
        wrapper = wrapper_of(model, accumulative_counts=len(batches))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for data in batches:
            model.train_step({"data": data, "data_samples": None}, wrapper)
        updates.append({name: dict(model.named_parameters())[name].detach() - before[name] for name in before})
    one, two = (torch.cat([update.flatten() for update in found.values()]) for found in updates)
    assert one.norm() > 0 and (one - two).norm() < 0.03 * one.norm()
