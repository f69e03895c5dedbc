"""Stage 3 with every weight spread over the processes, by torch's own `fully_shard` (FSDP2).

Two lines in a config choose it::

    runner_type = "FlexibleRunner"
    strategy = dict(type=FullyShardStrategy)
"""

import torch
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..errors import UserError


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Each process keeps a part of every weight, its gradient and optimizer states; a layer is whole while it runs.

    Checkpoints are the files that training without it writes, and go on with it or without. Arguments are those of
    :class:`mmengine._strategy.DDPStrategy`.
    """

    def _wrap_model(self, model):
        if getattr(model, "stage", 3) < 3:
            raise UserError(
                f"strategy: FullyShardStrategy takes a layer's weights away as soon as it has run, while stage "
                f"{model.stage} back-propagates each layer's loss at once: take it in stage 3 only"
            )
        model = model.to(get_device())
        for decoder in (model.llm, getattr(model, "teacher", None)):
            for layer in decoder.model.layers if decoder is not None else ():
                fully_shard(layer)
        return fully_shard(model)

    def save_checkpoint(self, filename, **kwargs):
        """Gather on all processes, write on the first."""
        # MMEngine asks for these in the first process alone, where nobody would answer.
        self._gathered = _whole(self.model.state_dict()), _whole(self.optim_wrapper.state_dict())
        super().save_checkpoint(filename, **kwargs)
        del self._gathered

    def model_state_dict(self):
        """dict[str, Tensor]: Whole weights, on the CPU."""
        return self._gathered[0]

    def optim_state_dict(self):
        """dict: The optimizer's states as those of a model in one piece."""
        return self._gathered[1]

    @torch.no_grad()
    def load_model_state_dict(self, state_dict, **_):
        """Give every process its part of whole weights."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if unknown := sorted(set(state_dict) - set(parameters)):
            raise UserError(f"the checkpoint has {len(unknown)} weights that the model does not, first {unknown[0]}")
        for name, value in state_dict.items():
            parameters[name].copy_(_part(value, parameters[name]))

    def load_optim_state_dict(self, state_dict):
        """Give every process its part of whole states."""
        parameters = [p for group in self.optim_wrapper.optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                key: _part(value, parameters[index]) if torch.is_tensor(value) and value.ndim else value
                for key, value in states.items()
            }
            for index, states in state_dict["state"].items()
        }
        super().load_optim_state_dict({**state_dict, "state": state})


def _whole(state):
    return tree_map_only(torch.Tensor, lambda t: (t.full_tensor() if isinstance(t, DTensor) else t).cpu(), state)


def _part(value, parameter):
    return distribute_tensor(value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements)
