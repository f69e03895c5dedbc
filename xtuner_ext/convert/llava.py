"""Key map of LLaVA-1.5: CLIP and a two-layer MLP in front of a Llama decoder.

Checkpoints come in two kinds of folders: transformers' ("llava" with a ``vision_config``) and the authors'
own, whose CLIP tower lies in a folder of its own.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig

from ..errors import UserError
from ..modeling.processing import IMAGE_PLACEHOLDER, NORMALISATION
from ..modeling.vit import tower_depth
from .checkpoint import read_config_json, read_json, read_state
from .llama import EMBEDDING, HEAD
from .vision_language import TEXT_MAPS, mark_unread, need, refuse_other, split_vision, text_map

NAME = "LLaVA"

TOWER_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
TEMPLATES = {"llama": "vicuna_v1", "qwen2": "qwen_chat"}
ORIGINAL = "original"
ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."


def _transformers_layout(outer, language, tower):
    return {
        f"{outer}{tower}": "vision.tower.",
        f"{outer}multi_modal_projector.linear_1.": "vision.projector.0.",
        f"{outer}multi_modal_projector.linear_2.": "vision.projector.2.",
        f"{outer}language_model.": language,
    }


# Prefixes, theirs to ours, by the name of the layout. A checkpoint has the first layout whose first prefix it has.
LAYOUTS = {
    ORIGINAL: {
        "model.mm_projector.0.": "vision.projector.0.",
        "model.mm_projector.2.": "vision.projector.2.",
        ORIGINAL_TOWER: "vision.tower.",
    },
    # On the hub; what transformers 5 writes of a model that it built; what its modules are called.
    "hub": _transformers_layout("", "", "vision_tower.vision_model."),
    "transformers": _transformers_layout("", "", "vision_tower."),
    "nested-4": _transformers_layout("model.", "model.", "vision_tower.vision_model."),
    "nested-5": _transformers_layout("model.", "model.", "vision_tower."),
}


def matches(raw):
    """bool: Whether a config.json describes this family."""
    return raw.get("model_type") in ("llava", "llava_llama")


def model_config(raw, where="config.json"):
    """Translate LLaVA's config.json of either kind.

    Args:
        raw (dict): Its content.
        where (str): The file's path; the authors' ``mm_vision_tower`` may be relative to its folder.

    Returns:
        HybridVLConfig: Attention everywhere.

    Raises:
        UserError: For a missing field or tower, or a variant that this map does not cover.
    """
    if _is_original(raw):
        config, tower, select = _original_config(raw, where)
    else:
        config, tower, select = _transformers_config(raw, where)
    config.vision = {
        "front_end": "vit",
        "tower": "clip",
        "tower_config": tower,
        "image_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "num_channels": tower["num_channels"],
        "downsample_ratio": 1.0,
        "select_layer": select,
        "projector": "mlp2x_gelu",
    }
    tower_depth(config.vision)
    return config


def processor_settings(raw, where="config.json"):
    """Image processing of LLaVA's folder as arguments of ``HybridVLProcessor``.

    Args:
        raw (dict): Content of config.json.
        where (str): The file's path; a preprocessor_config.json beside it, or beside the authors' tower, is read.

    Returns:
        dict: One tile an image, which ``<image>`` itself stands for.

    Raises:
        UserError: For an image processing that ``HybridVLProcessor`` does not do.
    """
    original = _is_original(raw)
    folder = _tower_folder(raw, where) if original else Path(where).parent
    size = model_config(raw, where).vision["image_size"]
    fields, file = read_image_processor(folder)
    pad = raw.get("image_aspect_ratio") == "pad" if original else fields.get("do_pad", False)
    name = find_normalisation(fields, file)
    _check_size(fields, file, size, pad)
    return {
        "image_size": size,
        "max_tiles": 1,
        "use_thumbnail": False,
        "normalisation": name,
        "fit": "pad" if pad else "crop",
        "image_start": "",
        "image_context": IMAGE_PLACEHOLDER,
        "image_end": "",
    }


def companion_state(raw, where, state, structure_only=False):
    """Tensors of the tower that the authors' checkpoints leave in its own folder.

    Args:
        raw (dict): Content of config.json.
        where (str): The file's path.
        state (dict[str, Tensor]): The checkpoint's own tensors.
        structure_only (bool): Read shapes and dtypes; the tensors are on meta.

    Returns:
        dict[str, Tensor]: In the checkpoint's layout; empty when it has a tower.
    """
    if not _is_original(raw) or any(key.startswith(ORIGINAL_TOWER) for key in state):
        return {}
    tower = read_state(_tower_folder(raw, where), structure_only)
    inner = "vision_model."
    if any(key.startswith(inner) for key in tower):
        tower = {key.removeprefix(inner): tensor for key, tensor in tower.items() if key.startswith(inner)}
    return {ORIGINAL_TOWER + key: tensor for key, tensor in tower.items()}


def to_model(config, state):
    """Rename LLaVA's tensors and note their layout in ``config.key_layout``.

    The authors' layout has no token for images; the vocabulary gets one more row, the mean of the others.

    Args:
        config (HybridVLConfig): From :func:`model_config`.
        state (dict[str, Tensor]): LLaVA's tensors, of any layout.

    Returns:
        dict[str, Tensor]: Our names; unread tensors under ``unread.``.
    """
    config.key_layout = _find_layout(state)
    vision, text = split_vision(_rename(state, LAYOUTS[config.key_layout]))
    text = TEXT_MAPS["llama"].to_model(config, text)
    if config.key_layout == ORIGINAL:
        for key in {EMBEDDING, HEAD} & set(text):
            rows = text[key]
            text[key] = torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])
    return {**text, **mark_unread(config.vision, vision)}


def to_checkpoint(config, state):
    """Inverse of :func:`to_model`.

    Args:
        config (HybridVLConfig): Names the layout; hub checkpoints' when it names none.
        state (dict[str, Tensor]): Our tensors of an all-attention model.

    Returns:
        dict[str, Tensor]: LLaVA's names.
    """
    layout = config.key_layout or "hub"
    vision, text = split_vision(state)
    text = TEXT_MAPS["llama"].to_checkpoint(config, text)
    if layout == ORIGINAL:
        text.update({key: text[key][: config.image_token_id] for key in {EMBEDDING, HEAD} & set(text)})
    back = {ours: theirs for theirs, ours in LAYOUTS[layout].items()}
    return {**_rename(vision, back), **_rename(text, {o: t for o, t in back.items() if not o.startswith("vision.")})}


def _find_layout(state):
    for name, prefixes in LAYOUTS.items():
        first = next(iter(prefixes))
        if any(key.startswith(first) for key in state):
            return name
    # A broken checkpoint: the names of its missing tensors will say so.
    return "hub"


def _rename(state, prefixes):
    renamed = {}
    for key, tensor in state.items():
        found = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        renamed[key if found is None else prefixes[found] + key.removeprefix(found)] = tensor
    return renamed


def _is_original(raw):
    return "vision_config" not in raw and bool(raw.get("mm_vision_tower"))


def _transformers_config(raw, where):
    fields = need(raw, "vision_config", where)
    refuse_other(fields, {"model_type": "clip_vision_model"}, f"{where}: vision_config")
    expected = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "default",
    }
    refuse_other(raw, expected, where)
    select = raw.get("vision_feature_layer", -2)
    if not isinstance(select, int):
        raise UserError(f"{where}: vision_feature_layer is {select}, only one layer is supported")
    text = {"model_type": "llama", **need(raw, "text_config", where)}
    family = text["model_type"]
    if family not in TEMPLATES:
        raise UserError(f"{where}: text_config.model_type is {family!r}, expected one of {', '.join(TEMPLATES)}")
    config = text_map(family, f"{where}: text_config").model_config(text, f"{where}: text_config")
    config.image_token_id = raw.get("image_token_index", raw.get("image_token_id"))
    if config.image_token_id is None or config.image_token_id >= config.vocab_size:
        raise UserError(
            f"{where}: image_token_index is {config.image_token_id}, expected one below "
            f"text_config.vocab_size {config.vocab_size}"
        )
    if raw.get("pad_token_id") is not None:
        config.pad_token_id = raw["pad_token_id"]
    config.template = TEMPLATES[family]
    return config, _tower_fields(fields), select


def _original_config(raw, where):
    expected = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
    }
    # Their code takes a linear projector when the field is missing.
    refuse_other({"mm_projector_type": "linear", **raw}, expected, where)
    if raw.get("image_aspect_ratio", "square") not in ("square", "pad"):
        raise UserError(
            f"{where}: image_aspect_ratio is {raw['image_aspect_ratio']!r}, expected 'pad' or 'square' as in LLaVA-1.5"
        )
    folder = _tower_folder(raw, where)
    fields = read_config_json(folder)
    fields = fields.get("vision_config", fields) if fields.get("model_type") == "clip" else fields
    refuse_other(fields, {"model_type": "clip_vision_model"}, folder / "config.json")
    config = TEXT_MAPS["llama"].model_config({**raw, "model_type": "llama"}, where)
    config.image_token_id, config.vocab_size = config.vocab_size, config.vocab_size + 1
    config.template, config.key_layout = TEMPLATES["llama"], ORIGINAL
    return config, _tower_fields(fields), need(raw, "mm_vision_select_layer", where)


def _tower_fields(fields):
    full = CLIPVisionConfig.from_dict({key: fields[key] for key in TOWER_FIELDS if key in fields})
    return {key: getattr(full, key) for key in TOWER_FIELDS}


def _tower_folder(raw, where):
    name = raw["mm_vision_tower"]
    beside = Path(where).parent / name
    for folder in (beside, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{where}: mm_vision_tower is {name!r}, which is no local folder: put that CLIP model, with its config.json, "
        f"weights and preprocessor_config.json, into {beside}"
    )


def read_image_processor(folder):
    """tuple[dict, Path | None]: Settings of transformers' image processor in a folder, and their file; or empty."""
    # transformers 5 may keep them inside the processor's file.
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            fields = read_json(path)
            fields = fields if section is None else fields.get(section)
            if fields:
                return fields, path
    return {}, None


