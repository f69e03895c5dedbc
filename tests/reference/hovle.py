"""HoVLE written out naively: the truth for checkpoint conversion and teacher forward.

Run `python -m tests.reference.hovle` to check the published key and parameter counts.

Everything here follows from formulas and uses plain torch only, so that a mistake in the
package cannot hide in its own tests. Speed does not matter; sizes in tests are tiny.

Axis letters: B batch, L length, D model width, H query heads, G key/value heads,
P head width, V vocabulary, T tiles, F feed-forward width.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

SMALL = dict(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_embedding_layers=2,
    num_llm_layers=2,
    intermediate_size=48,
    patch_size=4,
    image_size=16,
    vocab_size=64,
    img_context_token_id=60,
    max_position_embeddings=128,
    rope_theta=10000.0,
)

FULL = dict(
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_embedding_layers=8,
    num_llm_layers=24,
    intermediate_size=8192,
    patch_size=14,
    image_size=448,
    vocab_size=92553,
    img_context_token_id=92546,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
)

FULL_NUM_KEYS = 236
FULL_NUM_PARAMETERS = 2_606_327_808


# ---------------------------------------------------------------- configuration


def hovle_config(full=False, embedding_config=None, llm_config=None, **sizes):
    """A `config.json` dict in the layout of the HoVLE checkpoint.

    Args:
        full: the published sizes instead of small test sizes.
        embedding_config: entries that replace those of the embedding half only.
        llm_config: entries that replace those of the language half only.
        **sizes: any name in `SMALL`, or `rms_norm_eps`, `rope_scaling`, for both halves;
            or any name of the outer dict (`template`, `max_dynamic_patch`, ...).
    """
    values = {**(FULL if full else SMALL), "rms_norm_eps": 1e-5, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    outer_sizes = {name: sizes.pop(name) for name in list(sizes) if name not in values}
    values.update(sizes)

    shared = {  # of both halves
        name: values[name]
        for name in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        )
    }
    outer = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "force_image_size": values["image_size"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "normalize_encoder_output": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
    }
    unknown = sorted(set(outer_sizes) - set(outer))
    if unknown:
        raise TypeError(f"unknown sizes: {unknown}")
    outer.update(outer_sizes)
    outer["embedding_config"] = {
        "architectures": ["HolisticEmbedding"],
        "model_type": "holistic_embedding",
        **shared,
        "rope_scaling": dict(values["rope_scaling"]) if values["rope_scaling"] else None,
        "num_hidden_layers": values["num_embedding_layers"],
        "num_channels": 3,
        "patch_size": values["patch_size"],
        "image_size": values["image_size"],
        "downsample_ratio": outer["downsample_ratio"],
        "pixel_shuffle_loc": "pre",
        "use_pixel_shuffle_proj": True,
        "img_context_token_id": values["img_context_token_id"],
        "llm_vocab_size": values["vocab_size"],
        "llm_hidden_size": values["hidden_size"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "use_ls": False,
        "use_img_start_end_tokens": True,
        "special_token_maps": {},
        "attn_implementation": "flash_attention_2",
        **(embedding_config or {}),
    }
    outer["llm_config"] = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        **shared,
        "rope_scaling": dict(values["rope_scaling"]) if values["rope_scaling"] else None,
        "num_hidden_layers": values["num_llm_layers"],
        "vocab_size": values["vocab_size"],
        "bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "flash_attention_2",
        **(llm_config or {}),
    }
    return outer


def num_image_tokens(config):
    """Visual tokens of one tile: 256 at full size, 4 at the default test size."""
    embed = config["embedding_config"]
    return int((embed["image_size"] // embed["patch_size"]) ** 2 * embed["downsample_ratio"] ** 2)


# ---------------------------------------------------------------- checkpoint


def layer_prefixes(config):
    """Key prefix of every decoder layer in global order: embedding layers, then language layers."""
    embed = [f"embedding_model.encoder.{i}." for i in range(config["embedding_config"]["num_hidden_layers"])]
    llm = [f"language_model.model.layers.{i}." for i in range(config["llm_config"]["num_hidden_layers"])]
    return embed + llm


def hovle_key_shapes(config):
    """Every key of the checkpoint with its shape.

    Returns:
        dict[str, tuple[int, ...]]: 236 entries at full size.
    """
    embed, llm = config["embedding_config"], config["llm_config"]
    assert not embed["special_token_maps"] and not embed["attention_bias"] and not llm["bias"]
    width, patch = embed["hidden_size"], embed["patch_size"]
    positions = (embed["image_size"] // patch) ** 2 + 1  # position 0 belongs to the unused class token
    shuffled = int(width / embed["downsample_ratio"] ** 2)

    shapes = {
        "embedding_model.vision_embeddings.class_embedding": (1, 1, width),
        "embedding_model.vision_embeddings.position_embedding": (1, positions, width),
        "embedding_model.vision_embeddings.patch_embedding.weight": (width, embed["num_channels"], patch, patch),
        "embedding_model.vision_embeddings.patch_embedding.bias": (width,),
        "embedding_model.llm_text_embeddings.weight": (embed["llm_vocab_size"], embed["llm_hidden_size"]),
        "embedding_model.pixel_shuffle_proj.0.weight": (width, shuffled),
        "embedding_model.pixel_shuffle_proj.0.bias": (width,),
        "embedding_model.pixel_shuffle_proj.2.weight": (width, width),
        "embedding_model.pixel_shuffle_proj.2.bias": (width,),
        "language_model.model.tok_embeddings.weight": (llm["vocab_size"], llm["hidden_size"]),
        "language_model.model.norm.weight": (llm["hidden_size"],),
        "language_model.output.weight": (llm["vocab_size"], llm["hidden_size"]),
    }
    for prefix in layer_prefixes(config):
        half = embed if prefix.startswith("embedding_model.") else llm
        for name, shape in _layer_shapes(half).items():
            shapes[prefix + name] = shape
    return shapes


def _layer_shapes(half):
    """Shapes of one decoder layer, names without prefix."""
    width, inner = half["hidden_size"], half["intermediate_size"]
    heads, kv_heads = half["num_attention_heads"], half["num_key_value_heads"]
    head_dim = width // heads
    return {
        "attention.wqkv.weight": ((heads + 2 * kv_heads) * head_dim, width),
        "attention.wo.weight": (width, heads * head_dim),
        "feed_forward.w1.weight": (inner, width),
        "feed_forward.w3.weight": (inner, width),
        "feed_forward.w2.weight": (width, inner),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }


def random_hovle_state_dict(config, seed=0):
    """Random fp32 weights under the checkpoint's keys.

    Scales keep every activation near 1, so that a wrong weight anywhere moves the logits;
    unused tensors are as random as used ones, so that using them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key, shape in hovle_key_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if key.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif key.endswith("bias"):
            value = 0.1 * value
        elif "embeddings.weight" in key or key.endswith(("class_embedding", "position_embedding")):
            value = 0.5 * value
        else:
            value = value / math.sqrt(math.prod(shape[1:]))  # fan-in
        state_dict[key] = value
    return state_dict


