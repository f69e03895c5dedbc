"""The Triton convolution against its torch twin: on a GPU, and on a CPU under Triton's interpreter."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

CASES = """
import itertools, torch
from xtuner_ext.ops.causal_conv import causal_conv
from xtuner_ext.ops.causal_conv_native import native_conv

device, tolerance = {device!r}, {tolerance}
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator).to(device).requires_grad_()


for shape, (width, packed, continued, activation) in itertools.product({shapes}, {kinds}):
    batch, length, channels = shape
    x, weight, bias = draw(*shape), draw(channels, width), draw(channels)
    inputs = [x, weight, bias, *([draw(batch, channels, width - 1)] if continued else [])]
    options = dict(
        activation=activation,
        segment_ids=(torch.arange(length) // 7).expand(batch, -1).to(device) if packed else None,
        initial_state=inputs[3] if continued else None,
    )
    loss_weight = torch.randn(*shape, generator=generator).to(device)
    expected, found = causal_conv(*inputs[:3], **options, backend="torch"), native_conv(*inputs[:3], **options)
    expected = [expected, *torch.autograd.grad((expected * loss_weight).sum(), inputs)]
    found = [found, *torch.autograd.grad((found * loss_weight).sum(), inputs)]
    for name, twin, fast in zip(("y", "x", "weight", "bias", "initial_state"), expected, found):
        error = ((fast - twin).norm() / twin.norm().clamp(min=1e-6)).item()
        assert error <= tolerance, (name, error, shape, width, packed, continued, activation)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_agrees_with_the_twin_under_tritons_interpreter(repository):
    kinds = list(itertools.product((2, 4), (False, True), (False, True), ("silu", None)))
    code = CASES.format(device="cpu", tolerance=1e-5, shapes=[(1, 1, 3), (2, 70, 5)], kinds=kinds)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_agrees_with_the_twin_on_a_gpu():
    # Every kind is compiled anew, a few seconds each.
    kinds = [(2, False, False, "silu"), (4, True, True, None)]
    exec(CASES.format(device="cuda", tolerance=1e-5, shapes=[(1, 1, 3), (2, 1000, 200)], kinds=kinds), {})
