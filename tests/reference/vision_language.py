"""Small random InternVL2 and LLaVA-1.5 folders in each layout, and InternViT written out.

The weights come from transformers' own models, which are the truth for logits; the renaming to the
authors' names follows their published key lists.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
TOWER = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=16,
    patch_size=4,
)
TEXT_CONFIGS = {"llama": LlamaConfig, "internlm2": LlamaConfig, "qwen2": Qwen2Config}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def randomise(model, seed=0):
    """Give every weight a size that shows a mistake anywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight") or "lambda" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * noise)
            else:
                fan_in = parameter.shape[-1] if "embed" in name else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5 * (3 if "embed" in name else 1))
    return model.eval()


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


# ---------------------------------------------------------------- LLaVA


def llava_tokenizer(source, image=True):
    """A tokenizer with or without ``<image>``."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if image:
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def tiny_llava(vocab_size, family="llama", tower_layers=3, **changes):
    """transformers' model with random weights; the last id is the image token's."""
    text = TEXT_CONFIGS[family](vocab_size=vocab_size, **TEXT, pad_token_id=0)
    tower = CLIPVisionConfig(**{**TOWER, "num_hidden_layers": tower_layers})
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config=tower.to_dict(),
        image_token_index=vocab_size - 1,
        image_seq_length=16,
        **changes,
    )
    return randomise(LlavaForConditionalGeneration(config))


def hub_names(model):
    """State of transformers' model under the names that checkpoints on the hub have."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        key = key.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
        key = key.replace("language_model.", "language_model.model.")
        renamed["language_model." + key if key.startswith("lm_head") else key] = tensor.contiguous().clone()
    return renamed


def write_llava(folder, tokenizer, layout="hub", family="llama", preprocessor=True, **changes):
    """Write a LLaVA folder.

    Args:
        folder: where to.
        tokenizer: folder of a tokenizer without ``<image>``.
        layout: ``hub``, ``transformers`` (as transformers 5 saves it), ``nested-4`` or ``nested-5``.

    Returns:
        transformers' model.
    """
    tokenizer = llava_tokenizer(tokenizer)
    model = tiny_llava(len(tokenizer), family, **changes)
    model.save_pretrained(folder)
    if layout == "hub":
        save_file(hub_names(model), folder / "model.safetensors")
    elif layout.startswith("nested"):
        inner = "vision_tower.vision_model." if layout == "nested-4" else "vision_tower."
        state = {key.replace("vision_tower.", inner): t.contiguous().clone() for key, t in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    if preprocessor:
        write_json(folder / "preprocessor_config.json", clip_preprocessor())
    return model


def clip_preprocessor(size=16):
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }


def write_original_llava(folder, tokenizer, tower="own", pickled=False, **changes):
    """Write LLaVA as its authors do: no ``<image>`` token, the tower in a folder of its own.

    Args:
        tower: ``own`` (a CLIPVisionModel folder), ``clip`` (a whole CLIP's config and prefix) or ``inside``
            (the tower's weights are in the checkpoint).

    Returns:
        transformers' model, whose last vocabulary row stands for the image token, and the stored tensors.
    """
    plain = AutoTokenizer.from_pretrained(tokenizer)
    model = tiny_llava(len(plain) + 1)
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.get_input_embeddings().weight):
            weight[-1] = weight[:-1].mean(0)
    state, vision = {}, {}
    for key, tensor in model.state_dict().items():
        tensor = tensor.contiguous().clone()
        if key.startswith("model.vision_tower."):
            vision["vision_model." + key.removeprefix("model.vision_tower.")] = tensor
        elif key.startswith("model.multi_modal_projector.linear_"):
            number, kind = key.removeprefix("model.multi_modal_projector.linear_").split(".")
            state[f"model.mm_projector.{2 * int(number) - 2}.{kind}"] = tensor
        else:
            key = key.replace("model.language_model.", "model.")
            state[key] = tensor[:-1].clone() if key in ("lm_head.weight", "model.embed_tokens.weight") else tensor
    text = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ("rope_parameters", "head_dim")}
    raw = {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": len(plain),
        "rope_theta": 10000.0,
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-tiny",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float32",
        **changes,
    }
    folder = Path(folder)
    beside = folder / "openai" / "clip-tiny"
    beside.mkdir(parents=True)
    write_json(folder / "config.json", raw)
    write_json(beside / "preprocessor_config.json", clip_preprocessor())
    if tower == "own":
        config = CLIPVisionConfig(**TOWER)
        alone = CLIPVisionModel(config)
        alone.load_state_dict({key.removeprefix("vision_model."): tensor for key, tensor in vision.items()})
        alone.save_pretrained(beside)
    else:
        fields = {**TOWER, "model_type": "clip_vision_model"}
        write_json(beside / "config.json", {"model_type": "clip", "vision_config": fields, "text_config": {}})
    if tower == "clip":
        more = {"vision_model.embeddings.position_ids": torch.arange(17)[None], "logit_scale": torch.ones(())}
        torch.save({**vision, **more}, beside / "pytorch_model.bin")
    elif tower == "inside":
        state.update({"model.vision_tower.vision_tower." + key: tensor for key, tensor in vision.items()})
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    plain.save_pretrained(folder)
    return model, state


# ---------------------------------------------------------------- InternVL2


