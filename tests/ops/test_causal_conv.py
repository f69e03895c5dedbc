"""The convolution against the tap-by-tap one."""

import importlib.util
import sys

import pytest
import torch

from tests.reference.ssd import naive_causal_conv
from xtuner_ext.ops import causal_conv_kernels, causal_conv_torch
from xtuner_ext.ops.causal_conv import causal_conv
from xtuner_ext.ops.causal_conv_torch import torch_conv

CHANNELS = 5
WIDTHS = (2, 4)


def make_inputs(length, width, batch=2, channels=CHANNELS):
    """Random arguments by name, leaves that take gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, channels, width - 1),
    }
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def assert_same_with_gradients(arguments, activation="silu", tolerance=1e-5, **options):
    """Compare outputs and every gradient with the tap-by-tap convolution in fp64."""
    exact = {name: value.detach().double().requires_grad_() for name, value in arguments.items()}
    ours = causal_conv(**arguments, activation=activation, **options)
    options.pop("backend", None)
    theirs = naive_causal_conv(**exact, activation=activation, **options)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(theirs.device)
    found = torch.autograd.grad((ours * weights).sum(), list(arguments.values()), allow_unused=True)
    expected = torch.autograd.grad((theirs * weights).sum(), list(exact.values()), allow_unused=True)
    for name, value, target in zip(arguments, found, expected):
        value = torch.zeros_like(target) if value is None else value.double()
        error = (value - target).abs().max() / target.abs().max().clamp(min=1)
        assert error < 10 * tolerance, f"gradient of {name} is off by {error:.2g}"


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9], ids="length{}".format)
def test_equals_the_sum_over_taps_with_every_gradient(length, width, activation):
    """Also for sequences shorter than the kernel."""
    assert_same_with_gradients(make_inputs(length, width), activation)


@pytest.mark.parametrize("missing", ["bias", "initial_state"])
@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
def test_optional_arguments_may_be_absent(width, missing):
    arguments = make_inputs(6, width)
    del arguments[missing]
    assert_same_with_gradients(arguments)


@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
@pytest.mark.parametrize(
    "ids",
    [[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 3, 3, 3, 3, 3], [0, 0, 1, 0, 0, 1, 1, 0]],
    ids=["three segments", "single tokens", "one segment", "ids come back"],
)
def test_taps_do_not_cross_segments(ids, width):
    ids = torch.tensor([ids, ids[:1] * 3 + [9] * 5])
    assert_same_with_gradients(make_inputs(8, width), segment_ids=ids)


@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
def test_packed_equals_separate(width):
    lengths = [3, 1, 5]
    arguments = make_inputs(sum(lengths), width, batch=1)
    del arguments["initial_state"]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = causal_conv(**arguments, segment_ids=ids)
    x = arguments.pop("x")
    separate = torch.cat([causal_conv(part, **arguments) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("width", WIDTHS, ids="width{}".format)
@pytest.mark.parametrize("cut", [1, 2, 5], ids="cut{}".format)
def test_split_equals_whole_when_the_state_is_handed_on(cut, width):
    arguments = make_inputs(7, width)
    whole, end = causal_conv(**arguments, return_final_state=True)
    x, state, outputs = arguments.pop("x"), arguments.pop("initial_state"), []
    for part in (x[:, :cut], x[:, cut:]):
        y, state = causal_conv(part, **arguments, initial_state=state, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert torch.equal(state, end) and torch.equal(end, x[:, -(width - 1) :].transpose(1, 2))


def test_state_of_a_short_sequence_is_filled_with_zeros():
    arguments = make_inputs(1, 4)
    del arguments["initial_state"]
    _, state = causal_conv(**arguments, return_final_state=True)
    assert torch.equal(state[..., :2], torch.zeros(2, CHANNELS, 2))
    assert torch.equal(state[..., 2], arguments["x"][:, 0])


def test_bf16_stays_close_to_fp32():
    arguments = make_inputs(9, 4)
    exact = causal_conv(**arguments)
    half = causal_conv(**{name: value.bfloat16() for name, value in arguments.items()})
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(
    "option, message",
    [
        ({"activation": "gelu"}, "unknown activation 'gelu' of causal_conv, expected 'silu' or None"),
        ({"backend": "triton"}, "backend 'triton', expected one of auto, tune, torch, native, cuda, fla"),
        ({"backend": "cuda"}, "takes kernels of 2 to 4 taps and a number of channels that 8 divides, not 2 taps"),
    ],
    ids=["activation", "backend", "cuda with odd channels"],
)
def test_what_cannot_be_done_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(**make_inputs(4, 2), **option)


def test_cpu_needs_no_cuda_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    arguments = make_inputs(4, 2)
    assert torch.equal(causal_conv(**arguments), causal_conv(**arguments, backend="torch"))


@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("tokens", [5, 12, 25], ids="most{}".format)
def test_pieces_of_what_is_too_large_give_the_whole(tokens, packed, monkeypatch):
    monkeypatch.setattr(causal_conv_kernels, "INT32_ELEMENTS", tokens * CHANNELS)
    arguments = make_inputs(11, 4, batch=3)
    ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 3 + [1] * 8, [0] * 9 + [1, 2]]) if packed else None
    whole = torch_conv(**arguments, activation="silu", segment_ids=ids)
    order = ("x", "weight", "bias")
    sizes = []

    def convolve(x, *others):
        sizes.append(x.shape[0] * x.shape[1])
        return torch_conv(x, *others)

    parts = causal_conv_kernels.in_pieces(
        convolve, *(arguments[name] for name in order), "silu", ids, arguments["initial_state"]
    )
    torch.testing.assert_close(parts, whole)
    assert len(sizes) > 1 and max(sizes) <= tokens
    gradients = [torch.autograd.grad(y.square().sum(), list(arguments.values())) for y in (parts, whole)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
def test_blocks_of_a_few_tokens_give_the_whole(packed, monkeypatch):
    """Also blocks shorter than the kernel."""
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [1]]) if packed else None
    for block in (1, 2, 5):
        monkeypatch.setattr(causal_conv_torch, "BLOCK", block * 2 * CHANNELS)
        assert_same_with_gradients(make_inputs(9, 4), segment_ids=ids)


def _missing(package):
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def _backend(name, package):
    reason = _missing(package)
    return pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)], id=name)


@pytest.mark.parametrize("backend", [_backend("cuda", "causal_conv1d"), _backend("fla", "fla")])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
def test_kernels_equal_the_sum_over_taps_with_every_gradient(packed, state, backend):
    arguments = make_inputs(64, 4, channels=64)
    if not state:
        del arguments["initial_state"]
    arguments = {name: value.detach().cuda().requires_grad_() for name, value in arguments.items()}
    ids = torch.repeat_interleave(torch.arange(4), 16).expand(2, -1).cuda() if packed else None
    assert_same_with_gradients(arguments, segment_ids=ids, backend=backend, tolerance=1e-3)


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)], ids=["no rows", "no tokens"])
def test_nothing_leaves_the_state_as_it_was(batch, length):
    x, state = torch.ones(batch, length, 6, requires_grad=True), torch.ones(batch, 6, 3, requires_grad=True)
    ids = torch.zeros(batch, length, dtype=torch.int32)
    options = dict(segment_ids=ids, initial_state=state, return_final_state=True)
    y, final = causal_conv(x, torch.ones(6, 4), **options)
    assert y.shape == x.shape and final.shape == state.shape and (length or torch.equal(final, state))
    assert [t.shape for t in torch.autograd.grad(y.sum() + final.sum(), [x, state])] == [x.shape, state.shape]
