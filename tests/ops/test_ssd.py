"""The chunked scan against the token-by-token recurrence."""

import importlib.util
import sys

import pytest
import torch

from tests.reference.ssd import naive_ssd
from xtuner_ext.ops import ssd_kernels
from xtuner_ext.ops.ssd import ssd
from xtuner_ext.ops.ssd_step import ssd_step
from xtuner_ext.ops.ssd_torch import torch_ssd

Q = 8
LENGTHS = (1, Q - 1, Q, Q + 1, 3 * Q + 5)
CUDA_PACKAGES = ("mamba_ssm", "causal_conv1d", "flash_attn", "fla", "triton")


def make_inputs(length, batch=2, heads=4, groups=4, width=3, state=5, seed=0):
    """Random arguments of ssd by name, leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    values = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, state),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def run(operation, arguments, **options):
    """Outputs by name, and the gradient of a random weighting of them for every argument."""
    y, state = operation(**arguments, **options)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for value in (y, state):
        loss = loss + (value.double().cpu() * torch.randn(value.shape, generator=generator)).sum()
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names])
    return {"y": y, "state": state, **{f"gradient of {n}": g for n, g in zip(names, gradients)}}


def chunked(**arguments):
    return ssd(**arguments, return_final_state=True)


def truth(**arguments):
    return naive_ssd(**arguments, dtype=torch.float64)


def assert_same(ours, theirs, tolerance=1e-4):
    """Compare by name; the tolerance is relative to the largest value."""
    for name, expected in theirs.items():
        value, expected = ours[name].detach().double().cpu(), expected.detach().double().cpu()
        assert value.shape == expected.shape, name
        error = ((value - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        assert error < tolerance, f"{name} is off by {error:.2g} of its largest value"


@pytest.mark.parametrize("chunk_size", [1, Q, 64], ids="chunk{}".format)
@pytest.mark.parametrize("length", LENGTHS, ids="length{}".format)
def test_equals_the_recurrence_with_every_gradient(length, chunk_size):
    arguments = make_inputs(length)
    assert_same(run(chunked, arguments, chunk_size=chunk_size), run(truth, arguments))


@pytest.mark.parametrize("missing", ["dt_bias", "initial_state"])
def test_optional_arguments_may_be_absent(missing):
    arguments = make_inputs(Q + 3)
    del arguments[missing]
    assert_same(run(chunked, arguments, chunk_size=Q), run(truth, arguments))


@pytest.mark.parametrize("groups", [1, 2], ids="groups{}".format)
def test_heads_share_the_B_and_C_of_their_group(groups):
    arguments = make_inputs(2 * Q + 1, groups=groups)
    assert_same(run(chunked, arguments, chunk_size=Q), run(truth, arguments))


@pytest.mark.parametrize("groups", [(2, 4), (4, 2), (1, 6), (2, 3), (3, 1)], ids="{0[0]} and {0[1]}".format)
def test_B_and_C_may_differ_in_groups(groups):
    heads = 4 if 4 in groups else 6
    arguments = make_inputs(Q + 3, heads=heads, groups=heads)
    for name, count in zip("BC", groups):
        arguments[name] = arguments[name].detach()[:, :, :count].requires_grad_()
    ids = torch.tensor([[0] * 5 + [1] * (Q - 2), [0] * (Q + 1) + [1] * 2])
    alone = {name: value.detach() for name, value in arguments.items()}
    alone.update({name: alone[name].repeat_interleave(heads // count, 2) for name, count in zip("BC", groups)})
    alone = {name: value.requires_grad_() for name, value in alone.items()}
    expected = run(truth, alone, segment_ids=ids)
    for name, count in zip("BC", groups):
        gradient = f"gradient of {name}"
        expected[gradient] = expected[gradient].unflatten(2, (count, -1)).sum(3)
    assert_same(run(chunked, arguments, chunk_size=Q, segment_ids=ids), expected)


SEGMENTS = {
    "inside a chunk": [5, 2 * Q - 5],
    "at the chunk border": [Q, Q],
    "around the chunk border": [Q - 1, 2, Q - 1],
    "several in one chunk": [1, 2, 1, 1, 3, Q, 1],
    "longer than chunks": [2 * Q + 3, 1, Q + 2],
}


@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_packed_equals_separate(lengths):
    arguments = make_inputs(sum(lengths), batch=1)
    del arguments["initial_state"]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed, last = chunked(**arguments, chunk_size=Q, segment_ids=ids)
    parts = zip(*(arguments[name].split(lengths, dim=1) for name in ("x", "dt", "B", "C")))
    for index, (x, dt, B, C) in enumerate(parts):
        y, state = chunked(x=x, dt=dt, A=arguments["A"], B=B, C=C, dt_bias=arguments["dt_bias"], chunk_size=Q)
        assert_same({"y": packed.split(lengths, dim=1)[index]}, {"y": y})
    assert_same({"state": last}, {"state": state})


@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_packed_equals_the_recurrence_with_every_gradient(lengths):
    """Rows have different borders, and the initial state belongs to the first segment only."""
    arguments = make_inputs(sum(lengths))
    names = torch.arange(len(lengths))
    ids = torch.stack([names.repeat_interleave(torch.tensor(order)) for order in (lengths, lengths[::-1])])
    ours = run(chunked, arguments, chunk_size=Q, segment_ids=ids)
    assert_same(ours, run(truth, arguments, segment_ids=ids))


def test_an_id_that_comes_back_starts_a_new_segment():
    arguments = make_inputs(2 * Q, batch=1)
    ids = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 2]])
    ours = run(chunked, arguments, chunk_size=Q, segment_ids=ids)
    assert_same(ours, run(truth, arguments, segment_ids=ids))


@pytest.mark.parametrize("cut", [1, Q - 1, Q, 2 * Q + 3], ids="cut{}".format)
def test_split_equals_whole_when_the_state_is_handed_on(cut):
    arguments = make_inputs(3 * Q)
    whole, end = chunked(**arguments, chunk_size=Q)
    state, outputs = arguments.pop("initial_state"), []
    sequences = {name: arguments.pop(name) for name in ("x", "dt", "B", "C")}
    for part in (slice(None, cut), slice(cut, None)):
        piece = {name: value[:, part] for name, value in sequences.items()}
        y, state = chunked(**piece, **arguments, initial_state=state, chunk_size=Q)
        outputs.append(y)
    assert_same({"y": torch.cat(outputs, 1), "state": state}, {"y": whole, "state": end})


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_minus_infinity_in_dt_skips_a_token(side):
    """Skipped tokens change neither the state nor any gradient, in the scan and in the step."""
    arguments = make_inputs(Q + 2)
    bare, end = chunked(**arguments, chunk_size=Q)
    left, right = {"left": (Q + 1, 0), "right": (0, Q + 1), "both": (3, Q)}[side]
    padded = dict(arguments)
    for name, fill in (("x", 7.0), ("B", 7.0), ("C", 7.0), ("dt", -torch.inf)):
        value = arguments[name]
        around = [torch.full((len(value), n, *value.shape[2:]), fill) for n in (left, right)]
        padded[name] = torch.cat([around[0], value, around[1]], dim=1)
    y, state = chunked(**padded, chunk_size=Q)
    assert_same({"y": y[:, left : left + Q + 2], "state": state}, {"y": bare, "state": end})
    ours = torch.autograd.grad(state.sum(), list(arguments.values()), allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(end.sum(), list(arguments.values()), allow_unused=True)
    for name, value, expected in zip(arguments, ours, theirs):
        if expected is not None:
            assert_same({f"gradient of {name}": value}, {f"gradient of {name}": expected})
    skip = torch.full_like(arguments["dt"][:, 0], -torch.inf)
    x, A, B, C = (arguments[name] for name in ("x", "A", "B", "C"))
    _, after = ssd_step(x[:, 0], skip, A, B[:, 0], C[:, 0], dt_bias=arguments["dt_bias"], state=state)
    assert torch.equal(after, state)


def test_only_skipped_tokens_return_the_initial_state_and_finite_gradients():
    arguments = make_inputs(Q + 1)
    arguments["dt"] = torch.full_like(arguments["dt"], -torch.inf).requires_grad_()
    result = run(chunked, arguments, chunk_size=Q)
    assert torch.equal(result["state"], arguments["initial_state"])
    for name, value in result.items():
        assert value.isfinite().all(), name


def test_bf16_stays_close_to_fp32():
    arguments = make_inputs(3 * Q + 5, width=16, state=16)
    exact = run(truth, arguments)
    half = {
        name: value.detach().bfloat16().requires_grad_() if name in ("x", "dt", "B", "C") else value
        for name, value in arguments.items()
    }
    result = run(chunked, half, chunk_size=Q)
    assert result["y"].dtype == torch.bfloat16 and result["state"].dtype == torch.float32
    for name, expected in exact.items():
        error = (result[name].double() - expected).norm() / expected.norm()
        assert error < 0.02, f"{name} is off by {error:.2g}"


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8], ids="dt{:g}".format)
def test_huge_time_steps_stay_finite(size):
    """exp(delta * A) underflows to zero; nothing may overflow on the way, also not backwards."""
    arguments = make_inputs(2 * Q + 3)
    arguments["dt"] = (arguments["dt"].detach() * size).requires_grad_()
    result = run(chunked, arguments, chunk_size=Q)
    for name, value in result.items():
        assert value.isfinite().all(), name
    assert_same({"y": result["y"]}, {"y": truth(**arguments)[0]}, tolerance=1e-2)


def test_final_state_is_returned_only_on_request():
    arguments = make_inputs(Q)
    assert torch.equal(ssd(**arguments), ssd(**arguments, return_final_state=True)[0])


BAD_SHAPES = {
    "x of three axes": ("x", (2, 4, 6), "x has shape (2, 4, 6), expected (B, L, H, P)"),
    "short dt": ("dt", (2, 3, 4), "dt has shape (2, 3, 4), expected (2, 4, 4)"),
    "A of other heads": ("A", (3,), "A has shape (3,), expected (4,)"),
    "dt_bias of other heads": ("dt_bias", (1, 3), "dt_bias has shape (1, 3), expected (4,)"),
    "B without groups": ("B", (2, 4, 5), "B has shape (2, 4, 5), expected (2, 4, G, N)"),
    "groups that do not divide": ("C", (2, 4, 3, 5), "with G dividing 4 heads"),
    "C of other state width": ("C", (2, 4, 4, 6), "C has 6 state channels, B has 5"),
    "state of one row": ("initial_state", (1, 4, 3, 5), "initial_state has shape (1, 4, 3, 5), expected (2,"),
    "segments of one row": ("segment_ids", (1, 4), "segment_ids has shape (1, 4), expected (2, 4)"),
}


@pytest.mark.parametrize("name, shape, message", BAD_SHAPES.values(), ids=BAD_SHAPES.keys())
def test_shapes_that_do_not_fit_are_named(name, shape, message):
    with pytest.raises(ValueError) as error:
        ssd(**{**make_inputs(4), name: torch.zeros(shape)})
    assert message in str(error.value)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown ssd backend 'cuda', expected one of auto, tune, torch, "):
        ssd(**make_inputs(4), backend="cuda")


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla is installed")
def test_a_named_backend_that_is_missing_says_what_to_install():
    with pytest.raises(ValueError, match="ssd backend 'fla' needs flash-linear-attention, which is not installed"):
        ssd(**make_inputs(4), backend="fla")


@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("most", [Q, 4 * Q, 6 * Q, 7 * Q], ids="most{}".format)
def test_pieces_of_what_is_too_large_give_the_whole(most, packed, monkeypatch):
    """Rows one after another, and long rows in pieces that hand their state on."""
    monkeypatch.setattr(ssd_kernels, "INT32_ELEMENTS", most * 10)
    arguments = make_inputs(3 * Q + 3, batch=3, groups=2)
    ids = segment_ids = None
    if packed:
        ids = torch.tensor([[0] * Q + [1] * (2 * Q + 3), [0] * 3 + [1] * (3 * Q), [0] * (2 * Q + 1) + [1] * (Q + 2)])
    tokens = []

    def scan(x, dt, A, B, C, dt_bias, chunk_size, segment_ids, initial_state):
        tokens.append(x.shape[0] * -(-x.shape[1] // chunk_size) * chunk_size)
        assert segment_ids is None or (segment_ids[:, 0] == 0).all()
        options = dict(dt_bias=dt_bias, chunk_size=chunk_size, segment_ids=segment_ids, initial_state=initial_state)
        return torch_ssd(x, dt, A, B, C, **options)

    def in_pieces(x, dt, A, B, C, dt_bias, initial_state):
        return ssd_kernels.in_pieces(scan, 10, Q, x, dt, A, B, C, dt_bias, segment_ids, initial_state)

    segment_ids = ids
    assert_same(run(in_pieces, arguments), run(truth, arguments, segment_ids=ids))
    assert len(tokens) > 1 and max(tokens) <= most


def test_cpu_needs_no_cuda_package(monkeypatch):
    for name in CUDA_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    arguments = make_inputs(Q + 1)
    assert torch.equal(ssd(**arguments), ssd(**arguments, backend="torch"))


def _missing(package):
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def _backend(name, package):
    reason = _missing(package)
    marks = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)]
    return pytest.param(name, marks=marks, id=name)


def on_gpu(arguments):
    return {name: value.detach().cuda().requires_grad_() for name, value in arguments.items()}


KERNELS = [_backend("triton", "mamba_ssm"), _backend("fla", "fla")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_equal_the_recurrence_with_every_gradient(backend, dtype):
    arguments = make_inputs(150, width=64, state=64)
    exact = run(truth, {name: value.detach().cuda().requires_grad_() for name, value in arguments.items()})
    moved = {
        name: value.detach().cuda().to(dtype if name in ("x", "B", "C") else torch.float32).requires_grad_()
        for name, value in arguments.items()
    }
    result = run(chunked, moved, backend=backend)
    for name, expected in exact.items():
        error = (result[name].double() - expected).norm() / expected.norm()
        assert error < 0.02, f"{name} is off by {error:.2g}"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
def test_kernels_keep_packed_rows_apart_with_every_gradient(backend, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(ssd_kernels, "INT32_ELEMENTS", 2**16)
    arguments = on_gpu(make_inputs(150, width=64, state=64))
    lengths = torch.tensor([[70, 1, 64, 15], [3, 100, 40, 7]])
    ids = torch.stack([torch.repeat_interleave(torch.arange(4), row) for row in lengths])
    exact = run(truth, arguments, segment_ids=ids.cuda())
    result = run(chunked, arguments, segment_ids=ids.cuda(), backend=backend)
    for name, expected in exact.items():
        error = (result[name].double() - expected).norm() / expected.norm()
        assert error < 0.02, f"{name} is off by {error:.2g}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_gives_on_a_gpu_what_torch_gives():
    arguments = on_gpu(make_inputs(300, width=64, state=64))
    ours, twin = run(chunked, arguments), run(chunked, arguments, backend="torch")
    for name, expected in twin.items():
        assert (ours[name] - expected).norm() / expected.norm() < 0.02, name


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_skip_tokens_with_minus_infinity_in_dt(backend):
    arguments = {name: value.detach().cuda() for name, value in make_inputs(150, width=64, state=64).items()}
    arguments["dt"][:, ::3] = -torch.inf
    arguments["dt"].requires_grad_()
    y, state = chunked(**arguments, backend=backend)
    exact, end = truth(**arguments)
    for value, expected in ((y, exact), (state, end)):
        assert (value.double() - expected).norm() / expected.norm() < 0.02
    assert torch.autograd.grad(state.sum(), arguments["dt"])[0].isfinite().all()


def test_b_and_c_of_higher_precision_are_brought_to_that_of_x():
    """As norms and fp32 angles leave them under mixed precision."""
    arguments = {key: value.detach() for key, value in make_inputs(20).items()}
    arguments["x"] = arguments["x"].to(torch.bfloat16)
    rounded = {**arguments, "B": arguments["B"].to(torch.bfloat16), "C": arguments["C"].to(torch.bfloat16)}
    found = ssd(**arguments, backend="torch")
    assert found.dtype == torch.bfloat16 and torch.equal(found, ssd(**rounded, backend="torch"))


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)], ids=["no rows", "no tokens"])
def test_nothing_leaves_the_state_as_it_was(batch, length):
    x, dt, B = torch.ones(batch, length, 4, 8), torch.ones(batch, length, 4), torch.ones(batch, length, 2, 8)
    x.requires_grad_()
    ids, state = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, 4, 8, 8)
    options = dict(segment_ids=ids, initial_state=state, return_final_state=True)
    y, final = ssd(x, dt, -torch.ones(4), B, B[:, :, :1], **options)
    assert y.shape == x.shape and torch.equal(final, state)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
