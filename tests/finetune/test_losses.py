"""Cross-entropy in chunks against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.finetune.losses import chunked_cross_entropy


def inputs(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(13, 8, generator=generator, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(0, 13, (rows,), generator=generator), torch.rand(rows, generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_value_and_gradients(rows, chunk_rows):
    hidden, head, targets, weights = inputs(rows, torch.float32)
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    wanted = torch.autograd.grad(3 * expected, (hidden, head))
    found = chunked_cross_entropy(hidden, head, targets, weights, chunk_rows)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(3 * found, (hidden, head)), wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    hidden, head, targets, weights = inputs(5, torch.float32)
    head.requires_grad_(False)
    chunked_cross_entropy(hidden, head, targets, weights, 2).backward()
    assert hidden.grad.abs().sum() > 0 and head.grad is None


def test_under_autocast_it_computes_in_bf16_and_sums_in_fp32():
    hidden, head, targets, weights = inputs(64, torch.float32)
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_cross_entropy(hidden, head, targets, weights, 16)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-2)
    found.backward()
    assert hidden.grad.dtype == torch.float32
