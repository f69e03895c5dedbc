"""What every MMEngine model of this package shares."""

from abc import abstractmethod

from mmengine.model import BaseModel
from xtuner.registry import BUILDER

from ..convert.checkpoint import find_dtype
from ..modeling.mixers import FP32_PARAMETERS


class HybridModel(BaseModel):
    """MMEngine model around a ``HybridVLForCausalLM``.

    ``state_dict`` holds what trains and nothing else, so checkpoints stay small and the rest comes from
    the teacher's folder.

    Args:
        llm (dict | nn.Module): The decoder, or the config that builds it.
        data_preprocessor (dict, optional): MMEngine's; moves batches to the device.
    """

    def __init__(self, llm, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.llm = BUILDER.build(llm) if isinstance(llm, dict) else llm
        self.register_load_state_dict_post_hook(_forget_frozen)

    def init_weights(self):
        """Nothing: weights come from the teacher or from seeding."""

    def forward(self, data, data_samples=None, mode="loss"):
        """MMEngine's entry.

        Args:
            data (dict): ``input_ids``, ``labels``, ``attention_mask`` (B, L), ``pixel_values`` (T, 3, S, S).
            data_samples (dict, optional): ``keys`` are the names of the samples.
            mode (str | callable): ``loss``, ``predict`` or ``tensor``, or a function of the model and the batch:
                wrappers that spread the weights over processes gather them for a forward pass only.

        Returns:
            object: Losses, logits per sample, the logits (B, L, V), or what the function returns.

        Raises:
            ValueError: For another mode.
        """
        if mode == "loss":
            return self.compute_loss(**data, keys=(data_samples or {}).get("keys"))
        if callable(mode):
            return mode(self, **data)
        inputs = {key: value for key, value in data.items() if key != "labels"}
        logits = self.llm(**inputs, use_cache=False).logits
        if mode == "predict":
            return [{"logits": row} for row in logits]
        if mode == "tensor":
            return logits
        raise ValueError(f"unknown mode {mode!r}, expected loss, predict or tensor")

    @abstractmethod
    def compute_loss(self, *, keys=None, **data):
        """Losses of one batch.

        Args:
            keys (list, optional): Names of the samples.
            **data (Tensor): See :meth:`forward`.

        Returns:
            dict[str, Tensor]: Those whose key contains ``loss`` are back-propagated.
        """

    def state_dict(self, *args, **kwargs):
        """dict[str, Tensor]: Trainable parameters only."""
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.removeprefix(prefix) not in trained]:
            del state[key]
        return state

    def cast_trainable(self, dtype):
        """Give the weights that train a precision of their own; decay rates and time-step biases keep fp32.

        Args:
            dtype (str): Such as ``"float32"``.

        Raises:
            UserError: For an unknown dtype.
        """
        dtype = find_dtype(dtype, "model.trainable_dtype")
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and name.rpartition(".")[2] not in FP32_PARAMETERS:
                parameter.data = parameter.data.to(dtype)

    def gradient_checkpointing_enable(self):
        """Recompute activations layer by layer in the backward pass."""
        self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def gradient_checkpointing_disable(self):
        """Keep activations."""
        self.llm.gradient_checkpointing_disable()

    # XTuner's hooks know these names.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable


def _forget_frozen(module, incompatible_keys):
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if key in trained]
