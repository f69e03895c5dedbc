"""The Triton scan against its torch twin: on a GPU, and on a CPU under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

CASES = """
import itertools, torch
from xtuner_ext.ops.ssd import number_segments, ssd
from xtuner_ext.ops.ssd_native import native_ssd

device, tolerance = {device!r}, {tolerance}
NAMES = ("y", "final_state", "x", "dt", "A", "B", "C", "dt_bias", "initial_state")
SHAPES = {shapes}
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


for (batch, length, heads, groups_B, groups_C, width, state), (packed, continued) in itertools.product(SHAPES, {kinds}):
    x, dt, A = draw(batch, length, heads, width), draw(batch, length, heads) - 2, -draw(heads).abs() - 0.1
    B, C, bias = draw(batch, length, groups_B, state), draw(batch, length, groups_C, state), 0.3 * draw(heads)
    dt[0, length // 3] = -torch.inf
    inputs = [x, dt, A, B, C, bias, *([draw(batch, heads, width, state)] if continued else [])]
    inputs = [t.to(device).requires_grad_() for t in inputs]
    ids = (torch.arange(length) // 13).expand(batch, -1).to(device)
    options = dict(
        dt_bias=inputs[5],
        segment_ids=number_segments(ids) if packed else None,
        initial_state=inputs[6] if continued else None,
    )
    weights = [draw(*x.shape).to(device), draw(batch, heads, width, state).to(device)]
    found = {{}}
    for name, scan in (
        ("twin", lambda *a, **k: ssd(*a, **k, backend="torch", chunk_size=16, return_final_state=True)),
        ("triton", lambda *a, **k: native_ssd(*a, **k, chunk_size={chunk_size})),
    ):
        outputs = scan(*inputs[:5], **options)
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights))
        found[name] = [*outputs, *torch.autograd.grad(loss, inputs)]
    for name, twin, fast in zip(NAMES, found["twin"], found["triton"]):
        error = ((fast - twin).norm() / twin.norm().clamp(min=1e-6)).item()
        assert error <= tolerance, (name, error, batch, length, heads, groups_B, groups_C, width, state, packed, continued)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_agrees_with_the_twin_under_tritons_interpreter(repository):
    # Axes: B, L, H, groups of B, groups of C, P, N.
    shapes = [(1, 1, 2, 2, 2, 16, 16), (2, 37, 2, 1, 2, 16, 32), (1, 70, 4, 2, 4, 32, 16), (1, 64, 2, 2, 1, 24, 20)]
    kinds = [(False, False), (False, True), (True, False), (True, True)]
    code = CASES.format(device="cpu", tolerance=2e-5, shapes=shapes, kinds=kinds, chunk_size=32)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


STRONG = """
import torch
from xtuner_ext.ops.ssd import ssd
from xtuner_ext.ops.ssd_native import native_ssd

x, B, C = torch.randn(3, 1, 32, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()
dt, A = torch.full((1, 32, 1), -10.0), torch.tensor([-1e4])
dt[0, 10] = 3.0
twin, (found, _) = ssd(x, dt, A, B, C, backend="torch"), native_ssd(x, dt, A, B, C, chunk_size=32)
error = ((found - twin)[:, 11:].norm() / twin[:, 11:].norm()).item()
assert error <= 1e-4, error
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_a_token_that_forgets_all_leaves_later_decays_their_digits(repository):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRONG]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_agrees_with_the_twin_on_a_gpu():
    # Every combination is compiled anew, a few seconds each.
    shapes, kinds = [(2, 333, 4, 2, 4, 64, 64), (1, 1000, 16, 8, 16, 128, 128)], [(False, False), (True, True)]
    exec(CASES.format(device="cuda", tolerance=1e-4, shapes=shapes, kinds=kinds, chunk_size=None), {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_more_than_two_to_the_31_elements():
    from xtuner_ext.ops.ssd import ssd
    from xtuner_ext.ops.ssd_native import native_ssd

    length, heads, width = 1_050_000, 16, 128
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, dt, A = draw(1, length, heads, width), draw(1, length, heads), -torch.ones(heads, device="cuda")
    B = draw(1, length, 1, width)
    assert x.numel() > 2**31
    with torch.no_grad():
        y, state = native_ssd(x, dt, A, B, B)
        # With these decays nothing older than 1,000 tokens is left.
        tail = slice(length - 4096, length)
        expected, final = ssd(
            x[:, tail], dt[:, tail], A, B[:, tail], B[:, tail], backend="torch", return_final_state=True
        )
    for found, truth in ((y[:, -1024:].float(), expected[:, -1024:].float()), (state, final)):
        assert (found - truth).norm() <= 0.02 * truth.norm()