def internvl2_config(tower, text, **changes):
    """A config.json in InternVL2's layout.

    Args:
        tower: entries of ``vision_config``.
        text: entries of ``llm_config``, with model_type.
    """
    architecture = {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "force_image_size": tower["image_size"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": "float32",
        "llm_config": {
            "architectures": [architecture[text["model_type"]]],
            "bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            **text,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "use_flash_attn": True,
            **tower,
        },
        **changes,
    }


def write_internvl2(folder, tokenizer, family="llama", tower=None, select_layer=-1, **changes):
    """Write an InternVL2 folder whose tokenizer knows ``<IMG_CONTEXT>``.

    Args:
        family: ``llama``, ``qwen2`` or ``internlm2``.
        tower: entries of ``vision_config`` that replace the default ones.

    Returns:
        transformers' model, the folder's config and its tensors.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    text = {**TEXT, "vocab_size": len(tokenizer), "model_type": family, "pad_token_id": 0}
    raw = internvl2_config({**TOWER, **(tower or {})}, text, select_layer=select_layer, **changes)
    vision = raw["vision_config"]
    config = InternVLConfig(
        text_config=TEXT_CONFIGS[family](
            vocab_size=len(tokenizer), tie_word_embeddings=False, pad_token_id=0, **TEXT
        ).to_dict(),
        vision_config=InternVLVisionConfig(
            **{key: vision[key] for key in (*TOWER, "layer_norm_eps", "norm_type")},
            use_qk_norm=vision["qk_normalization"],
            attention_bias=vision["qkv_bias"],
        ).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        vision_feature_layer=select_layer,
        tie_word_embeddings=False,
    )
    model = randomise(InternVLForConditionalGeneration(config))
    state = {key: tensor.contiguous().clone() for key, tensor in internvl2_names(model, family).items()}
    folder = Path(folder)
    write_json(folder / "config.json", raw)
    save_file(state, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return model, raw, state


VIT_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}
INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internvl2_names(model, family):
    """State of transformers' InternVL under the authors' names, projections packed."""
    theirs = model.state_dict()
    renamed = {}
    for key, tensor in theirs.items():
        if ".vision_tower." in key:
            name = "vision_model." + key.removeprefix("model.vision_tower.")
            if "attention.q_proj" in key:
                parts = [theirs[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
            elif "attention.k_proj" in key or "attention.v_proj" in key:
                continue
            for ours, original in VIT_NAMES.items():
                name = name.replace(ours, original)
        elif ".multi_modal_projector." in key:
            part, kind = key.split(".")[-2:]
            name = f"mlp1.{ {'layer_norm': 0, 'linear_1': 1, 'linear_2': 3}[part] }.{kind}"
        else:
            name = "language_model." + key.replace("model.language_model.", "model.")
            if family == "internlm2":
                if "k_proj" in name or "v_proj" in name:
                    continue
                if "q_proj" in name:
                    # Rows of one key/value head lie together: its query heads, its key, its value.
                    heads = [theirs[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                    groups = [part.unflatten(0, (TEXT["num_key_value_heads"], -1)) for part in heads]
                    name = name.replace("self_attn.q_proj", "attention.wqkv")
                    tensor = torch.cat(groups, 1).flatten(0, 1)
                name = name.replace("language_model.lm_head", "language_model.output")
                for ours, original in INTERNLM2_NAMES.items():
                    name = name.replace(ours, original)
        renamed[name] = tensor
    return renamed


def internvl2_visual(state, raw, pixels):
    """Visual vectors (T, tokens, D) of tiles, written out from the authors' names."""
    config = raw["vision_config"]
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def weight(name):
        return state["vision_model." + name]

    def norm(x, name):
        if config["norm_type"] == "rms_norm":
            return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight(name + ".weight")
        return F.layer_norm(x, x.shape[-1:], weight(name + ".weight"), weight(name + ".bias"), eps)

    patches = F.conv2d(
        pixels,
        weight("embeddings.patch_embedding.weight"),
        weight("embeddings.patch_embedding.bias"),
        stride=config["patch_size"],
    )
    rows, columns = patches.shape[-2:]
    table = weight("embeddings.position_embedding")
    side = config["image_size"] // config["patch_size"]
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    first = weight("embeddings.class_embedding").expand(len(pixels), 1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + torch.cat([table[:, :1], grid], 1)
    layers = config["num_hidden_layers"]
    for index in range(layers + 1 + raw["select_layer"]):
        layer = f"encoder.layers.{index}."
        y = norm(x, layer + "norm1")
        qkv = F.linear(y, weight(layer + "attn.qkv.weight"), state.get(f"vision_model.{layer}attn.qkv.bias"))
        q, k, v = qkv.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        if config["qk_normalization"]:
            q, k = (part.transpose(1, 2).flatten(2) for part in (q, k))
            q = q * (q.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight(layer + "attn.q_norm.weight")
            k = k * (k.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight(layer + "attn.k_norm.weight")
            q, k = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (scores @ v).transpose(1, 2).flatten(2)
        mixed = F.linear(mixed, weight(layer + "attn.proj.weight"), weight(layer + "attn.proj.bias"))
        x = x + mixed * weight(layer + "ls1")
        y = F.linear(norm(x, layer + "norm2"), weight(layer + "mlp.fc1.weight"), weight(layer + "mlp.fc1.bias"))
        y = F.linear(F.gelu(y), weight(layer + "mlp.fc2.weight"), weight(layer + "mlp.fc2.bias"))
        x = x + y * weight(layer + "ls2")
    x = x[:, 1:].unflatten(1, (rows, columns))
    # Blocks of 2 x 2: the columns of one row are joined first, then the rows.
    x = torch.cat([x[:, :, 0::2], x[:, :, 1::2]], -1)
    x = torch.cat([x[:, 0::2], x[:, 1::2]], -1).flatten(1, 2)
    x = F.layer_norm(x, x.shape[-1:], state["mlp1.0.weight"], state["mlp1.0.bias"])
    x = F.gelu(F.linear(x, state["mlp1.1.weight"], state["mlp1.1.bias"]))
    return F.linear(x, state["mlp1.3.weight"], state["mlp1.3.bias"])
