"""Key map of HoVLE, a decoder-only vision-language model (arXiv 2412.16158).

HoVLE keeps its first layers in ``embedding_model`` and the rest in ``language_model``; here both are one
stack with one global index. Two of its tensors are never read on the image path. They do not become
parameters, but the map carries them under ``unread.`` so that a checkpoint can be written back bit by bit.
"""

from ..errors import UserError
from ..modeling.configuration import HybridVLConfig
from . import internlm2
from .llama import check_variant
from .vision_language import tiling

NAME = "HoVLE"
EMBEDDING_LAYERS, LANGUAGE_LAYERS = "embedding_model.encoder.", "language_model.model.layers."

FIXED_KEYS = {
    "embedding_model.vision_embeddings.class_embedding": "unread.class_embedding",
    "embedding_model.vision_embeddings.position_embedding": "vision.position_embedding",
    "embedding_model.vision_embeddings.patch_embedding.weight": "vision.patch_embedding.weight",
    "embedding_model.vision_embeddings.patch_embedding.bias": "vision.patch_embedding.bias",
    "embedding_model.llm_text_embeddings.weight": "model.embed_tokens.weight",
    "embedding_model.pixel_shuffle_proj.0.weight": "vision.projector.0.weight",
    "embedding_model.pixel_shuffle_proj.0.bias": "vision.projector.0.bias",
    "embedding_model.pixel_shuffle_proj.2.weight": "vision.projector.2.weight",
    "embedding_model.pixel_shuffle_proj.2.bias": "vision.projector.2.bias",
    "language_model.model.tok_embeddings.weight": "unread.tok_embeddings.weight",
    "language_model.model.norm.weight": "model.norm.weight",
    "language_model.output.weight": "lm_head.weight",
}
# Fields in which the two halves must agree, because one stack has one width.
SHARED_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act")


def matches(raw):
    """bool: Whether a config.json describes this family."""
    return "embedding_config" in raw and "llm_config" in raw


def model_config(raw, where="config.json"):
    """Translate HoVLE's config.json.

    Args:
        raw (dict): Its content.
        where (str): The file's name, for messages.

    Returns:
        HybridVLConfig: Attention everywhere.

    Raises:
        UserError: For a missing field or a variant that this map does not cover.
    """
    embedding, llm = raw["embedding_config"], raw["llm_config"]

    def need(section, name, fields):
        if name not in fields:
            raise UserError(f"{where}: {section}.{name} is missing")
        return fields[name]

    for field in SHARED_FIELDS:
        ours, theirs = embedding.get(field), llm.get(field)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(f"{where}: embedding_config.{field} is {ours}, llm_config.{field} is {theirs}: must agree")
    expected = {"pixel_shuffle_loc": "pre", "use_pixel_shuffle_proj": True, "use_ls": False}
    for field, value in expected.items():
        if embedding.get(field, value) != value:
            raise UserError(f"{where}: embedding_config.{field} is {embedding[field]!r}, only {value!r} is supported")
    if embedding.get("special_token_maps"):
        raise UserError(f"{where}: embedding_config.special_token_maps is not empty, which is not supported")
    width, heads = need("llm_config", "hidden_size", llm), need("llm_config", "num_attention_heads", llm)
    embedding_layers = need("embedding_config", "num_hidden_layers", embedding)
    rope, embedding_rope = _rope(llm, "llm_config", need), _rope(embedding, "embedding_config", need)
    for part in (rope, embedding_rope):
        check_variant(part["rope_parameters"]["rope_type"], llm.get("hidden_act", "silu"), where)
    overrides = {key: value for key, value in embedding_rope.items() if rope[key] != value}
    return HybridVLConfig(
        architectures=["HybridVLForCausalLM"],
        vocab_size=need("llm_config", "vocab_size", llm),
        hidden_size=width,
        intermediate_size=need("llm_config", "intermediate_size", llm),
        num_hidden_layers=embedding_layers + need("llm_config", "num_hidden_layers", llm),
        num_attention_heads=heads,
        num_key_value_heads=llm.get("num_key_value_heads") or heads,
        hidden_act=llm.get("hidden_act", "silu"),
        attention_bias=False,
        tie_word_embeddings=False,
        **rope,
        pad_token_id=llm.get("pad_token_id", 0),
        bos_token_id=llm.get("bos_token_id", 1),
        eos_token_id=llm.get("eos_token_id", 2),
        vision={
            "front_end": "patch",
            "image_size": raw.get("force_image_size") or need("embedding_config", "image_size", embedding),
            "patch_size": need("embedding_config", "patch_size", embedding),
            "num_channels": embedding.get("num_channels", 3),
            "downsample_ratio": need("embedding_config", "downsample_ratio", embedding),
        },
        image_token_id=need("embedding_config", "img_context_token_id", embedding),
        template=need("config", "template", raw),
        num_embedding_layers=embedding_layers,
        embedding_overrides=overrides or None,
    )


