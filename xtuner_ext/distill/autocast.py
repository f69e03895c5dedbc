"""Mixed precision on any device."""

import contextlib

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Forward passes under bf16 autocast; weights and updates keep their own precision.

    MMEngine's AmpOptimWrapper refuses a CPU. bf16 has fp32's range, so no loss scaling is needed. Arguments
    are those of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextlib.contextmanager
    def optim_context(self, model):
        """Everything inside runs under autocast."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
