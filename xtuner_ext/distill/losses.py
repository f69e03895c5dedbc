"""Losses of the three stages.

Axis letters: B batch, L length, H heads, P head width, D model width, V vocabulary, R supervised rows.
"""

import importlib
import math

import torch
import torch.nn.functional as F

# One chunk of logits in fp32, of which four are alive at a time. A processor's matrix product loses speed below a few
# hundred rows of a vocabulary of 100,000.
CHUNK_BYTES = {"cpu": 192 * 2**20, "cuda": 96 * 2**20}
# Words that a device's fast products want a multiple of: others run at a third of the speed on an H200.
WORDS = {"cuda": 8}
# Logit of words that are not there; finite, so that nothing turns into 0 * infinity.
NEVER = -1e4
BACKENDS = ("auto", "torch", "liger", "fla")


def alignment_error(prediction, target, token_mask=None, normalise=False):
    """Mean squared error between two mixers' head outputs, over real tokens.

    mmMamba (arXiv 2502.13145) equation 3, per layer.

    Args:
        prediction (Tensor): (B, L, H, P).
        target (Tensor): (B, L, H, P).
        token_mask (Tensor, optional): Boolean (B, L), tokens that count.
        normalise (bool): Divide by the target's mean square, so that layers of any scale weigh the same.

    Returns:
        Tensor: Scalar in fp32.
    """
    return masked_error(*token_errors(prediction, target), token_mask, normalise)


def token_errors(prediction, target):
    """tuple[Tensor, Tensor]: Each token's mean squared error and the target's mean square, (B, L) in fp32."""
    target = target.float()
    return (prediction.float() - target).square().mean((-1, -2)), target.square().mean((-1, -2))


def masked_error(error, energy, token_mask=None, normalise=False):
    """Mean of :func:`token_errors` over real tokens; arguments and result as in :func:`alignment_error`."""
    if token_mask is None:
        error, energy = error.mean(), energy.mean()
    else:
        weight = token_mask.to(error.dtype)
        count = weight.sum().clamp(min=1)
        error, energy = (error * weight).sum() / count, (energy * weight).sum() / count
    return error / energy.clamp(min=1e-12) if normalise else error


def logit_divergence(student, teacher, direction="forward", temperature=1.0):
    """Divergence between two next-token distributions, per row.

    Args:
        student (Tensor): Logits, (R, V).
        teacher (Tensor): Logits, (R, V).
        direction (str): ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``js``
            the Jensen-Shannon divergence.
        temperature (float): Softens both; the result is scaled by its square (Hinton et al., 2015).

    Returns:
        Tensor: (R,), in fp32.

    Raises:
        ValueError: For another direction.
    """
    _check_direction(direction)
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    if direction == "js":
        middle = torch.logaddexp(student, teacher) - math.log(2)
        value = 0.5 * (_kl(student, middle) + _kl(teacher, middle))
    else:
        value = _kl(teacher, student) if direction == "forward" else _kl(student, teacher)
    return value * temperature**2


def chunked_divergence(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    direction="forward",
    temperature=1.0,
    chunk_rows=None,
    scale=1.0,
    backend="auto",
):
    """Sum of :func:`logit_divergence` over rows, straight from hidden states.

    Logits exist for ``chunk_rows`` rows at a time and no graph is kept: the gradient with respect to the logits
    is written down (their softmax minus the other's, for the forward direction) and taken through the head at once.

    Args:
        student_hidden (Tensor): (R, D).
        student_head (Tensor): Output embedding, (V, D).
        teacher_hidden (Tensor): (R, D).
        teacher_head (Tensor): Output embedding, (V, D).
        direction (str): See :func:`logit_divergence`.
        temperature (float): See :func:`logit_divergence`.
        chunk_rows (int, optional): Rows per chunk; by default as many as ``CHUNK_BYTES`` hold.
        scale (float): Multiplies the sum. Gradients in 16 bits are rounded once if it is given here and again
            if it is applied to the result.
        backend (str): ``torch``, ``liger`` (liger-kernel) or ``fla`` (flash-linear-attention: forward direction,
            temperature 1), the last two on CUDA and with their own chunks; ``auto`` is ``torch``.

    Returns:
        tuple[Tensor, Tensor | None]: The scaled sum, and the number of rows where both models prefer the same
        token, which only ``torch`` counts.

    Raises:
        ValueError: For another direction or backend, or one that cannot do what is asked.
    """
    check_backend(backend, direction, temperature)
    device = student_hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student_hidden, student_head, teacher_hidden, teacher_head = (
            t.to(dtype) for t in (student_hidden, student_head, teacher_hidden, teacher_head)
        )
    tensors = [student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach()]
    # Kernels divide by the number of rows.
    if backend in FUSED and len(student_hidden):
        with torch.autocast(device, enabled=False):
            return FUSED[backend](*tensors, direction, temperature) * (scale * len(student_hidden)), None
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(student_head)
    words = len(student_head)
    if surplus := -words % WORDS.get(device, 1):
        tensors[1] = F.pad(student_head, (0, 0, 0, surplus))
        shared = student_head.data_ptr() == teacher_head.data_ptr()
        tensors[3] = tensors[1].detach() if shared else F.pad(tensors[3], (0, 0, 0, surplus))
    return _ChunkedDivergence.apply(*tensors, words, direction, temperature, chunk_rows, scale)


