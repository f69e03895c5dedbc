"""The divergence over a teacher's likeliest tokens and the rest, against its definition."""

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.distill.losses import chunked_divergence, logit_divergence
from xtuner_ext.distill.top_k import top_k_divergence, top_k_targets

V = 50


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator)

    return make(10, 8).requires_grad_(), make(V, 8).requires_grad_(), make(10, 8), make(V, 8)


def merged(logits, ids, temperature):
    """Probabilities of the kept tokens and of all others together, in float64."""
    probabilities = F.softmax(logits.double() / temperature, -1)
    kept = probabilities.gather(-1, ids)
    others = torch.ones_like(probabilities, dtype=torch.bool).scatter(-1, ids, False)
    return torch.cat([kept, (probabilities * others).sum(-1, keepdim=True)], -1)


def divergence(p, q, direction):
    if direction == "js":
        middle = (p + q) / 2
        return (divergence(p, middle, "forward") + divergence(q, middle, "forward")) / 2
    p, q = (q, p) if direction == "reverse" else (p, q)
    return (p * (p / q).log()).sum(-1)


def ours_of(tensors, k, direction, temperature, chunk_rows=4):
    hidden, head, target, target_head = tensors
    targets = top_k_targets(target, target_head, k, temperature)
    total, agreed = top_k_divergence(hidden, head, *targets, direction, temperature, chunk_rows)
    return total, agreed, targets, torch.autograd.grad(3 * total, (hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("k", [1, 7, V - 1])
def test_value_and_gradients_are_those_of_the_merged_distributions(tensors, k, direction, temperature):
    total, agreed, (_, ids, _), gradients = ours_of(tensors, k, direction, temperature)
    hidden, head, target, target_head = tensors
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    p = merged(target @ target_head.T, ids, temperature)
    expected = temperature**2 * divergence(p, merged(wide[0] @ wide[1].T, ids, temperature), direction).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, wide)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert agreed == ((hidden @ head.T).argmax(-1) == (target @ target_head.T).argmax(-1)).sum()


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_with_every_token_it_is_the_loss_without_a_cache(tensors, direction):
    total, agreed, _, gradients = ours_of(tensors, V, direction, 1.5)
    expected, expected_agreed = chunked_divergence(*tensors, direction, 1.5, 4)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert agreed == expected_agreed
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, tensors[:2])):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_it_is_a_lower_bound_that_rises_with_k(tensors, direction):
    totals = [ours_of(tensors, k, direction, 1.0)[0].item() for k in (1, 2, 5, 20, V)]
    assert totals == sorted(totals) and totals[0] > 0
    hidden, head, target, target_head = tensors
    full = logit_divergence(hidden @ head.T, target @ target_head.T, direction).sum()
    assert totals[-1] == pytest.approx(full.item(), rel=1e-5)


def test_rounding_the_targets_to_fp16_changes_little(tensors):
    hidden, head, target, target_head = tensors
    values, ids, rest = top_k_targets(target, target_head, 7)
    exact = top_k_divergence(hidden, head, values, ids, rest)[0]
    assert torch.isclose(top_k_divergence(hidden, head, values.half(), ids, rest)[0], exact, rtol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_a_teacher_that_is_sure_gives_no_nan(direction):
    """Rest of the teacher and rest of the student both vanish in fp32."""
    head = torch.eye(V) * 200
    hidden = torch.eye(V)[:4].requires_grad_()
    targets = top_k_targets(torch.eye(V)[1:5], head, 3)
    total, _ = top_k_divergence(hidden, head, *targets, direction)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()
    same, _ = top_k_divergence(hidden, head, *top_k_targets(hidden.detach(), head, 3), direction)
    assert same.abs() < 1e-6


def test_a_scale_multiplies_sum_and_gradients(tensors):
    hidden, head, target, target_head = tensors
    targets = top_k_targets(target, target_head, 7)
    one, tenth = (top_k_divergence(hidden, head, *targets, scale=scale)[0] for scale in (1.0, 0.1))
    torch.testing.assert_close(10 * tenth, one)
    for small, large in zip(*(torch.autograd.grad(total, (hidden, head)) for total in (tenth, one))):
        torch.testing.assert_close(10 * small, large)


def test_no_supervised_rows_give_zero_and_zero_gradients():
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    targets = top_k_targets(torch.zeros(0, 8), torch.randn(V, 8), 3)
    total, agreed = top_k_divergence(hidden, head, *targets)
    gradients = torch.autograd.grad(total, (hidden, head))
    assert total == 0 and agreed == 0 and gradients[0].shape == (0, 8) and not gradients[1].any()


@pytest.mark.gpu
def test_targets_on_cuda_are_those_of_unrounded_logits():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    hidden, head = torch.randn(32, 64, device="cuda").bfloat16(), torch.randn(512, 64, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        values, ids, _ = top_k_targets(hidden, head, 16)
    expected = F.log_softmax(hidden.double() @ head.double().T, -1).gather(-1, ids)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-3)


def test_under_autocast_gradients_come_back_in_the_weights_precision(tensors):
    hidden, head, target, target_head = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = top_k_targets(target, target_head, 7)
        total, _ = top_k_divergence(hidden, head, *targets)
    exact = top_k_divergence(hidden, head, *top_k_targets(target, target_head, 7))[0]
    assert torch.isclose(total, exact, rtol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(total, (hidden, head)))


def test_unknown_direction_is_refused(tensors):
    with pytest.raises(ValueError, match="sideways"):
        top_k_divergence(*tensors[:2], *top_k_targets(*tensors[2:], 3), "sideways")
