"""The parts of a model that a config tunes or freezes by name."""

import re

from torch import nn

from ..errors import UserError

# Where LoRA can lie, and what else can be frozen.
LORA_PARTS = ("language", "mixers", "vision", "projector")
PARTS = (*LORA_PARTS, "embeddings", "head")


def as_dict(value, key):
    """dict: A copy of a config's value; UserError naming its key where it is no dict."""
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}, expected a dict")
    return dict(value)


def part_of(llm, name):
    """Tell which part of a model a module or parameter belongs to.

    Args:
        llm (HybridVLForCausalLM): The model.
        name (str): Such as ``model.layers.3.mlp.up_proj``.

    Returns:
        str: ``projector``, ``vision`` (the tower or patches), ``embeddings``, ``head``, ``mixers`` (all that mixes
        tokens in layers of Mamba-2) or ``language`` (the rest of the decoder, its attention included).
    """
    for prefix, part in (
        ("vision.projector", "projector"),
        ("vision", "vision"),
        ("model.embed_tokens", "embeddings"),
        ("lm_head", "head"),
    ):
        if name == prefix or name.startswith(prefix + "."):
            return part
    found = re.match(r"model\.layers\.(\d+)\.mixer(\.|$)", name)
    linear = found and llm.config.layer_types[int(found[1])] == "linear_attention"
    return "mixers" if linear else "language"


def linear_layers(llm, part):
    """Linear layers of a part.

    Args:
        llm (HybridVLForCausalLM): The model.
        part (str): One of ``LORA_PARTS``.

    Returns:
        dict[str, nn.Linear]: By name.
    """
    linears = {name: module for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if part_of(llm, name) == part}


def freeze_parts(llm, freeze, default):
    """Set which parts of a model train.

    Args:
        llm (HybridVLForCausalLM): The model.
        freeze (dict): Bool by part of ``PARTS``, and ``unfreeze_vit_layers``, the number of the tower's last layers
            that train although ``vision`` is frozen.
        default (bool): For parts that ``freeze`` does not name.

    Raises:
        UserError: For an unknown key, a part that the model does not have, or a head that is the embedding and
            is to be treated otherwise.
    """
    freeze = as_dict(freeze, "model.freeze")
    if unknown := sorted(set(freeze) - {*PARTS, "unfreeze_vit_layers"}):
        known = ", ".join((*PARTS, "unfreeze_vit_layers"))
        raise UserError(f"unknown key model.freeze.{unknown[0]}, expected one of {known}")
    layers = freeze.pop("unfreeze_vit_layers", 0)
    present = {part_of(llm, name) for name, _ in llm.named_parameters()}
    if llm.config.tie_word_embeddings:
        present.add("head")
        both = [freeze.get(part, default) for part in ("embeddings", "head")]
        if both[0] != both[1]:
            raise UserError("model.freeze treats embeddings and head differently, but this model has one for both")
    for part, frozen in freeze.items():
        if not isinstance(frozen, bool):
            raise UserError(f"model.freeze.{part} is {frozen!r}, expected True or False")
        if part not in present and not frozen:
            raise UserError(f"model.freeze.{part} is False, but the model has no such part")
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(not freeze.get(part_of(llm, name), default))
    if layers:
        _unfreeze_last(llm, layers)


def _unfreeze_last(llm, count):
    tower = getattr(getattr(llm, "vision", None), "tower", None)
    # transformers names the list of a tower's layers "layer" or "layers".
    encoder = getattr(tower, "encoder", None)
    layers = getattr(encoder, "layer", None) or getattr(encoder, "layers", None)
    if layers is None:
        raise UserError(f"model.freeze.unfreeze_vit_layers is {count}, but the model has no vision tower")
    if not isinstance(count, int) or not 0 < count <= len(layers):
        raise UserError(
            f"model.freeze.unfreeze_vit_layers is {count!r}, expected 0 to {len(layers)}, the layers of the tower"
        )
    layers[-count:].requires_grad_(True)