def rows_per_chunk(head, device=None):
    """int: Rows whose fp32 logits by an output embedding (V, D) take ``CHUNK_BYTES`` of its device or another."""
    return max(1, CHUNK_BYTES.get(device or head.device.type, CHUNK_BYTES["cuda"]) // (4 * len(head)))


def check_backend(backend, direction, temperature):
    """Refuse what a backend of :func:`chunked_divergence` cannot do.

    Raises:
        ValueError: For an unknown direction or backend, or what the backend cannot do.
    """
    _check_direction(direction)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "fla" and (direction, temperature) != ("forward", 1):
        raise ValueError(
            f"backend 'fla' has the forward direction at temperature 1, not {direction!r} at {temperature}: use 'torch'"
        )


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_hidden, student_head, teacher_hidden, teacher_head, words, direction, temperature, chunk_rows, scale
    ):
        gradients = HeadGradients(student_hidden, student_head, ctx.needs_input_grad, temperature, scale)
        precise = torch.promote_types(student_hidden.dtype, torch.float32)
        total, agreed = student_hidden.new_zeros(2, dtype=precise)
        # Allocated once: fresh pages for every chunk would cost more than the arithmetic.
        rows = max(1, min(chunk_rows, len(student_hidden)))
        buffers = student_hidden.new_empty(4, rows, len(student_head), dtype=precise)
        # Products below state their precision.
        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, len(student_hidden), rows):
                part = slice(start, start + rows)
                student, teacher, q, p = buffers[:, : len(student_hidden[part])]
                product(student_hidden[part], student_head.T, out=student)
                product(teacher_hidden[part], teacher_head.T, out=teacher)
                if words < len(student_head):
                    buffers[:2, :, words:] = NEVER
                if temperature != 1:
                    student.div_(temperature)
                    teacher.div_(temperature)
                (student_best, student_token), (teacher_best, teacher_token) = student.max(-1), teacher.max(-1)
                agreed += (student_token == teacher_token).sum()
                torch.softmax(student, -1, out=q)
                torch.softmax(teacher, -1, out=p)
                # The largest probability is one over the sum of exponentials.
                norms = student_best - q.amax(-1).log(), teacher_best - p.amax(-1).log()
                value, gradient = DIRECTIONS[direction](student, teacher, q, p, *norms)
                total += value.sum()
                gradients.add(part, gradient, student_hidden[part], student_head)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(agreed)
        return total * (temperature**2 * scale), agreed

    @staticmethod
    def backward(ctx, outer, _):
        return *ctx.gradients.hand_out(outer), *[None] * 7


