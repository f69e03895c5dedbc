"""Key map of Qwen2 and Qwen2.5 text models: Llama's, plus a bias of q, k and v."""

from transformers import Qwen2Config

from .llama import processor_settings, text_config, to_checkpoint, to_model

__all__ = ["NAME", "matches", "model_config", "processor_settings", "to_checkpoint", "to_model"]

NAME = "Qwen2"


def matches(raw):
    """bool: Whether a config.json describes this family."""
    return raw.get("model_type") == "qwen2"


def model_config(raw, where="config.json"):
    """Translate a Qwen2 config.json, of transformers 4 or 5.

    Args:
        raw (dict): Its content, or the text part of a larger one.
        where (str): The file's name, for messages.

    Returns:
        HybridVLConfig: Attention everywhere, no image front end, no template.

    Raises:
        UserError: For broken fields or a variant that this map does not cover.
    """
    return text_config(Qwen2Config, raw, where, attention_bias=True)
