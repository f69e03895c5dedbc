"""Key map of Llama-shaped text models: Llama 2 and 3, SmolLM2, vicuna."""

import copy

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from ..errors import UserError
from ..modeling.configuration import HybridVLConfig
from .refusals import refuse_unsupported

NAME = "Llama"

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ATTENTION, MIXER = ".self_attn.", ".mixer."
# Old checkpoints store the rotary frequencies, which every model computes itself.
UNREAD_SUFFIX, UNREAD = ".rotary_emb.inv_freq", "unread."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def matches(raw):
    """bool: Whether a config.json describes this family."""
    return raw.get("model_type") == "llama"


def model_config(raw, where="config.json"):
    """Translate a Llama config.json, of transformers 4 or 5.

    Args:
        raw (dict): Its content, or the text part of a larger one.
        where (str): The file's name, for messages.

    Returns:
        HybridVLConfig: Attention everywhere, no image front end, no template.

    Raises:
        UserError: For broken fields or a variant that this map does not cover.
    """
    if raw.get("attention_bias"):
        raise UserError(f"{where}: attention_bias is true: a bias of the output projection is not supported")
    return text_config(LlamaConfig, raw, where, attention_bias=False)


def processor_settings(raw, where="config.json"):
    """dict: Nothing; a text model has no tiles."""
    return {}


def to_model(config, state):
    """Rename Llama's tensors.

    Args:
        config (HybridVLConfig): Unused; part of the map's contract.
        state (dict[str, Tensor]): Llama's tensors.

    Returns:
        dict[str, Tensor]: Our names; unread tensors under ``unread.``.
    """
    return {
        UNREAD + key if key.endswith(UNREAD_SUFFIX) else key.replace(ATTENTION, MIXER): tensor
        for key, tensor in state.items()
    }


def to_checkpoint(config, state):
    """Inverse of :func:`to_model`.

    Args:
        config (HybridVLConfig): Tells whether the head is the embedding.
        state (dict[str, Tensor]): Our tensors of an all-attention model; a head that shares the embedding's
            memory is not stored twice.

    Returns:
        dict[str, Tensor]: Llama's names.
    """
    return {
        key.removeprefix(UNREAD) if key.startswith(UNREAD) else key.replace(MIXER, ATTENTION): tensor
        for key, tensor in without_shared_head(config, state).items()
    }


def without_shared_head(config, state):
    """Leave the language head out where it is the embedding itself.

    Args:
        config (HybridVLConfig): Tells whether the two are tied.
        state (dict[str, Tensor]): Our tensors.

    Returns:
        dict[str, Tensor]: The same, without a head in the embedding's memory.
    """
    pair = [state.get(EMBEDDING), state.get(HEAD)]
    if config.tie_word_embeddings and None not in pair and pair[0].data_ptr() == pair[1].data_ptr():
        return {key: tensor for key, tensor in state.items() if key != HEAD}
    return state


def text_config(config_class, raw, where, attention_bias):
    """Translate a config.json that a transformers class can read; missing keys are that class's own.

    Args:
        config_class (type[PreTrainedConfig]): Such as ``LlamaConfig``.
        raw (dict): Content of config.json.
        where (str): The file's name, for messages.
        attention_bias (bool): Whether q, k and v have a bias.

    Returns:
        HybridVLConfig: Attention everywhere.

    Raises:
        UserError: For broken fields or an architecture outside this decoder.
    """
    refuse_unsupported(raw, where)
    try:
        fields = config_class.from_dict(copy.deepcopy(raw))
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is no {config_class.model_type} configuration: {reason}") from error
    rope = {key: value for key, value in fields.rope_parameters.items() if key not in ("type", "partial_rotary_factor")}
    check_variant(rope["rope_type"], fields.hidden_act, where)
    return HybridVLConfig(
        architectures=["HybridVLForCausalLM"],
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_hidden_layers=fields.num_hidden_layers,
        num_attention_heads=fields.num_attention_heads,
        num_key_value_heads=fields.num_key_value_heads,
        head_dim=getattr(fields, "head_dim", None),
        hidden_act=fields.hidden_act,
        rms_norm_eps=fields.rms_norm_eps,
        max_position_embeddings=fields.max_position_embeddings,
        rope_parameters=rope,
        attention_bias=attention_bias,
        mlp_bias=getattr(fields, "mlp_bias", False),
        initializer_range=fields.initializer_range,
        tie_word_embeddings=fields.tie_word_embeddings,
        pad_token_id=fields.pad_token_id,
        bos_token_id=fields.bos_token_id,
        eos_token_id=fields.eos_token_id,
        template=None,
    )


def check_variant(rope_type, hidden_act, where):
    """Refuse rotary scalings and activations that the decoder does not have.

    Args:
        rope_type (str): Kind of rotary scaling.
        hidden_act (str): Activation of the MLPs.
        where (str): The file's name, for messages.

    Raises:
        UserError: For an unknown word.
    """
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise UserError(f"{where}: rotary scaling {rope_type!r} is not supported, expected one of {known}")
    if hidden_act not in ACT2FN:
        raise UserError(f"{where}: hidden_act is {hidden_act!r}, expected an activation such as 'silu'")
