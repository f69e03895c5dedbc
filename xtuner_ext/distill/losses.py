"""Losses of the three stages.

Axis letters: B batch, L length, H heads, P head width, D model width, V vocabulary, R supervised rows.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    if direction == "forward":
        value = _kl(teacher, student)
    elif direction == "reverse":
        value = _kl(student, teacher)
    elif direction == "js":
        middle = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        value = 0.5 * (_kl(teacher, middle) + _kl(student, middle))
    else:
        raise ValueError(f"unknown direction {direction!r}, expected 'forward', 'reverse' or 'js'")
    return value * temperature**2


def chunked_divergence(
    student_hidden, student_head, teacher_hidden, teacher_head, direction="forward", temperature=1.0, chunk_rows=1024
):
    """Sum of :func:`logit_divergence` over rows, straight from hidden states.

    Logits exist for one chunk of rows at a time and are computed again in the backward pass, so no (R, V)
    tensor of either model is ever held.

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
    """

    def piece(student_rows, teacher_rows, student_head, teacher_head):
        student, teacher = student_rows @ student_head.T, teacher_rows @ teacher_head.T
        agree = (student.argmax(-1) == teacher.argmax(-1)).sum()
        return logit_divergence(student, teacher, direction, temperature).sum(), agree

    total, agreed = student_hidden.new_zeros((), dtype=torch.float32), 0
    for student_rows, teacher_rows in zip(student_hidden.split(chunk_rows), teacher_hidden.split(chunk_rows)):
        value, agree = checkpoint(piece, student_rows, teacher_rows, student_head, teacher_head, use_reentrant=False)
        total, agreed = total + value, agreed + agree
    return total, agreed


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1)
