"""Configuration of the hybrid decoder and of its Mamba-2 mixers."""

import copy
import dataclasses

from transformers import PreTrainedConfig

LAYER_TYPES = ("full_attention", "linear_attention")


@dataclasses.dataclass
class MixerConfig:
    """Shape of one Mamba-2 mixer; head counts and widths follow the attention it replaces.

    Attributes:
        conv_kernel (int): Taps of the depthwise causal convolution; 0 leaves it out.
        conv_activation (str | None): ``silu`` or None, applied to v, k and q also without convolution.
        qk_norm (str | None): ``layernorm`` (learned, per head), ``l2`` (unit length) or None.
        use_rope (bool): Rotate q and k by position, as the attention did.
        gate (bool): Normalise each head's output and multiply it by SiLU of a learned gate.
        gate_bias (bool): Give the gate projection a bias.
        use_D (bool): Add ``D * v`` to the scan's output.
        learn_A (bool): Learn the decay rate; False fixes A at -1.
        window (int): Last tokens that each token also attends to exactly, beside the state; 0 for none.
        sink (bool): With a window, also attend to a learned stand-in for the first token.
        chunk_size (int): Tokens of one dense block of the scan.
    """

    conv_kernel: int = 2
    conv_activation: str | None = "silu"
    qk_norm: str | None = None
    use_rope: bool = False
    gate: bool = True
    gate_bias: bool = False
    use_D: bool = False
    learn_A: bool = True
    window: int = 0
    sink: bool = False
    chunk_size: int = 64

    @classmethod
    def from_dict(cls, values):
        """Build from a plain dict.

        Raises:
            ValueError: For an unknown key or value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown mixer key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
        config = cls(**values)
        if config.qk_norm not in (None, "layernorm", "l2"):
            raise ValueError(f"unknown mixer.qk_norm {config.qk_norm!r}, expected None, 'layernorm' or 'l2'")
        if config.conv_activation not in (None, "silu"):
            raise ValueError(f"unknown mixer.conv_activation {config.conv_activation!r}, expected None or 'silu'")
        if config.conv_kernel == 1 or config.conv_kernel < 0:
            raise ValueError(f"mixer.conv_kernel is {config.conv_kernel}, expected 0 or at least 2")
        if config.window == 1 or config.window < 0:
            raise ValueError(f"mixer.window is {config.window}, expected 0 or at least 2")
        if config.sink and not config.window:
            raise ValueError("mixer.sink needs mixer.window")
        if config.chunk_size < 1:
            raise ValueError(f"mixer.chunk_size is {config.chunk_size}, expected at least 1")
        return config


class HybridVLConfig(PreTrainedConfig):
    """A decoder whose layers mix tokens by attention or by Mamba-2, with an optional image front end.

    Attributes:
        layer_types (list[str]): One of ``full_attention`` and ``linear_attention`` per layer.
        mixer (dict): Fields of :class:`MixerConfig`, shared by the linear layers.
        vision (dict | None): None for a text model, else ``{"front_end", "image_size", "patch_size",
            "num_channels", "downsample_ratio"}``; the front end is ``patch`` or ``vit``, which has ``tower``,
            ``tower_config``, ``select_layer`` and ``projector`` besides.
        image_token_id (int | None): Token replaced by a visual vector.
        template (str | None): Name of the conversation template that the model was trained with; None where
            its folder names none.
        num_embedding_layers (int): Leading layers that HoVLE keeps in its holistic embedding.
        embedding_overrides (dict | None): Of ``rope_parameters``, ``max_position_embeddings`` and
            ``rms_norm_eps``, those in which the holistic embedding differs from the language model.
        key_layout (str | None): Which of its family's layouts of tensor names the weights came in.
    """

    model_type = "hybrid_vl"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    layer_types: list[str] | None = None
    mixer: dict | None = None
    vision: dict | None = None
    image_token_id: int | None = None
    template: str | None = "internlm2-chat"
    num_embedding_layers: int = 0
    embedding_overrides: dict | None = None
    key_layout: str | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        check_layer_types(self.layer_types, self.num_hidden_layers)
        self.mixer = dataclasses.asdict(MixerConfig.from_dict(self.mixer or {}))
        super().__post_init__(**kwargs)

    def embedding_config(self):
        """HybridVLConfig: This configuration as the holistic embedding's layers see it."""
        config = copy.deepcopy(self)
        for key, value in (self.embedding_overrides or {}).items():
            setattr(config, key, value)
        return config

    @property
    def mixer_config(self):
        """MixerConfig: The mixer's fields as an object."""
        return MixerConfig.from_dict(self.mixer)

    @property
    def tokens_per_tile(self):
        """int: Visual tokens of one tile; 0 for a text model."""
        if self.vision is None:
            return 0
        side = self.vision["image_size"] // self.vision["patch_size"]
        return int(side * side * self.vision["downsample_ratio"] ** 2)

    def cache_bytes(self, length, dtype_bytes=2):
        """Bytes that one sequence's cache takes after ``length`` tokens.

        Keys, values and convolution inputs are counted at ``dtype_bytes``; the SSM state is fp32.

        Args:
            length (int): Tokens seen.
            dtype_bytes (int): Bytes per activation.

        Returns:
            int: Bytes.
        """
        heads, kv_heads, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        mixer = self.mixer_config
        attention = 2 * kv_heads * width * length * dtype_bytes
        convolution = (heads + 2 * kv_heads) * width * max(mixer.conv_kernel - 1, 0) * dtype_bytes
        window = (2 * kv_heads * width + 1) * max(mixer.window - 1, 0) * dtype_bytes
        linear = heads * width * width * 4 + convolution + window
        return sum(attention if kind == "full_attention" else linear for kind in self.layer_types)


def check_layer_types(layer_types, num_layers):
    """Check the per-layer mixer list.

    Raises:
        ValueError: For an unknown word or a wrong length.
    """
    for index, word in enumerate(layer_types):
        if word not in LAYER_TYPES:
            raise ValueError(f"layer_types[{index}] is {word!r}, expected {' or '.join(LAYER_TYPES)}")
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types names {len(layer_types)} layers, the model has {num_layers}")


def layer_types_from_attention(attention_layers, num_layers):
    """Layer types of a model that keeps attention only in the given layers.

    Args:
        attention_layers (list[int]): Global indices of the layers that keep attention.
        num_layers (int): Number of layers.

    Returns:
        list[str]: One word per layer.

    Raises:
        ValueError: For an index outside the model or named twice.
    """
    for index in attention_layers:
        if not isinstance(index, int) or not 0 <= index < num_layers:
            raise ValueError(f"attention layer {index!r} is out of range, the model has layers 0 to {num_layers - 1}")
    if len(set(attention_layers)) != len(attention_layers):
        raise ValueError(f"attention_layers names a layer twice: {sorted(attention_layers)}")
    return ["full_attention" if i in set(attention_layers) else "linear_attention" for i in range(num_layers)]
