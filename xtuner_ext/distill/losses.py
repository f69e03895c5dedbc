"""Losses of the three stages.

Axis letters: B batch, L length, H heads, P head width, D model width, V vocabulary, R supervised rows.
"""

import math

import torch
import torch.nn.functional as F

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
    error = (prediction.float() - target.float()).square().mean((-1, -2))
    energy = target.float().square().mean((-1, -2))
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
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return DIRECTIONS[direction](student, teacher)[0] * temperature**2


def chunked_divergence(
    student_hidden, student_head, teacher_hidden, teacher_head, direction="forward", temperature=1.0, chunk_rows=512
):
    """Sum of :func:`logit_divergence` over rows, straight from hidden states.

    Logits exist for one chunk of rows at a time, so no (R, V) tensor of either model is ever held. The
    gradient is written down rather than traced, in the same pass: each logit is computed once.

    Args:
        student_hidden (Tensor): (R, D).
        student_head (Tensor): (V, D).
        teacher_hidden (Tensor): (R, D).
        teacher_head (Tensor): (V, D).
        direction (str): See :func:`logit_divergence`.
        temperature (float): See :func:`logit_divergence`.
        chunk_rows (int): Rows per chunk.

    Returns:
        tuple[Tensor, Tensor]: The sum, and the number of rows where both models prefer the same token.

    Raises:
        ValueError: For another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    if torch.is_autocast_enabled(student_hidden.device.type):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        student_hidden, student_head, teacher_hidden, teacher_head = (
            t.to(dtype) for t in (student_hidden, student_head, teacher_hidden, teacher_head)
        )
    return _ChunkedDivergence.apply(
        student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), direction, temperature, chunk_rows
    )


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, direction, temperature, chunk_rows):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total, agreed, hidden_gradients = student_hidden.new_zeros((), dtype=torch.float32), 0, []
        head_gradient = torch.zeros_like(student_head, dtype=torch.float32) if wants_head else None
        for student_rows, teacher_rows in zip(student_hidden.split(chunk_rows), teacher_hidden.split(chunk_rows)):
            student = (student_rows @ student_head.T).float().div_(temperature)
            teacher = (teacher_rows @ teacher_head.T).float().div_(temperature)
            agreed = agreed + (student.argmax(-1) == teacher.argmax(-1)).sum()
            value, gradient = DIRECTIONS[direction](F.log_softmax(student, -1), F.log_softmax(teacher, -1))
            total = total + value.sum() * temperature**2
            # The square of the temperature, over the one that divided the logits.
            gradient = gradient.mul_(temperature).to(student_rows.dtype)
            if wants_hidden:
                hidden_gradients.append(gradient @ student_head)
            if wants_head:
                head_gradient += gradient.T @ student_rows
        ctx.gradients = (torch.cat(hidden_gradients) if hidden_gradients else None, head_gradient)
        ctx.head_dtype = student_head.dtype
        agreed = torch.as_tensor(agreed, device=total.device)
        ctx.mark_non_differentiable(agreed)
        return total, agreed

    @staticmethod
    def backward(ctx, outer, _):
        hidden, head = ctx.gradients
        hidden = None if hidden is None else hidden * outer.to(hidden.dtype)
        head = None if head is None else (head * outer).to(ctx.head_dtype)
        return hidden, head, None, None, None, None, None


def _forward_kl(student, teacher):
    """KL(teacher || student) of log-probabilities, and its gradient by the student's logits."""
    p = teacher.exp()
    return (p * (teacher - student)).sum(-1), student.exp() - p


def _reverse_kl(student, teacher):
    """KL(student || teacher) of log-probabilities, and its gradient by the student's logits."""
    ratio, p = student - teacher, student.exp()
    value = (p * ratio).sum(-1)
    return value, p * (ratio - value[:, None])


def _jensen_shannon(student, teacher):
    """Jensen-Shannon divergence of log-probabilities, and its gradient by the student's logits."""
    middle = torch.logaddexp(student, teacher) - math.log(2)
    own, gradient = _reverse_kl(student, middle)
    return 0.5 * (own + (teacher.exp() * (teacher - middle)).sum(-1)), 0.5 * gradient


DIRECTIONS = {"forward": _forward_kl, "reverse": _reverse_kl, "js": _jensen_shannon}
