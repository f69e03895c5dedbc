"""Parameter groups for distillation."""

from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

from ..errors import UserError

MIXER_PART = ".mixer.mamba."


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TrainableParameters:
    """Groups the parameters that train by weight decay, learning rate and dtype.

    MMEngine's own constructor makes one group per parameter, frozen ones included, and refuses modules
    that two parents share.

    Args:
        optim_wrapper_cfg (dict): Type, optimizer and options of the wrapper.
        paramwise_cfg (dict, optional): ``no_decay``, a list of name parts without weight decay (by default
            biases, decay rates and sinks), and ``rest_lr_mult``, the learning rate of weights outside the mixers
            relative to the mixers'.
    """

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.optim_wrapper_cfg = dict(optim_wrapper_cfg)
        options = {"no_decay": ["bias", "A_log", ".D", "sink_"], "rest_lr_mult": 1.0, **(paramwise_cfg or {})}
        if unknown := sorted(set(options) - {"no_decay", "rest_lr_mult"}):
            raise UserError(f"unknown optim_wrapper.paramwise_cfg key {unknown[0]!r}, expected no_decay or rest_lr_mult")
        self.no_decay, self.rest_lr_mult = tuple(options["no_decay"]), options["rest_lr_mult"]

    def __call__(self, model):
        """Build the wrapper.

        Args:
            model (nn.Module): Model, possibly wrapped for data parallelism.

        Returns:
            OptimWrapper: Around an optimizer with at most four groups of each dtype.

        Raises:
            UserError: When nothing trains.
        """
        model = model.module if is_model_wrapper(model) else model
        config = dict(self.optim_wrapper_cfg["optimizer"])
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # DeepSpeed lays the parameters of a group side by side in one tensor.
                key = (any(part in name for part in self.no_decay), MIXER_PART in name, parameter.dtype)
                groups.setdefault(key, []).append(parameter)
        if not groups:
            raise UserError("no parameter of the model trains, check model.trainable")
        config["params"] = [
            {
                "params": parameters,
                "lr": config["lr"] * (1.0 if in_mixer else self.rest_lr_mult),
                "weight_decay": 0.0 if no_decay else config.get("weight_decay", 0.01),
            }
            for (no_decay, in_mixer, _), parameters in groups.items()
        ]
        wrapper = {"type": "OptimWrapper", **self.optim_wrapper_cfg, "optimizer": OPTIMIZERS.build(config)}
        return OPTIM_WRAPPERS.build(wrapper)
