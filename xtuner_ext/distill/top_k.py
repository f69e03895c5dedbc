"""Divergence from a teacher of whom only the likeliest tokens are known.

All other tokens are one more outcome, the rest, so both models are compared over k + 1 outcomes. Merging outcomes
never adds divergence: the value is a lower bound of :func:`~xtuner_ext.distill.losses.logit_divergence`, whatever the
direction, and equals it when k is the vocabulary.

Axis letters: R supervised rows, D model width, V vocabulary, K kept tokens.
"""

import torch
import torch.nn.functional as F

from .losses import DIRECTIONS, HeadGradients, check_backend, product, rows_per_chunk

# Finite, so that an impossible token adds nothing instead of 0 * infinity; fp16 still holds it.
LEAST = -1e4


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
    hidden, head = _autocast(hidden, head)
    logits = hidden.new_empty(len(hidden), len(head), dtype=torch.float32)
    # The product states its precision.
    with torch.autocast(hidden.device.type, enabled=False):
        product(hidden, head.T, out=logits)
    log_probs = F.log_softmax(logits.div_(temperature), dim=-1)
    values, ids = log_probs.topk(k, dim=-1)
    # Not 1 minus the sum of the others, which would be rounding errors where the teacher is sure.
    rest = log_probs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
    return values.clamp_(min=LEAST), ids, rest.clamp_(min=LEAST)


def top_k_divergence(
    student_hidden,
    student_head,
    values,
    ids,
    rest,
    direction="forward",
    temperature=1.0,
    chunk_rows=None,
    scale=1.0,
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
        chunk_rows (int, optional): Rows per chunk; by default as many as ``CHUNK_BYTES`` hold.
        scale (float): Multiplies the sum.

    Returns:
        tuple[Tensor, Tensor]: The scaled sum, and the number of rows where both models prefer the same token.

    Raises:
        ValueError: For another direction.
    """
    check_backend("torch", direction, temperature)
    student_hidden, student_head = _autocast(student_hidden, student_head)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(student_head)
    return _TopKDivergence.apply(
        student_hidden, student_head, values, ids, rest, direction, temperature, chunk_rows, scale
    )


def _autocast(*tensors):
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, values, ids, rest, direction, temperature, chunk_rows, scale):
        gradients = HeadGradients(student_hidden, student_head, ctx.needs_input_grad, temperature, scale)
        total, agreed = student_hidden.new_zeros((), dtype=torch.float32), torch.zeros((), device=student_hidden.device)
        everything = ids.shape[-1] == len(student_head)
        rows = max(1, min(chunk_rows, len(student_hidden)))
        buffer = student_hidden.new_empty(rows, len(student_head), dtype=torch.float32)
        # Products below state their precision.
        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, len(student_hidden), rows):
                part = slice(start, start + rows)
                hidden, top, top_ids, others = (t[part] for t in (student_hidden, values, ids, rest))
                logits = buffer[: len(hidden)]
                product(hidden, student_head.T, out=logits)
                logits.div_(temperature)
                agreed += (logits.argmax(-1) == top_ids[:, 0]).sum()
                # 1. Both models over k + 1 outcomes; the student's rest has a logit of its own, the others' logsumexp.
                student, teacher = logits.gather(-1, top_ids), top.float()
                if not everything:
                    logits.scatter_(-1, top_ids, -torch.inf)
                    merged = logits.logsumexp(-1, keepdim=True)
                    student = torch.cat([student, merged], -1)
                    teacher = torch.cat([teacher, others[:, None].float()], -1)
                student, teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
                probabilities = student.exp(), teacher.exp()
                # Normalised already.
                value, gradient = DIRECTIONS[direction](student, teacher, *probabilities, *student.new_zeros(2, len(hidden)))
                total += value.sum()
                # 2. The gradient by that logit falls on the other tokens in proportion to their probability.
                if not everything:
                    logits.sub_(merged).exp_().mul_(gradient[:, -1:])
                logits.scatter_(-1, top_ids, gradient[:, : top_ids.shape[-1]])
                gradients.add(part, logits, hidden, student_head)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(agreed)
        return total * (temperature**2 * scale), agreed

    @staticmethod
    def backward(ctx, outer, _):
        return *ctx.gradients.hand_out(outer), *[None] * 7
