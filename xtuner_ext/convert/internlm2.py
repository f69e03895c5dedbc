"""Key map of InternLM2 text models, whose q, k and v are one packed projection."""

import torch

from ..errors import UserError
from ..modeling.configuration import HybridVLConfig
from .llama import check_variant, processor_settings, without_shared_head
from .refusals import refuse_unsupported

__all__ = [
    *("NAME", "matches", "model_config", "processor_settings", "to_checkpoint", "to_model"),
    *("LAYER_KEYS", "PACKED_KEY", "PROJECTIONS", "merge_wqkv", "split_wqkv"),
]

NAME = "InternLM2"

FIXED_KEYS = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYERS = "model.layers."
LAYER_KEYS = {
    "attention.wo.weight": "mixer.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
PACKED_KEY = "attention.wqkv.weight"
PROJECTIONS = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight")
UNREAD_SUFFIX, UNREAD = ".rotary_emb.inv_freq", "unread."

# transformers has no class for this family; these are the values of its own configuration class.
DEFAULTS = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


def matches(raw):
    """bool: Whether a config.json describes this family."""
    return raw.get("model_type") == "internlm2"


def model_config(raw, where="config.json"):
    """Translate an InternLM2 config.json.

    Args:
        raw (dict): Its content, or the text part of a larger one.
        where (str): The file's name, for messages.

    Returns:
        HybridVLConfig: Attention everywhere, no image front end, no template.

    Raises:
        UserError: For broken fields or a variant that this map does not cover.
    """
    refuse_unsupported(raw, where)
    fields = {key: raw.get(key, default) for key, default in DEFAULTS.items()}
    if fields.pop("bias"):
        raise UserError(f"{where}: bias is not false: a bias of the attention's projections is not supported")
    scaling, theta = fields.pop("rope_scaling"), fields.pop("rope_theta")
    rope = {"rope_theta": theta, **(raw.get("rope_parameters") or scaling or {})}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    check_variant(rope["rope_type"], fields["hidden_act"], where)
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    return HybridVLConfig(
        architectures=["HybridVLForCausalLM"], attention_bias=False, rope_parameters=rope, template=None, **fields
    )


def to_model(config, state):
    """Rename InternLM2's tensors, splitting the packed projections.

    Args:
        config (HybridVLConfig): Gives head counts.
        state (dict[str, Tensor]): InternLM2's tensors.

    Returns:
        dict[str, Tensor]: Our names; unread tensors under ``unread.``.
    """
    renamed = {}
    for key, tensor in state.items():
        index, _, suffix = key.removeprefix(LAYERS).partition(".")
        if key in FIXED_KEYS:
            renamed[FIXED_KEYS[key]] = tensor
        elif key.endswith(UNREAD_SUFFIX):
            renamed[UNREAD + key] = tensor
        elif key.startswith(LAYERS) and suffix == PACKED_KEY:
            renamed.update(zip((f"{LAYERS}{index}.{name}" for name in PROJECTIONS), split_wqkv(config, tensor)))
        elif key.startswith(LAYERS) and suffix in LAYER_KEYS:
            renamed[f"{LAYERS}{index}.{LAYER_KEYS[suffix]}"] = tensor
        else:
            renamed[key] = tensor
    return renamed


def to_checkpoint(config, state):
    """Inverse of :func:`to_model`.

    Args:
        config (HybridVLConfig): Gives head counts.
        state (dict[str, Tensor]): Our tensors of an all-attention model; a head that shares the embedding's
            memory is not stored twice.

    Returns:
        dict[str, Tensor]: InternLM2's names and packing.
    """
    fixed = {ours: theirs for theirs, ours in FIXED_KEYS.items()}
    layer = {ours: theirs for theirs, ours in LAYER_KEYS.items()}
    renamed = {}
    for key, tensor in without_shared_head(config, state).items():
        if key in fixed or key.startswith(UNREAD):
            renamed[fixed.get(key, key.removeprefix(UNREAD))] = tensor
            continue
        index, _, suffix = key.removeprefix(LAYERS).partition(".")
        if suffix == PROJECTIONS[0]:
            parts = [state[f"{LAYERS}{index}.{name}"] for name in PROJECTIONS]
            renamed[f"{LAYERS}{index}.{PACKED_KEY}"] = merge_wqkv(config, *parts)
        elif suffix in layer:
            renamed[f"{LAYERS}{index}.{layer[suffix]}"] = tensor
    return renamed


def split_wqkv(config, weight):
    """Split InternLM2's packed projection, whose rows are grouped per key/value head as [q.., k, v].

    Args:
        config (HybridVLConfig): Gives head counts.
        weight (Tensor): ((H + 2G) * P, D).

    Returns:
        tuple[Tensor, Tensor, Tensor]: q (H*P, D), k (G*P, D) and v (G*P, D).

    Raises:
        UserError: When the head counts do not give its rows.
    """
    expected = ((config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim, config.hidden_size)
    if tuple(weight.shape) != expected:
        raise UserError(
            f"a packed projection wqkv has shape {tuple(weight.shape)}, expected {expected} from config.json's "
            f"{config.num_attention_heads} heads of width {config.head_dim} and {config.num_key_value_heads} "
            "key/value heads"
        )
    width, per_group = weight.shape[1], config.num_attention_heads // config.num_key_value_heads
    groups = weight.view(config.num_key_value_heads, per_group + 2, config.head_dim, width)
    return (
        groups[:, :per_group].reshape(-1, width),
        groups[:, per_group].reshape(-1, width),
        groups[:, per_group + 1].reshape(-1, width),
    )


def merge_wqkv(config, q, k, v):
    """Inverse of :func:`split_wqkv`."""
    width, groups = q.shape[1], config.num_key_value_heads
    parts = [part.reshape(groups, -1, config.head_dim, width) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, width)
