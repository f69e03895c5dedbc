"""Gradients computed early are the gradients."""

import gc
import weakref

import pytest
import torch
from torch import nn

from xtuner_ext.distill.local_backward import local_backward


def layers():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


def losses(model, x, early):
    for layer in model:
        if early:
            compute = lambda layer=layer: (layer(x).sin().float().square().mean() / 3, None)  # noqa: E731
            yield local_backward(compute, list(layer.parameters()))[0]
        else:
            yield layer(x).sin().float().square().mean() / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_and_loss_equal_those_of_one_backward_pass(dtype):
    model, x = layers().to(dtype), torch.randn(4, 8, dtype=dtype)
    expected = torch.stack(list(losses(model, x, early=False))).sum() / 8
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = torch.stack(list(losses(model, x, early=True))).sum() / 8
    loss.backward()
    assert torch.equal(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients):
        assert torch.equal(parameter.grad, gradient) and parameter.grad.dtype == dtype


def test_a_factor_is_not_rounded_to_the_gradients_precision():
    model, x = layers().to(torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    exact = torch.autograd.grad(torch.stack(list(losses(model, x, early=True))).sum(), list(model.parameters()))
    (torch.stack(list(losses(model, x, early=True))).sum() * 1.003).backward()
    for parameter, gradient in zip(model.parameters(), exact):
        assert torch.equal(parameter.grad, (gradient.float() * 1.003).bfloat16())


def test_activations_are_gone_before_the_next_layer():
    layer, kept = nn.Linear(8, 8), []

    def compute():
        hidden = layer(torch.randn(4, 8)).sin()
        kept.append(weakref.ref(hidden))
        return hidden.square().mean(), None

    loss, _ = local_backward(compute, list(layer.parameters()))
    gc.collect()
    assert kept[0]() is None and loss.requires_grad


def test_without_gradients_only_the_loss_is_computed():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        loss, value = local_backward(lambda: (layer(torch.ones(1, 8)).mean(), "seen"), list(layer.parameters()))
    assert not loss.requires_grad and value == "seen"
