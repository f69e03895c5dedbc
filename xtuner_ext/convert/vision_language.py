"""What the key maps of vision-language families share."""

from pathlib import Path

from ..errors import UserError
from ..modeling.vit import tower_depth
from . import internlm2, llama, qwen2
from .checkpoint import read_json

TEXT_MAPS = {"internlm2": internlm2, "llama": llama, "qwen2": qwen2}
TOWER, UNREAD = "vision.tower.", "unread."
LAYERS = (TOWER + "encoder.layer.", TOWER + "encoder.layers.")


def need(raw, path, where):
    """Look a field of config.json up.

    Args:
        raw (dict): Content of config.json.
        path (str): Names joined by dots, such as ``vision_config.hidden_size``.
        where (str): The file's name, for messages.

    Returns:
        object: The value.

    Raises:
        UserError: When it is missing.
    """
    for name in path.split("."):
        if not isinstance(raw, dict) or name not in raw:
            raise UserError(f"{where}: {path} is missing")
        raw = raw[name]
    return raw


def refuse_other(raw, expected, where):
    """Insist on the variants that a map covers.

    Args:
        raw (dict): Content of config.json or of a part of it.
        expected (dict): Supported value by field; a field that is absent passes.
        where (str): The file's name, for messages.

    Raises:
        UserError: For another value.
    """
    for field, value in expected.items():
        if raw.get(field, value) != value:
            raise UserError(f"{where}: {field} is {raw[field]!r}, only {value!r} is supported")


def tiling(raw, image_size, where):
    """Tiling of InternVL's config.json as arguments of ``HybridVLProcessor``.

    Args:
        raw (dict): Content of config.json.
        image_size (int): Side of a tile in pixels where ``force_image_size`` gives none.
        where (str): The file's name, for messages.

    Returns:
        dict: ``image_size``, ``min_tiles``, ``max_tiles`` and ``use_thumbnail``.

    Raises:
        UserError: For a missing field; the tiling is never guessed.
    """
    names = ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
    dynamic, fewest, most, thumbnail = (need(raw, name, where) for name in names)
    return {
        "image_size": raw.get("force_image_size") or image_size,
        "min_tiles": fewest if dynamic else 1,
        "max_tiles": most if dynamic else 1,
        "use_thumbnail": thumbnail,
    }


def text_map(model_type, where):
    """Find the key map of the language part.

    Args:
        model_type (str): Its model type.
        where (str): File and field, for messages.

    Returns:
        module: The map.

    Raises:
        UserError: For a type that no map covers.
    """
    if model_type not in TEXT_MAPS:
        raise UserError(f"{where} has model_type {model_type!r}, expected one of {', '.join(TEXT_MAPS)}")
    return TEXT_MAPS[model_type]


def mark_unread(vision, state):
    """Set aside the tower's tensors that no forward pass reads, under ``unread.``.

    Args:
        vision (dict): ``config.vision``.
        state (dict[str, Tensor]): Tensors under our names.

    Returns:
        dict[str, Tensor]: The same tensors.
    """
    depth = tower_depth(vision)

    def unread(key):
        for prefix in LAYERS:
            if key.startswith(prefix):
                return int(key.removeprefix(prefix).split(".")[0]) >= depth
        return key.startswith(TOWER + "post_layernorm.") or key == TOWER + "embeddings.position_ids"

    return {UNREAD + key if unread(key) else key: tensor for key, tensor in state.items()}


def split_vision(state):
    """Part our tensors.

    Args:
        state (dict[str, Tensor]): Our names; unread ones under ``unread.``.

    Returns:
        tuple[dict, dict]: The front end's, without ``unread.``, and the language part's as they are.
    """
    vision, text = {}, {}
    for key, tensor in state.items():
        name = key.removeprefix(UNREAD)
        if name.startswith("vision."):
            vision[name] = tensor
        else:
            text[key] = tensor
    return vision, text


def added_token_id(folder, token):
    """Id of a token that was added to a tokenizer, read from its files so that none of its code runs.

    Args:
        folder (str | Path): Model folder.
        token (str): Such as ``<IMG_CONTEXT>``.

    Returns:
        int: Its id.

    Raises:
        UserError: When no file of the folder names it.
    """
    readers = {
        "added_tokens.json": lambda content: content,
        "tokenizer_config.json": lambda content: {
            entry["content"]: int(index) for index, entry in content.get("added_tokens_decoder", {}).items()
        },
        "tokenizer.json": lambda content: {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())},
    }
    for name, read in readers.items():
        path = Path(folder) / name
        if path.is_file() and token in (ids := read(read_json(path))):
            return ids[token]
    raise UserError(f"{folder} has no token {token}: expected it in one of {', '.join(readers)}")
