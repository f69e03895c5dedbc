"""InternLM 1 for transformers 5: it is a Llama whose attention projections have biases.

The code that its folders bring was written for transformers 4 and reads a cache that is a tuple.
"""

from transformers import LlamaConfig, LlamaForCausalLM


class InternLMConfig(LlamaConfig):
    """Llama's configuration, from the words of InternLM's config.json.

    Attributes:
        bias (bool): Whether the attention's projections have biases.
        rotary (dict | None): ``base`` and ``type`` (``origin`` or ``dynamic``) of the rotary positions.
    """

    model_type = "internlm"

    bias: bool = True
    rotary: dict | None = None

    def __post_init__(self, **kwargs):
        self.attention_bias = self.bias
        if self.rotary and self.rope_parameters is None:
            dynamic = self.rotary.get("type") == "dynamic"
            # Its code scales by one, which is that of the longest sequence alone.
            scaling = {"rope_type": "dynamic", "factor": 1.0} if dynamic else {"rope_type": "default"}
            self.rope_parameters = {"rope_theta": float(self.rotary.get("base", 10000)), **scaling}
        super().__post_init__(**kwargs)


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama under InternLM's name."""

    config_class = InternLMConfig
