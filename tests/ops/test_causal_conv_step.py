"""One token at a time against the convolution."""

import importlib.util

import pytest
import torch

from tests.ops.test_causal_conv import WIDTHS, make_inputs
from xtuner_ext.ops.causal_conv import causal_conv
from xtuner_ext.ops.causal_conv_step import causal_conv_step


def walk(arguments, **options):
    """y of all tokens and the last state, by steps."""
    x, weight, bias, state = (arguments[name] for name in ("x", "weight", "bias", "initial_state"))
    outputs = []
    for t in range(x.shape[1]):
        y, state = causal_conv_step(x[:, t], weight, bias, state=state, **options)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
def test_steps_equal_the_convolution_with_its_gradients(width, activation):
    arguments = make_inputs(6, width)
    whole, end = causal_conv(**arguments, activation=activation, return_final_state=True)
    y, state = walk(arguments, activation=activation)
    torch.testing.assert_close(y, whole)
    assert torch.equal(state, end)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((out * weights).sum(), list(arguments.values())) for out in (y, whole)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("in_place", [False, True], ids=["new state", "in place"])
@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
def test_a_state_is_written_over_on_request_only(width, in_place):
    arguments = {name: value.detach() for name, value in make_inputs(6, width).items()}
    given = arguments["initial_state"]
    before = given.clone()
    whole, end = causal_conv(**arguments, return_final_state=True)
    y, state = walk(arguments, in_place=in_place)
    torch.testing.assert_close(y, whole)
    assert torch.equal(state, end)
    assert (state is given) == in_place and torch.equal(given, before) != in_place


def test_a_state_that_trains_is_not_written_over():
    with pytest.raises(ValueError, match="cannot be written over in training"):
        walk(make_inputs(1, 4), in_place=True)


MISSING = "" if torch.cuda.is_available() and importlib.util.find_spec("triton") else "no CUDA device with triton"


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
def test_the_kernel_equals_torch(width, dtype):
    arguments = {name: value.detach().cuda().to(dtype) for name, value in make_inputs(6, width, channels=300).items()}
    expected, found = walk(arguments, backend="torch"), walk(arguments, backend="triton", in_place=True)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).float().norm() / theirs.float().norm() < (1e-5 if dtype == torch.float32 else 1e-2)