def processor_settings(raw, where="config.json"):
    """Tiling of HoVLE's config.json as arguments of ``HybridVLProcessor``.

    Args:
        raw (dict): Content of config.json.
        where (str): The file's name, for messages.

    Returns:
        dict: ``image_size``, ``min_tiles``, ``max_tiles`` and ``use_thumbnail``.

    Raises:
        UserError: For a missing field; the tiling is never guessed.
    """
    return tiling(raw, raw["embedding_config"].get("image_size"), where)


def to_model(config, state):
    """Rename HoVLE's tensors, splitting the packed projections.

    Args:
        config (HybridVLConfig): Gives head counts.
        state (dict[str, Tensor]): HoVLE's tensors.

    Returns:
        dict[str, Tensor]: Our names; unread tensors under ``unread.``.
    """
    fixed = {FIXED_KEYS[key]: tensor for key, tensor in state.items() if key in FIXED_KEYS}
    layers = {_stack_key(config, key): tensor for key, tensor in state.items() if key not in FIXED_KEYS}
    return {**internlm2.to_model(config, layers), **fixed}


def to_checkpoint(config, state):
    """Inverse of :func:`to_model`.

    Args:
        config (HybridVLConfig): Gives head counts.
        state (dict[str, Tensor]): Our tensors of an all-attention model.

    Returns:
        dict[str, Tensor]: HoVLE's names and packing.
    """
    theirs = {ours: key for key, ours in FIXED_KEYS.items()}
    fixed = {theirs[key]: tensor for key, tensor in state.items() if key in theirs}
    layers = internlm2.to_checkpoint(config, {key: tensor for key, tensor in state.items() if key not in theirs})
    return {**{_half_key(config, key): tensor for key, tensor in layers.items()}, **fixed}


def unread_shapes(config):
    """Shapes of the tensors that a HoVLE checkpoint has and the model never reads."""
    width = config.hidden_size
    return {"unread.class_embedding": (1, 1, width), "unread.tok_embeddings.weight": (config.vocab_size, width)}


def _rope(fields, section, need):
    scaling = fields.get("rope_scaling") or {"type": "default"}
    rope = {"rope_type": scaling.get("rope_type", scaling.get("type")), "rope_theta": need(section, "rope_theta", fields)}
    rope.update({key: value for key, value in scaling.items() if key not in ("type", "rope_type")})
    return {
        "rope_parameters": rope,
        "max_position_embeddings": need(section, "max_position_embeddings", fields),
        "rms_norm_eps": need(section, "rms_norm_eps", fields),
    }


def _stack_key(config, key):
    """Name of a layer's tensor with the layer's global index."""
    for start, offset in ((EMBEDDING_LAYERS, 0), (LANGUAGE_LAYERS, config.num_embedding_layers)):
        index, _, suffix = key.removeprefix(start).partition(".")
        if key.startswith(start) and index.isdecimal():
            return f"{internlm2.LAYERS}{int(index) + offset}.{suffix}"
    return key


def _half_key(config, key):
    """Inverse of :func:`_stack_key`."""
    index, _, suffix = key.removeprefix(internlm2.LAYERS).partition(".")
    if int(index) < config.num_embedding_layers:
        return f"{EMBEDDING_LAYERS}{index}.{suffix}"
    return f"{LANGUAGE_LAYERS}{int(index) - config.num_embedding_layers}.{suffix}"
