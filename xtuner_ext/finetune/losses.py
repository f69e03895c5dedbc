"""Cross-entropy whose logits never exist all at once.

Axis letters: D model width, V vocabulary, R supervised rows.
"""

import torch

from ..distill.losses import rows_per_chunk


def chunked_cross_entropy(hidden, head, targets, weights, chunk_rows=None):
    """Weighted sum of the rows' cross-entropy, straight from hidden states.

    Gradients are written down while the logits of a chunk are there, so no graph is kept.

    Args:
        hidden (Tensor): (R, D).
        head (Tensor): Output embedding, (V, D).
        targets (Tensor): Next tokens, (R,).
        weights (Tensor): Of every row, (R,), fp32.
        chunk_rows (int, optional): Rows per chunk; by default as many as
            :func:`~xtuner_ext.distill.losses.rows_per_chunk` says.

    Returns:
        Tensor: Scalar in fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden, head, targets, weights, chunk_rows or rows_per_chunk(head))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, chunk_rows):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_rows):
                part = slice(start, start + chunk_rows)
                rows, target, weight = hidden[part], targets[part, None], weights[part]
                # 1. Loss: logarithm of the sum of exponentials, less the target's logit.
                logits = (rows @ head.T).float()
                norm = logits.logsumexp(-1)
                total += ((norm - logits.gather(1, target)[:, 0]) * weight).sum()
                # 2. Its gradient by the logits: probabilities, less one at the target.
                if wants_hidden or wants_head:
                    gradient = logits.sub_(norm[:, None]).exp_()
                    gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                    gradient = gradient.mul_(weight[:, None]).to(head.dtype)
                # 3. Through the head.
                if wants_hidden:
                    hidden_grad[part] = gradient @ head
                if wants_head:
                    head_grad += (gradient.T @ rows).float()
        ctx.gradients = hidden_grad, head_grad, head.dtype
        return total

    @staticmethod
    def backward(ctx, outer):
        hidden, head, dtype = ctx.gradients
        hidden = None if hidden is None else hidden * outer.to(hidden.dtype)
        return hidden, None if head is None else (head * outer).to(dtype), None, None, None
