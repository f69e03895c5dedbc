"""Back-propagating a layer's loss the moment it is known.

In stages 1 and 2 no layer's gradient reaches another, so a layer's activations can be freed before the
next layer runs. The gradients are computed inside the forward pass and handed out when the summed loss is
back-propagated; parameters then receive them the usual way, so data-parallel wrappers need not know.
"""

import torch


def local_backward(compute, parameters):
    """Run a loss and, when gradients are on, its backward pass.

    The gradients are those of keeping the graph, bit for bit, as long as what multiplies the loss afterwards is a
    power of two; anything else belongs into ``compute``.

    Args:
        compute (callable): Takes nothing and returns a scalar loss and any further detached values.
        parameters (iterable[nn.Parameter]): The only parameters that the loss may reach.

    Returns:
        tuple[Tensor, object]: The loss, whose graph holds gradients and no activations, and the values.
    """
    if not torch.is_grad_enabled():
        return compute()
    kept = []

    def run():
        loss, values = compute()
        kept.append(values)
        return loss

    return _LocalBackward.apply(run, *parameters), kept[0]


class _LocalBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *parameters):
        with torch.enable_grad():
            loss = run()
        ctx.gradients = torch.autograd.grad(loss, parameters)
        return loss.detach()

    @staticmethod
    def backward(ctx, outer):
        gradients, ctx.gradients = list(ctx.gradients), None
        # One at a time, so that they do not exist twice.
        return None, *[_scale(gradients.pop(0), outer) for _ in range(len(gradients))]


def _scale(gradient, factor):
    # An fp32 factor rounded to bf16 would bend every gradient.
    return (gradient.to(torch.promote_types(gradient.dtype, factor.dtype)) * factor).to(gradient.dtype)
