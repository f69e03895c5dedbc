"""Attention of one token to a buffer against attention to the part of it that is filled."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.ops.decode_attention import decode_attention

# Rows, query heads, groups, width, room, last index; the last widths fill no block, and one group has three heads.
SHAPES = [(1, 4, 2, 64, 500, 499), (2, 9, 3, 64, 300, 17), (3, 8, 8, 24, 130, 100), (2, 4, 1, 128, 70, 0)]


def inputs(rows, heads, groups, width, room, last, dtype, device="cpu"):
    """Queries, keys and values in a longer buffer that holds nonsense beyond ``last``, and a left-padded mask."""
    generator = torch.Generator().manual_seed(room)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, values = noise(rows, heads, width), noise(rows, groups, room, width)
    keys = noise(rows, groups, room + 9, width)[:, :, :room]
    keys[:, :, last + 1 :], values[:, :, last + 1 :] = 1e4, 1e4
    mask = torch.ones(rows, room, dtype=torch.bool, device=device)
    mask[0, : last // 2] = False
    return q, keys, values, mask, torch.tensor([last], device=device)


def filled(q, keys, values, mask, last):
    """Softmax attention in fp64 over the filled part."""
    end, repeats = int(last) + 1, q.shape[1] // keys.shape[1]
    keys, values = (t[:, :, :end].double().repeat_interleave(repeats, dim=1) for t in (keys, values))
    seen = None if mask is None else mask[:, None, None, :end]
    return F.scaled_dot_product_attention(q.double()[:, :, None], keys, values, attn_mask=seen)[:, :, 0]


def check(backend, device, tolerances):
    for dtype, tolerance in tolerances.items():
        for shape in SHAPES:
            q, keys, values, mask, last = inputs(*shape, dtype, device)
            for seen in (None, mask):
                found = decode_attention(q, keys, values, last, scale=shape[3] ** -0.5, mask=seen, backend=backend)
                assert found.dtype == dtype and found.shape == q.shape
                expected = filled(q, keys, values, seen, last)
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_twin_sees_the_filled_part_and_nothing_else():
    check("torch", "cpu", {torch.float64: 1e-6, torch.float32: 1e-4})


def test_the_kernels_under_tritons_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    # Triton reads the switch when it is imported, and its interpreter multiplies no bf16.
    code = "import torch, test_decode_attention as t\n"
    code += "t.check('triton', 'cpu', {torch.float32: 1e-4, torch.float16: 5e-3})"
    folder = os.path.dirname(__file__)
    paths = os.pathsep.join([folder, os.path.dirname(os.path.dirname(folder)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        pytest.skip("needs a CUDA device and the package triton")
    check("triton", "cuda", {torch.float32: 1e-4, torch.bfloat16: 3e-2})


def test_an_unknown_backend_is_refused():
    q, keys, values, _, last = inputs(*SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="unknown decode_attention backend 'cuda'"):
        decode_attention(q, keys, values, last, scale=1.0, backend="cuda")
