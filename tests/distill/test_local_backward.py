"""Gradients computed early are the gradients."""

import gc
import weakref

import torch
from torch import nn

from xtuner_ext.distill.local_backward import local_backward


def layers():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


def losses(model, x, early):
    for layer in model:
        if early:
            yield local_backward(lambda layer=layer: (layer(x).sin().square().mean(), None), list(layer.parameters()))[0]
        else:
            yield layer(x).sin().square().mean()


def test_gradients_and_loss_equal_those_of_one_backward_pass():
    model, x = layers(), torch.randn(4, 8)
    expected = 1000 * torch.stack(list(losses(model, x, early=False))).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = 1000 * torch.stack(list(losses(model, x, early=True))).mean()
    loss.backward()
    assert torch.equal(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4)


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