def random_hovle_checkpoint(folder, config, seed=0, shards=3):
    """Write `config.json`, safetensors shards and their index into `folder`.

    Returns:
        dict[str, Tensor]: the state dict that was written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))

    state_dict = random_hovle_state_dict(config, seed)
    keys = list(state_dict)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[i * len(keys) // shards : (i + 1) * len(keys) // shards]
        save_file({key: state_dict[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map.update({key: name for key in part})
    total_size = sum(value.numel() * value.element_size() for value in state_dict.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return state_dict


# ---------------------------------------------------------------- forward


@torch.no_grad()
def hovle_logits(state_dict, config, input_ids, pixel_values=None, return_hidden=False, *, dtype=torch.float32):
    """Logits of the teacher, positions 0..L-1, no padding.

    Args:
        state_dict: weights under the checkpoint's keys.
        config: as from `hovle_config`.
        input_ids: (B, L) integers.
        pixel_values: (T, 3, height, width), tiles of all rows in reading order, or None.
        return_hidden: also return what distillation aligns.
        dtype: in which all is computed.

    Returns:
        logits (B, L, V); with `return_hidden` the triple of logits, the list of every
        layer's input (B, L, D), and the list of every layer's attention output before
        the output projection (B, L, H, P). Lists are in global layer order.
    """
    weights = {key: value.to(dtype) for key, value in state_dict.items()}
    embed, llm = config["embedding_config"], config["llm_config"]

    x = F.embedding(input_ids, weights["embedding_model.llm_text_embeddings.weight"])
    if pixel_values is not None:
        visual = visual_tokens(weights, embed, pixel_values.to(dtype))
        x = put_visual_tokens(x, input_ids, visual, embed["img_context_token_id"])

    layer_inputs, head_outputs = [], []
    for prefix in layer_prefixes(config):
        half = embed if prefix.startswith("embedding_model.") else llm
        layer = {name: weights[prefix + name] for name in _layer_shapes(half)}
        layer_inputs.append(x)
        x, heads = decoder_layer(layer, half, x)
        head_outputs.append(heads)

    x = rms_norm(x, weights["language_model.model.norm.weight"], llm["rms_norm_eps"])
    logits = x @ weights["language_model.output.weight"].T
    return (logits, layer_inputs, head_outputs) if return_hidden else logits


def visual_tokens(weights, embed, pixel_values):
    """Tiles (T, 3, height, width) -> visual vectors (T, tokens per tile, D)."""
    prefix = "embedding_model.vision_embeddings."
    patches = F.conv2d(
        pixel_values,
        weights[prefix + "patch_embedding.weight"],
        weights[prefix + "patch_embedding.bias"],
        stride=embed["patch_size"],
    )  # (T, D, rows, columns)
    rows, columns = patches.shape[-2:]
    patches = patches.flatten(2).transpose(1, 2)  # (T, rows * columns, D)

    grid = embed["image_size"] // embed["patch_size"]
    position = weights[prefix + "position_embedding"][:, 1:]
    position = position.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    position = F.interpolate(position, size=(rows, columns), mode="bicubic", align_corners=False)
    patches = patches + position.flatten(2).transpose(1, 2)

    shuffled = pixel_shuffle(patches, embed["downsample_ratio"])
    prefix = "embedding_model.pixel_shuffle_proj."
    hidden = F.gelu(shuffled @ weights[prefix + "0.weight"].T + weights[prefix + "0.bias"])
    return hidden @ weights[prefix + "2.weight"].T + weights[prefix + "2.bias"]


def pixel_shuffle(x, ratio):
    """(T, side * side, C) -> (T, side * side * ratio**2, C / ratio**2), by views and permutes."""
    tiles, tokens, channels = x.shape
    side = math.isqrt(tokens)
    less, more = int(side * ratio), int(channels / ratio)
    x = x.reshape(tiles, side, less, more)
    x = x.permute(0, 2, 1, 3)
    x = x.reshape(tiles, less, less, int(more / ratio))
    x = x.permute(0, 2, 1, 3)
    return x.reshape(tiles, less * less, int(more / ratio))


def put_visual_tokens(x, input_ids, visual, token_id):
    """Overwrite x (B, L, D) where input_ids (B, L) is `token_id` by visual (T, N, D), in order."""
    x = x.clone()
    vectors = visual.flatten(0, 1)
    used = 0
    for b in range(input_ids.shape[0]):
        for t in range(input_ids.shape[1]):
            if input_ids[b, t] == token_id:
                x[b, t] = vectors[used]
                used += 1
    assert used == len(vectors), f"{used} image slots, {len(vectors)} visual tokens"
    return x


def decoder_layer(layer, half, x):
    """Pre-norm decoder layer: x (B, L, D) -> (x (B, L, D), head outputs (B, L, H, P))."""
    normed = rms_norm(x, layer["attention_norm.weight"], half["rms_norm_eps"])
    heads = attention_heads(layer["attention.wqkv.weight"], half, normed)
    x = x + heads.flatten(2) @ layer["attention.wo.weight"].T
    normed = rms_norm(x, layer["ffn_norm.weight"], half["rms_norm_eps"])
    gate = F.silu(normed @ layer["feed_forward.w1.weight"].T)
    x = x + (gate * (normed @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return x, heads


def attention_heads(wqkv, half, x):
    """Causal softmax attention before the output projection: x (B, L, D) -> (B, L, H, P)."""
    heads, kv_heads = half["num_attention_heads"], half["num_key_value_heads"]
    q, k, v = (torch.einsum("bld,hpd->blhp", x, w) for w in split_wqkv(wqkv, heads, kv_heads))
    length, head_dim = q.shape[1], q.shape[-1]
    cos, sin = rope(half, head_dim, length, x.dtype)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    out = torch.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for t in range(length):
            scores = torch.einsum("bp,bsp->bs", q[:, t, h], k[:, : t + 1, g]) / math.sqrt(head_dim)
            out[:, t, h] = torch.einsum("bs,bsp->bp", scores.softmax(-1), v[:, : t + 1, g])
    return out


def split_wqkv(wqkv, heads, kv_heads):
    """Packed rows, grouped per key/value head as [q, q, ..., k, v].

    Args:
        wqkv: ((H + 2 G) P, D).

    Returns:
        query (H, P, D), key (G, P, D), value (G, P, D); query head h belongs to
        key/value head h // (H / G).
    """
    head_dim = wqkv.shape[0] // (heads + 2 * kv_heads)
    per_group = heads // kv_heads
    blocks = wqkv.split(head_dim)  # each (P, D)
    query, key, value = [], [], []
    for g in range(kv_heads):
        first = g * (per_group + 2)
        query += blocks[first : first + per_group]
        key.append(blocks[first + per_group])
        value.append(blocks[first + per_group + 1])
    return torch.stack(query), torch.stack(key), torch.stack(value)


def rope_inv_freq(half, head_dim, length, dtype=torch.float32):
    """Rotary frequencies (P/2,) for a sequence of `length` tokens.

    Dynamic NTK scaling enlarges the base beyond `max_position_embeddings` and only there.
    It depends on this sequence's length alone, not on sequences seen before.
    """
    base, scaling, limit = half["rope_theta"], half["rope_scaling"], half["max_position_embeddings"]
    if scaling is not None:
        assert scaling["type"] == "dynamic"
        if length > limit:
            stretch = scaling["factor"] * length / limit - (scaling["factor"] - 1)
            base = base * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


def rope(half, head_dim, length, dtype=torch.float32):
    """cos and sin, each (L, P), of positions 0..L-1; both halves of P hold the same angles."""
    angles = torch.arange(length, dtype=dtype)[:, None] * rope_inv_freq(half, head_dim, length, dtype)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary embedding, rotate-half (not interleaved): x (B, L, heads, P), cos and sin (L, P)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


if __name__ == "__main__":
    full_shapes = hovle_key_shapes(hovle_config(full=True))
    assert len(full_shapes) == FULL_NUM_KEYS, len(full_shapes)
    num_parameters = sum(math.prod(shape) for shape in full_shapes.values())
    assert num_parameters == FULL_NUM_PARAMETERS, num_parameters
    print(f"{len(full_shapes)} keys, {num_parameters:,} parameters")
