"""One token at a time against the scan."""

import importlib.util

import pytest
import torch

from tests.ops.test_ssd import Q, assert_same, chunked, make_inputs
from xtuner_ext.ops.ssd_step import ssd_step


def walk(arguments, **options):
    """y of all tokens and the last state, by steps."""
    x, dt, B, C = (arguments[name] for name in ("x", "dt", "B", "C"))
    state, outputs = arguments["initial_state"], []
    for t in range(x.shape[1]):
        shared = dict(dt_bias=arguments["dt_bias"], state=state, **options)
        y, state = ssd_step(x[:, t], dt[:, t], arguments["A"], B[:, t], C[:, t], **shared)
        outputs.append(y)
    return {"y": torch.stack(outputs, 1), "state": state}


@pytest.mark.parametrize("in_place", [False, True], ids=["new state", "in place"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups{}".format)
def test_steps_equal_the_scan(groups, in_place):
    arguments = {name: value.detach() for name, value in make_inputs(Q + 3, groups=groups).items()}
    whole, end = chunked(**arguments, chunk_size=Q)
    given = arguments["initial_state"]
    before = given.clone()
    found = walk(arguments, in_place=in_place)
    assert_same(found, {"y": whole, "state": end})
    assert found["state"].dtype == torch.float32
    assert (found["state"] is given) == in_place and torch.equal(given, before) != in_place


def test_steps_have_the_gradients_of_the_scan():
    arguments = make_inputs(Q + 3, groups=2)
    whole, end = chunked(**arguments, chunk_size=Q)
    found = walk(arguments)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2))
    leaves = list(arguments.values())
    ours = torch.autograd.grad((found["y"] * weights).sum() + found["state"].sum(), leaves)
    theirs = torch.autograd.grad((whole * weights).sum() + end.sum(), leaves)
    assert_same(dict(zip(arguments, ours)), dict(zip(arguments, theirs)))


def test_a_state_that_trains_or_is_not_fp32_is_not_written_over():
    arguments = {name: value.detach() for name, value in make_inputs(1).items()}
    message = "only a contiguous fp32 state outside of training can be written over"
    for state in (arguments["initial_state"].clone().requires_grad_(), arguments["initial_state"].double()):
        with pytest.raises(ValueError, match=message):
            walk({**arguments, "initial_state": state}, in_place=True)


def test_inference_mode_and_mixed_precision_change_nothing():
    arguments = {name: value.detach() for name, value in make_inputs(3, groups=2).items()}
    expected = walk(arguments)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = walk(arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


MISSING = "" if torch.cuda.is_available() and importlib.util.find_spec("triton") else "no CUDA device with triton"


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width, state", [(64, 128), (128, 128), (24, 40)], ids=str)
def test_the_kernel_equals_torch(dtype, width, state):
    arguments = make_inputs(3, groups=2, width=width, state=state)
    arguments = {
        name: value.detach().cuda().to(dtype if name in ("x", "B", "C") else torch.float32)
        for name, value in arguments.items()
    }
    expected, found = walk(arguments, backend="torch"), walk(arguments, backend="triton")
    for name in expected:
        error = (found[name].float() - expected[name].float()).norm() / expected[name].float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{name} is off by {error:.2g}"


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing")
def test_a_cuda_graph_replays_the_step():
    arguments = {name: value.detach().cuda() for name, value in make_inputs(1, width=64, state=64).items()}
    x, dt, B, C = (arguments[name][:, 0] for name in ("x", "dt", "B", "C"))
    state = arguments["initial_state"].clone()

    def step(state):
        return ssd_step(x, dt, arguments["A"], B, C, dt_bias=arguments["dt_bias"], state=state, in_place=True)[0]

    expected_state = state.clone()
    expected = [step(expected_state).clone() for _ in range(3)]
    step(state.clone())
    graph = torch.cuda.CUDAGraph()
    kept = state.clone()
    with torch.cuda.graph(graph):
        y = step(state)
    state.copy_(kept)
    for wanted in expected:
        graph.replay()
        torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, expected_state)
