"""Divergence from a teacher of whom only the likeliest tokens are known.

All other tokens are one more outcome, the rest, so both models are compared over k + 1 outcomes. Merging outcomes
never adds divergence: the value is a lower bound of :func:`~xtuner_ext.distill.losses.logit_divergence`, whatever the
direction, and equals it when k is the vocabulary.

Axis letters: R supervised rows, D model width, V vocabulary, K kept tokens.
"""

import torch
import torch.nn.functional as F

from .losses import DIRECTIONS

# Finite, so that an impossible token adds nothing instead of 0 * infinity; fp16 still holds it.
LEAST = -1e4
CHUNK_ROWS = 512


@torch.no_grad()
def top_k_targets(hidden, head, k, temperature=1.0):
    """A teacher's likeliest next tokens.

    Args:
        hidden (Tensor): (R, D).
        head (Tensor): (V, D).
        k (int): Tokens to keep, at most V.
        temperature (float): Divides the logits; what is left out cannot be tempered later.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Log-probabilities (R, K), the likeliest first; their token ids (R, K); and the
        log-probability of all other tokens together (R,), -1e4 where there is none. In fp32.
    """
    log_probs = F.log_softmax((hidden @ head.T).float() / temperature, dim=-1)
    values, ids = log_probs.topk(k, dim=-1)
    # Not 1 minus the sum of the others, which would be rounding errors where the teacher is sure.
    rest = log_probs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
    return values.clamp_(min=LEAST), ids, rest.clamp_(min=LEAST)


def top_k_divergence(
    student_hidden, student_head, values, ids, rest, direction="forward", temperature=1.0, chunk_rows=None, scale=1.0
):
    """Sum of the divergences over rows, in chunks of rows as :func:`~xtuner_ext.distill.losses.chunked_divergence`.

    Args:
        student_hidden (Tensor): (R, D).
        student_head (Tensor): (V, D).
        values (Tensor): Of :func:`top_k_targets` at the same temperature, (R, K). Rounded ones do: they are
            brought to a sum of 1 with the rest.
        ids (Tensor): (R, K), int64.
        rest (Tensor): (R,); not looked at when K is V.
        direction (str): ``forward``, ``reverse`` or ``js``.
        temperature (float): See :func:`~xtuner_ext.distill.losses.logit_divergence`.
        chunk_rows (int, optional): Rows per chunk; 512 when absent.
        scale (float): Multiplies the sum, and gradients before they are rounded to the student's precision.

    Returns:
        tuple[Tensor, Tensor]: The sum, and the number of rows where both models prefer the same token.

    Raises:
        ValueError: For another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    if torch.is_autocast_enabled(student_hidden.device.type):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        student_hidden, student_head = student_hidden.to(dtype), student_head.to(dtype)
    options = (direction, temperature, chunk_rows or CHUNK_ROWS, scale)
    return _TopKDivergence.apply(student_hidden, student_head, values, ids, rest, *options)


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, values, ids, rest, direction, temperature, chunk_rows, scale):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total, agreed, hidden_gradients = student_hidden.new_zeros((), dtype=torch.float32), 0, []
        head_gradient = torch.zeros_like(student_head, dtype=torch.float32) if wants_head else None
        everything = ids.shape[-1] == len(student_head)
        for rows, *targets in zip(*(t.split(chunk_rows) for t in (student_hidden, values, ids, rest))):
            top, top_ids, others = targets
            logits = (rows @ student_head.T).float().div_(temperature)
            agreed = agreed + (logits.argmax(-1) == top_ids[:, 0]).sum()
            # 1. Both models over k + 1 outcomes; the student's rest has a logit of its own, the others' logsumexp.
            student, teacher = logits.gather(-1, top_ids), top.float()
            if not everything:
                logits.scatter_(-1, top_ids, -torch.inf)
                merged = logits.logsumexp(-1, keepdim=True)
                student, teacher = torch.cat([student, merged], -1), torch.cat([teacher, others[:, None].float()], -1)
            value, gradient = DIRECTIONS[direction](F.log_softmax(student, -1), F.log_softmax(teacher, -1))
            total = total + value.sum() * temperature**2 * scale
            # 2. The gradient by that logit falls on the other tokens in proportion to their probability. The square
            #    of the temperature stands over the one that divided the logits.
            gradient = gradient.mul_(temperature * scale)
            if not everything:
                logits.sub_(merged).exp_().mul_(gradient[:, -1:])
            full = logits.scatter_(-1, top_ids, gradient[:, : top_ids.shape[-1]]).to(rows.dtype)
            if wants_hidden:
                hidden_gradients.append(full @ student_head)
            if wants_head:
                head_gradient += full.T @ rows
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
        return hidden, head, None, None, None, None, None, None, None
