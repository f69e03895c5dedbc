"""The learning rate of fine-tuning runs."""

import math

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS

from ..errors import UserError


class _WarmupCosine(_ParamScheduler):
    def __init__(self, optimizer, param_name, warmup_ratio=0.0, eta_min=0.0, end=None, **kwargs):
        if not 0 <= warmup_ratio < 1:
            raise UserError(f"param_scheduler: warmup_ratio is {warmup_ratio}, expected at least 0 and less than 1")
        self.count, self.eta_min = _accumulative_counts(optimizer), eta_min
        self.total = math.ceil(end / self.count)
        self.warmup = math.ceil(warmup_ratio * self.total)
        super().__init__(optimizer, param_name, begin=0, end=end + 1, **kwargs)

    def load_state_dict(self, state_dict):
        """Go on from a state; how long the run is remains this run's own, which may have become longer."""
        own = {key: getattr(self, key) for key in ("count", "total", "warmup", "end")}
        super().load_state_dict({**state_dict, **own})
        for group, value in zip(self.optimizer.param_groups, self._get_value()):
            group[self.param_name] = value

    def _get_value(self):
        done = self.last_step // self.count
        if done < self.warmup:
            # The first step moves already.
            return [base * (done + 1) / (self.warmup + 1) for base in self.base_values]
        share = min(1.0, (done - self.warmup) / max(1, self.total - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return [self.eta_min + (base - self.eta_min) * cosine for base in self.base_values]


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _WarmupCosine):
    """Linear warm-up for a share of the run, then half a cosine to its end, as transformers' ``cosine``.

    Counts optimizer steps, of however many iterations, and however the run's length is given, by ``max_iters`` or
    ``max_epochs``; a config says ``by_epoch=False`` and leaves ``end`` out.

    Args:
        optimizer (Optimizer | OptimWrapper): Whose learning rate is set.
        warmup_ratio (float): Share of the run that warms up.
        eta_min (float): Last learning rate.
        end (int, optional): Iterations of the run; MMEngine fills it in.
    """


def _accumulative_counts(optimizer):
    if hasattr(optimizer, "_accumulative_counts"):
        return optimizer._accumulative_counts
    # DeepSpeed's engine counts itself; a bare optimizer steps every time.
    wrapper = getattr(optimizer, "model", None)
    return 1 if wrapper is None else wrapper.model.gradient_accumulation_steps()
