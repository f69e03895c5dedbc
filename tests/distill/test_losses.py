"""Losses against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner_ext.distill import losses
from xtuner_ext.distill import losses
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


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_words_added_for_fast_products_change_nothing(direction, monkeypatch):
    torch.manual_seed(0)
    leaves = [torch.randn(n, 8, requires_grad=True) for n in (5, 13)]
    target, target_head = torch.randn(5, 8), torch.randn(13, 8)
    found = {}
    for words in (1, 8):
        monkeypatch.setattr(losses, "WORDS", {"cpu": words})
        total, agreed = chunked_divergence(*leaves, target, target_head, direction, 2.0, chunk_rows=2)
        found[words] = [total, agreed, *torch.autograd.grad(total, leaves)]
    for plain, padded in zip(found[1], found[8]):
        torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_written_down_gradients_are_the_derivatives(direction):
    torch.manual_seed(0)
    hidden, head, target, target_head = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 7, 5, 7))

    def loss(hidden, head):
        return chunked_divergence(hidden, head, target, target_head, direction, 1.5, chunk_rows=2, scale=0.3)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_()))


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


LOW = {"bfloat16": (torch.bfloat16, 1.0), "float16 with a loss scale": (torch.float16, 65536.0)}


@pytest.mark.parametrize("dtype, loss_scale", LOW.values(), ids=LOW)
@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_gradients_in_16_bits_are_rounded_no_more_than_traced_ones(direction, dtype, loss_scale):
    torch.manual_seed(0)
    hidden, head, target = torch.randn(300, 64), 0.2 * torch.randn(400, 64), torch.randn(300, 64)
    # The hidden states of a mean over many tokens: tiny gradients, and of two models that nearly agree.
    target, scale = hidden + 0.1 * target, 1 / 3000
    hidden, head, target = (tensor.to(dtype) for tensor in (hidden, head, target))

    def gradients(precision, loss):
        leaves = [tensor.to(precision).requires_grad_() for tensor in (hidden, head)]
        factor = 1.0 if precision == torch.float64 else loss_scale
        found = torch.autograd.grad(loss(*leaves, target.to(precision)) * factor, leaves)
        return [gradient.double() / factor for gradient in found]

    def traced(hidden, head, target):
        return logit_divergence(hidden @ head.T, target @ head.detach().T, direction).sum() * scale

    def exact(hidden, head, target):
        log_q, log_p = (F.log_softmax(x @ w.T, -1) for x, w in ((hidden, head), (target, head.detach())))
        middle = torch.logaddexp(log_q, log_p) - math.log(2)
        kl = {"forward": [(log_p, log_q)], "reverse": [(log_q, log_p)], "js": [(log_q, middle), (log_p, middle)]}
        return sum((p.exp() * (p - q)).sum() for p, q in kl[direction]) / len(kl[direction]) * scale

    def ours(hidden, head, target):
        return chunked_divergence(hidden, head, target, head, direction, chunk_rows=70, scale=scale)[0]

    truth = gradients(torch.float64, exact)
    for name, one, other, right in zip(("hidden", "head"), gradients(dtype, ours), gradients(dtype, traced), truth):
        assert (one - right).norm() <= 1.05 * (other - right).norm(), name


def test_a_scale_multiplies_the_sum_and_its_gradients():
    torch.manual_seed(0)
    hidden, head, target = torch.randn(10, 8, requires_grad=True), torch.randn(13, 8), torch.randn(10, 8)
    plain = chunked_divergence(hidden, head, target, head)[0]
    scaled = chunked_divergence(hidden, head, target, head, scale=0.3)[0]
    assert torch.isclose(scaled, 0.3 * plain)
    torch.testing.assert_close(torch.autograd.grad(scaled, hidden)[0], 0.3 * torch.autograd.grad(plain, hidden)[0])


def test_logits_of_any_size_give_finite_values():
    hidden, head, target = 40 * torch.randn(6, 8, requires_grad=True), torch.randn(13, 8), 40 * torch.randn(6, 8)
    for direction in ("forward", "reverse", "js"):
        total, _ = chunked_divergence(hidden, head, target, head, direction)
        full = logit_divergence(hidden @ head.T, target @ head.T, direction).sum()
        assert torch.isclose(total, full, rtol=1e-4) and torch.isfinite(torch.autograd.grad(total, hidden)[0]).all()


class Largest(TorchDispatchMode):
    """Notes the most rows of any tensor as wide as a vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == self.vocabulary:
            self.rows = max(self.rows, result.shape[0])
        return result


def test_logits_never_exist_for_more_rows_than_asked_for_or_than_the_bytes_hold(monkeypatch):
    hidden, head = torch.randn(50, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 1000 * 20)
    for asked, rows in ((7, 7), (None, 20)):
        with Largest(1000) as largest:
            chunked_divergence(hidden, head, torch.randn(50, 4), head, chunk_rows=asked)[0].backward()
        assert largest.rows == rows


def test_backends_refuse_what_they_cannot_do():
    tensors = torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 4)
    for options in (dict(backend="fla", direction="js"), dict(backend="fla", temperature=2.0), dict(backend="cuda")):
        with pytest.raises(ValueError, match="backend"):
            chunked_divergence(*tensors, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("backend, package", [("torch", "torch"), ("liger", "liger_kernel"), ("fla", "fla")])
@pytest.mark.parametrize("direction, temperature", [("forward", 1.0), ("reverse", 2.0), ("js", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_gives_the_same_on_cuda(backend, package, direction, temperature, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip(package)
    if backend == "fla" and (direction, temperature) != ("forward", 1.0):
        pytest.skip("fla has the forward direction at temperature 1")
    torch.manual_seed(0)
    hidden, head, target = torch.randn(100, 256), 0.1 * torch.randn(1000, 256), torch.randn(100, 256)
    hidden, head, target = (tensor.to("cuda", dtype) for tensor in (hidden, head, target))
    right = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    logits = right[0] @ right[1].T, target.double() @ head.double().T
    full = logit_divergence(*logits, direction, temperature).sum() / 100
    leaves = [tensor.requires_grad_() for tensor in (hidden, head)]
    loss, _ = chunked_divergence(
        *leaves, target, head.detach().clone(), direction, temperature, chunk_rows=30, scale=1 / 100, backend=backend
    )
    tolerance = 1e-3 if dtype == torch.float32 else 0.03
    assert abs(loss - full) < tolerance * full
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(full, right)):
        assert ours.dtype == dtype and (ours.double() - theirs).norm() < tolerance * theirs.norm()


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


def test_a_scale_of_zero_gives_zero_and_zero_gradients():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    total, _ = chunked_divergence(hidden, head, torch.randn(4, 8), head, scale=0.0)
    total.backward()
    assert total == 0 and not hidden.grad.any()