def find_normalisation(fields, file):
    """Name of an image processor's mean and deviation.

    Args:
        fields (dict): Its settings.
        file (Path | None): Where they stand, for messages.

    Returns:
        str: A key of ``NORMALISATION``; CLIP's where nothing is set.

    Raises:
        UserError: For other numbers.
    """
    found = fields.get("image_mean"), fields.get("image_std")
    if found == (None, None):
        return "clip"
    for name, values in NORMALISATION.items():
        if all(np.shape(a) == (3,) and np.allclose(a, b, atol=1e-6) for a, b in zip(found, values)):
            return name
    raise UserError(
        f"{file}: image_mean {found[0]} with image_std {found[1]} is none of the known normalisations: "
        f"{', '.join(NORMALISATION)}"
    )


def _check_size(fields, file, size, pad):
    steps = ("do_resize", "do_rescale", "do_normalize") + (() if pad else ("do_center_crop",))
    refuse_other(fields, {**dict.fromkeys(steps, True), "resample": 3}, file)
    square = ({"height": size, "width": size}, size)
    shortest = ({"shortest_edge": size}, size)
    if fields.get("size", size) not in (shortest + square if pad else shortest):
        raise UserError(f"{file}: size is {fields['size']}, expected {shortest[0]} as the vision tower has it")
    if fields.get("crop_size", size) not in square:
        raise UserError(f"{file}: crop_size is {fields['crop_size']}, expected {square[0]} as the vision tower has it")
