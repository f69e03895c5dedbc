"""Losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.distill.losses import alignment_error, chunked_divergence, logit_divergence


def test_alignment_error_is_the_mean_over_real_tokens_only():
    prediction, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = (prediction - target)[mask].square().mean()
    assert torch.isclose(alignment_error(prediction, target, mask), expected)
    prediction[0, 3:] = 1e6
    assert torch.isclose(alignment_error(prediction, target, mask), expected)


def test_normalised_alignment_error_does_not_depend_on_the_target_scale():
    prediction, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    small = alignment_error(prediction, target, normalise=True)
    assert torch.isclose(small, alignment_error(prediction * 100, target * 100, normalise=True))
    assert torch.isclose(alignment_error(torch.zeros_like(target), target, normalise=True), torch.tensor(1.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_divergence_is_torchs_kl_times_the_squared_temperature(temperature):
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    log_p, log_q = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    expected = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature**2
    assert torch.allclose(logit_divergence(student, teacher, "forward", temperature), expected, atol=1e-6)


def test_reverse_divergence_swaps_the_roles():
    a, b = torch.randn(7, 11), torch.randn(7, 11)
    assert torch.allclose(logit_divergence(a, b, "reverse"), logit_divergence(b, a, "forward"), atol=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded():
    a, b = 20 * torch.randn(7, 11), 20 * torch.randn(7, 11)
    value = logit_divergence(a, b, "js")
    assert torch.allclose(value, logit_divergence(b, a, "js"), atol=1e-6)
    assert (value <= torch.log(torch.tensor(2.0)) + 1e-6).all() and (value >= -1e-6).all()


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        logit_divergence(torch.randn(1, 2), torch.randn(1, 2), "sideways")


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_chunked_divergence_equals_full_logits_with_every_gradient(direction, chunk_rows):
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    target, target_head = torch.randn(10, 8), torch.randn(13, 8)
    total, agreed = chunked_divergence(hidden, head, target, target_head, direction, 1.5, chunk_rows)
    gradients = torch.autograd.grad(3 * total, (hidden, head))
    full = logit_divergence(hidden @ head.T, target @ target_head.T, direction, 1.5).sum()
    for name, ours, theirs in zip(("hidden", "head"), gradients, torch.autograd.grad(3 * full, (hidden, head))):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    assert torch.isclose(total, full)
    assert agreed == ((hidden @ head.T).argmax(-1) == (target @ target_head.T).argmax(-1)).sum()


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    torch.manual_seed(0)
    words, target, target_head = torch.randn(13, 8, requires_grad=True), torch.randn(5, 8), torch.randn(13, 8)
    hidden = words[[1, 4, 4, 0, 12]].tanh()
    ours = torch.autograd.grad(chunked_divergence(hidden, words, target, target_head)[0], words, retain_graph=True)
    full = logit_divergence(hidden @ words.T, target @ target_head.T).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(full, words))


def test_a_batch_without_supervised_rows_gives_zero_and_zero_gradients():
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    total, agreed = chunked_divergence(hidden, head, torch.zeros(0, 8), torch.randn(13, 8))
    gradients = torch.autograd.grad(total, (hidden, head))
    assert total == 0 and agreed == 0 and gradients[0].shape == (0, 8) and not gradients[1].any()


def test_under_autocast_gradients_come_back_in_the_weights_precision_and_equal_traced_ones():
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    target, target_head = torch.randn(10, 32), torch.randn(50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = chunked_divergence(hidden, head, target, target_head, chunk_rows=4)
        full = logit_divergence(hidden @ head.T, target @ target_head.T).sum()
    assert torch.isclose(total, full, rtol=1e-3)
    for ours, theirs in zip(torch.autograd.grad(total, (hidden, head)), torch.autograd.grad(full, (hidden, head))):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
