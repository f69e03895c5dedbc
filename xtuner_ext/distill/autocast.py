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


def autocast_dtype(wrapper):
    """torch.dtype | None: In which an optimizer wrapper's config lets the model compute, None for its weights' own."""
    kind = getattr(wrapper["type"], "__name__", str(wrapper["type"])).rpartition(".")[2]
    if kind == "Bfloat16OptimWrapper":
        return torch.bfloat16
    if kind == "AmpOptimWrapper":
        return getattr(torch, wrapper.get("dtype") or "float16")
    return None