class HeadGradients:
    """Takes gradients by the logits, chunk by chunk, through the output embedding.

    Args:
        hidden (Tensor): (R, D).
        head (Tensor): Output embedding, (V, D).
        wanted (tuple[bool]): Whether the first and whether the second of these need a gradient.
        temperature (float): Divided the logits; losses are multiplied by its square.
        scale (float): Multiplies the loss.
    """

    def __init__(self, hidden, head, wanted, temperature, scale):
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        precise = torch.promote_types(head.dtype, torch.float32)
        self.head = torch.zeros_like(head, dtype=precise) if wanted[1] else None
        self.head_dtype = head.dtype
        # Powers of two round nothing. They keep gradients near 1, where fp16 has its digits, until the scale is known.
        self.lift = 256.0 if hidden.dtype == torch.float16 else 1.0
        self.boost = 2.0 ** (1 - math.frexp(scale)[1])
        self.factor = scale * self.boost * temperature

    def add(self, part, gradient, rows, head):
        """Add a chunk.

        Args:
            part (slice): Its rows.
            gradient (Tensor): By its logits as :data:`DIRECTIONS` give it, (r, V); overwritten.
            rows (Tensor): Its hidden states, (r, D).
            head (Tensor): (V, D).
        """
        gradient = gradient.mul_(self.lift).to(rows.dtype) if self.lift != 1 else gradient.to(rows.dtype)
        if self.hidden is not None:
            target = self.hidden[part]
            torch.addmm(target, gradient, head, beta=0, alpha=self.factor, out=target)
        if self.head is not None:
            _add_product(self.head, gradient, rows, self.factor)

    def hand_out(self, outer):
        """tuple[Tensor | None, Tensor | None]: Gradients of hidden states and head, times a scalar."""
        outer = outer / (self.boost * self.lift)
        hidden = None if self.hidden is None else (self.hidden.to(outer.dtype) * outer).to(self.hidden.dtype)
        return hidden, None if self.head is None else (self.head * outer).to(self.head_dtype)


def product(a, b, out):
    """Matrix product in fp32, of 16-bit numbers on a GPU without rounding in between."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _has_mixed_product(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total, gradient, rows, factor):
    """Add to an fp32 (V, D) in place, as partial sums in 16 bits would lose digits that a single product keeps."""
    if gradient.dtype != total.dtype and _has_mixed_product(gradient):
        torch.addmm(total, gradient.T, rows, alpha=factor, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(gradient.T.to(total.dtype), rows.to(total.dtype), alpha=factor)


def _has_mixed_product(tensor):
    return tensor.is_cuda and torch.__version__ >= (2, 8)


def _forward_kl(student, teacher, q, p, student_norm, teacher_norm):
    """KL(p || q) and its gradient by q's logits; overwrites its arguments, as do its siblings.

    Args:
        student (Tensor): Logits, (R, V).
        teacher (Tensor): Logits, (R, V).
        q (Tensor): The student's probabilities, (R, V).
        p (Tensor): The teacher's probabilities, (R, V).
        student_norm (Tensor): Logarithm of the sum of the logits' exponentials, (R,).
        teacher_norm (Tensor): The same, (R,).

    Returns:
        tuple[Tensor, Tensor]: (R,) and (R, V).
    """
    value = teacher.sub_(student).mul_(p).sum(-1) + (student_norm - teacher_norm)
    return value, q.sub_(p)


def _reverse_kl(student, teacher, q, p, student_norm, teacher_norm):
    """KL(q || p)."""
    ratio = student.sub_(teacher)
    mean = torch.mul(q, ratio, out=p).sum(-1)
    return mean - (student_norm - teacher_norm), ratio.sub_(mean[:, None]).mul_(q)


def _jensen_shannon(student, teacher, q, p, student_norm, teacher_norm):
    """(KL(q || m) + KL(p || m)) / 2 with m halfway between p and q."""
    student.sub_(student_norm[:, None])
    teacher.sub_(teacher_norm[:, None])
    middle = torch.logaddexp(student, teacher).sub_(math.log(2))
    ratio = student.sub_(middle)
    other = teacher.sub_(middle).mul_(p).sum(-1)
    own = torch.mul(q, ratio, out=middle).sum(-1)
    return 0.5 * (own + other), ratio.sub_(own[:, None]).mul_(q).mul_(0.5)


DIRECTIONS = {"forward": _forward_kl, "reverse": _reverse_kl, "js": _jensen_shannon}


def _liger(student_hidden, student_head, teacher_hidden, teacher_head, direction, temperature):
    """Mean over rows by liger-kernel, which leaves out the squared temperature."""
    loss = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD
    beta = {"forward": 0.0, "js": 0.5, "reverse": 1.0}[direction]
    mean = loss(jsd_beta=beta, temperature=temperature, accum_dtype=torch.float32)
    return mean(student_hidden, student_head, teacher_hidden, teacher_head, None) * temperature**2


def _fla(student_hidden, student_head, teacher_hidden, teacher_head, direction, temperature):
    """Mean over rows by flash-linear-attention."""
    loss = importlib.import_module("fla.modules.fused_kl_div").fused_kl_div_loss
    return loss(student_hidden, teacher_hidden, student_head, teacher_head)


FUSED = {"liger": _liger, "fla": _fla}


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def _check_direction(direction):
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
