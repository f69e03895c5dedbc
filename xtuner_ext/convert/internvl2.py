"""Key map of InternVL2: InternViT, pixel shuffle and an MLP in front of an InternLM2, Qwen2 or Llama decoder."""

from pathlib import Path

import torch

from ..errors import UserError
from ..modeling.processing import IMAGE_CONTEXT
from ..modeling.vit import tower_depth
from .vision_language import TEXT_MAPS, added_token_id, mark_unread, need, refuse_other, split_vision, text_map, tiling

NAME = "InternVL2"

LANGUAGE = "language_model."
FIXED_KEYS = {
    "vision_model.embeddings.class_embedding": "vision.tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "vision.tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": "vision.tower.embeddings.patch_embeddings.projection.weight",
    "vision_model.embeddings.patch_embedding.bias": "vision.tower.embeddings.patch_embeddings.projection.bias",
    **{
        f"mlp1.{index}.{kind}": f"vision.projector.{index}.{kind}"
        for index in (0, 1, 3)
        for kind in ("weight", "bias")
    },
}
THEIR_LAYERS, OUR_LAYERS = "vision_model.encoder.layers.", "vision.tower.encoder.layer."
LAYER_PARTS = {
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp.": "mlp.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
PACKED_PART, PROJECTIONS = "attn.qkv.", ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")

# transformers' InternViT has this epsilon in its query and key norms, the original that of its other norms.
QK_NORM_EPS = 1e-6


def matches(raw):
    """bool: Whether a config.json describes this family; HoVLE has the same model type and no vision tower."""
    return raw.get("model_type") == "internvl_chat" and "embedding_config" not in raw


def model_config(raw, where="config.json"):
    """Translate InternVL2's config.json.

    Args:
        raw (dict): Its content.
        where (str): The file's path; the tokenizer's files beside it give the id of the image token.

    Returns:
        HybridVLConfig: Attention everywhere.

    Raises:
        UserError: For a missing field or a variant that this map does not cover.
    """
    llm, tower = need(raw, "llm_config", where), _tower_config(raw, where)
    # Their configuration class has "v1", which transposes the shuffled picture.
    refuse_other({"ps_version": "v1", **raw}, {"ps_version": "v2"}, where)
    for field in ("use_llm_lora", "use_backbone_lora"):
        if raw.get(field):
            raise UserError(f"{where}: {field} is {raw[field]}: merge the adapter into the weights first")
    layout = llm.get("model_type")
    config = text_map(layout, f"{where}: llm_config").model_config(llm, f"{where}: llm_config")
    config.key_layout = layout
    config.vision = {
        "front_end": "vit",
        "tower": "intern_vit",
        "tower_config": tower,
        "image_size": raw.get("force_image_size") or tower["image_size"],
        "patch_size": tower["patch_size"],
        "num_channels": tower["num_channels"],
        "downsample_ratio": need(raw, "downsample_ratio", where),
        "select_layer": need(raw, "select_layer", where),
        "projector": "mlp1",
    }
    tower_depth(config.vision)
    side = config.vision["image_size"] / config.vision["patch_size"] * config.vision["downsample_ratio"]
    if side != int(side):
        size = config.vision["image_size"]
        raise UserError(f"{where}: a tile of {size} pixels gives {side} tokens a side, expected a whole number")
    config.image_token_id = added_token_id(Path(where).parent, IMAGE_CONTEXT)
    if config.image_token_id >= config.vocab_size:
        raise UserError(
            f"{where}: llm_config.vocab_size is {config.vocab_size}, "
            f"but {IMAGE_CONTEXT} has the id {config.image_token_id}"
        )
    config.template = need(raw, "template", where)
    return config


def processor_settings(raw, where="config.json"):
    """Tiling of InternVL2's config.json as arguments of ``HybridVLProcessor``.

    Args:
        raw (dict): Content of config.json.
        where (str): The file's name, for messages.

    Returns:
        dict: ``image_size``, ``min_tiles``, ``max_tiles`` and ``use_thumbnail``.

    Raises:
        UserError: For a missing field; the tiling is never guessed.
    """
    return tiling(raw, need(raw, "vision_config.image_size", where), where)


def to_model(config, state):
    """Rename InternVL2's tensors, splitting the packed projections.

    Args:
        config (HybridVLConfig): From :func:`model_config`.
        state (dict[str, Tensor]): InternVL2's tensors.

    Returns:
        dict[str, Tensor]: Our names; unread tensors under ``unread.``.
    """
    vision, text = {}, {}
    for key, tensor in state.items():
        if key.startswith(LANGUAGE):
            text[key.removeprefix(LANGUAGE)] = tensor
            continue
        index, _, suffix = key.removeprefix(THEIR_LAYERS).partition(".")
        part = next((part for part in LAYER_PARTS if suffix.startswith(part)), None)
        if key.startswith(THEIR_LAYERS) and suffix.startswith(PACKED_PART):
            kind = suffix.removeprefix(PACKED_PART)
            names = (f"{OUR_LAYERS}{index}.{name}{kind}" for name in PROJECTIONS)
            vision.update(zip(names, tensor.chunk(3)))
        elif key.startswith(THEIR_LAYERS) and part is not None:
            vision[f"{OUR_LAYERS}{index}.{LAYER_PARTS[part]}{suffix.removeprefix(part)}"] = tensor
        else:
            vision[FIXED_KEYS.get(key, key)] = tensor
    return {**TEXT_MAPS[config.key_layout].to_model(config, text), **mark_unread(config.vision, vision)}


def to_checkpoint(config, state):
    """Inverse of :func:`to_model`.

    Args:
        config (HybridVLConfig): From :func:`model_config`.
        state (dict[str, Tensor]): Our tensors of an all-attention model.

    Returns:
        dict[str, Tensor]: InternVL2's names and packing.
    """
    fixed = {ours: theirs for theirs, ours in FIXED_KEYS.items()}
    parts = {ours: theirs for theirs, ours in LAYER_PARTS.items()}
    vision, text = split_vision(state)
    renamed = {LANGUAGE + k: t for k, t in TEXT_MAPS[config.key_layout].to_checkpoint(config, text).items()}
    for key, tensor in vision.items():
        index, _, suffix = key.removeprefix(OUR_LAYERS).partition(".")
        part = next((part for part in parts if suffix.startswith(part)), None)
        if key in fixed:
            renamed[fixed[key]] = tensor
        elif suffix.startswith(PROJECTIONS[0]):
            kind = suffix.removeprefix(PROJECTIONS[0])
            tensors = [vision[f"{OUR_LAYERS}{index}.{name}{kind}"] for name in PROJECTIONS]
            renamed[f"{THEIR_LAYERS}{index}.{PACKED_PART}{kind}"] = torch.cat(tensors)
        elif part is not None:
            renamed[f"{THEIR_LAYERS}{index}.{parts[part]}{suffix.removeprefix(part)}"] = tensor
    return renamed


def _tower_config(raw, where):
    """Translate ``vision_config`` to the fields of transformers' ``InternVLVisionConfig``."""
    fields = need(raw, "vision_config", where)
    refuse_other(fields, {"model_type": "intern_vit_6b"}, f"{where}: vision_config")
    names = {
        **{name: name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        **{name: name for name in ("image_size", "patch_size", "norm_type", "layer_norm_eps", "hidden_act")},
        "use_qk_norm": "qk_normalization",
        "attention_bias": "qkv_bias",
    }
    tower = {ours: need(raw, f"vision_config.{theirs}", where) for ours, theirs in names.items()}
    if tower["norm_type"] not in ("layer_norm", "rms_norm"):
        raise UserError(
            f"{where}: vision_config.norm_type is {tower['norm_type']!r}, expected 'layer_norm' or 'rms_norm'"
        )
    if tower["use_qk_norm"] and tower["layer_norm_eps"] != QK_NORM_EPS:
        raise UserError(
            f"{where}: vision_config.layer_norm_eps is {tower['layer_norm_eps']}, "
            f"with qk_normalization only {QK_NORM_EPS} is supported"
        )
    return {**tower, "num_channels": fields.get("num_channels", 3)}
