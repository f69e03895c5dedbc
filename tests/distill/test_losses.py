"""Losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.distill.losses import alignment_error, chunked_divergence, density_weights, logit_divergence


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


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_density_weights_are_one_on_average_over_a_rows_image_tokens_and_one_elsewhere(strength):
    embeds = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(3, 9, dtype=torch.bool)
    image[0, 2:8], image[1, :3] = True, True
    weights = density_weights(embeds, image, strength)
    assert (weights[~image] == 1).all() and (weights >= 0).all()
    for row in (0, 1):
        assert torch.isclose(weights[row][image[row]].mean(), torch.tensor(1.0), atol=1e-5)
        directions = F.normalize(embeds[row][image[row]], dim=-1)
        apart = 1 - directions @ directions.mean(0)
        expected = 1 + strength * (apart / apart.mean() - 1)
        assert torch.allclose(weights[row][image[row]], expected, atol=1e-3)


def test_patches_that_are_alike_weigh_the_same_and_the_odd_one_most():
    patch = torch.randn(16, generator=torch.Generator().manual_seed(0))
    embeds, image = patch.expand(1, 8, 16).clone(), torch.ones(1, 8, dtype=torch.bool)
    assert torch.allclose(density_weights(embeds, image, 1.0), torch.ones(1, 8), atol=1e-2)
    embeds[0, 5] = -patch
    weights = density_weights(embeds, image, 1.0)
    others = torch.cat([weights[0, :5], weights[0, 6:]])
    assert weights.argmax() == 5 and torch.allclose(others, others[0].expand(7), atol=1e-5)
    assert (density_weights(embeds, image, 0.0) == 1).all()


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
    gradients = torch.autograd.grad(total, (hidden, head))
    full = logit_divergence(hidden @ head.T, target @ target_head.T, direction, 1.5).sum()
    for name, ours, theirs in zip(("hidden", "head"), gradients, torch.autograd.grad(full, (hidden, head))):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    assert torch.isclose(total, full)
    assert agreed == ((hidden @ head.T).argmax(-1) == (target @ target_head.T).argmax(-1)).sum()


def test_density_is_that_of_the_sample_in_a_packed_row():
    embeds = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    segments = torch.tensor([[7, 7, 7, 7, 3, 3, 7, 7, 7, 7, 7, -1]])
    packed = density_weights(embeds, image, 1.0, segments)
    for part in (slice(0, 4), slice(4, 6), slice(6, 11), slice(11, 12)):
        alone = density_weights(embeds[:, part], image[:, part], 1.0)
        assert torch.allclose(packed[:, part], alone, atol=1e-6)
    assert not torch.allclose(packed, density_weights(embeds, image, 1.0), atol=1e-2)
