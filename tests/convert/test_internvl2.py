"""InternVL2 checkpoints in and out, against transformers' InternVL and a written-out InternViT."""

import json
import re

import pytest
import torch
from accelerate import init_empty_weights

from tests.reference.hovle import hovle_config
from tests.reference.vision_language import (
    TOWER,
    internvl2_config,
    internvl2_names,
    internvl2_visual,
    write_internvl2,
    write_json,
)
from xtuner_ext.convert import hovle, internvl2, load_teacher
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.convert.teacher import FAMILIES, load_exactly, load_processor, teacher_family
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLForCausalLM

TOKENS = 4
SIX_B = dict(qk_normalization=True, qkv_bias=False, norm_type="rms_norm")
TOWERS = {"300M": {}, "6B": SIX_B, "table of another size": dict(image_size=32)}


@pytest.fixture
def tokenizer(digits):
    return str(digits / "tokenizer")


def assert_close(found, expected):
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def inputs(image, images, size=16):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in images:
        words = torch.randint(20, 200, (5 + 4 * count,), generator=generator).tolist()
        for number in range(count):
            words[2 + 4 * number : 2 + 4 * number] = [image] * (TOKENS * size**2 // 256)
        rows.append(words)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(sum(images), 3, size, size, generator=generator) if sum(images) else None
    return ids, mask, pixels


@pytest.mark.parametrize("images", [(0,), (1,), (1, 1), (2, 1, 0)], ids=["text", "one", "batch", "padded batch"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "internlm2"])
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, tokenizer, family, images):
    theirs, _, _ = write_internvl2(tmp_path, tokenizer, family)
    ours = load_teacher(tmp_path)
    ids, mask, pixels = inputs(ours.config.image_token_id, images)
    found = ours(ids, attention_mask=mask, pixel_values=pixels).logits[mask.bool()]
    assert_close(found, theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[mask.bool()])


@pytest.mark.parametrize("select_layer", [-1, -2])
@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS.keys())
@torch.no_grad()
def test_visual_vectors_equal_the_written_out_ones(tmp_path, tokenizer, tower, select_layer):
    _, raw, state = write_internvl2(tmp_path, tokenizer, tower=tower, select_layer=select_layer, force_image_size=16)
    pixels = inputs(0, (2,))[2]
    found = load_teacher(tmp_path).vision(pixels)
    assert found.shape[1] == TOKENS
    assert_close(found, internvl2_visual(state, raw, pixels))


@pytest.mark.parametrize("select_layer", [-1, -2])
@pytest.mark.parametrize("family, tower", [("internlm2", {}), ("llama", SIX_B), ("qwen2", {})])
def test_written_back_bit_by_bit(tmp_path, tokenizer, family, tower, select_layer):
    _, raw, original = write_internvl2(tmp_path, tokenizer, family, tower, select_layer)
    config = internvl2.model_config(raw, tmp_path / "config.json")
    back = internvl2.to_checkpoint(config, internvl2.to_model(config, read_state(tmp_path)))
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)
    if select_layer == -1:
        from_model = internvl2.to_checkpoint(config, load_teacher(tmp_path).state_dict())
        assert from_model.keys() == original.keys()
        assert all(torch.equal(from_model[key], original[key]) for key in original)


# ---------------------------------------------------------------- the published 2B

FULL_TOWER = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=448,
    patch_size=14,
)
FULL_TEXT = dict(
    model_type="internlm2",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=92553,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    rope_scaling={"type": "dynamic", "factor": 2.0},
)


def published_shapes():
    """Names and shapes of InternVL2-2B's tensors."""
    d, f, w, g, v = 1024, 4096, 2048, 8192, 92553
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, d),
        "vision_model.embeddings.position_embedding": (1, 1025, d),
        "vision_model.embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "mlp1.0.weight": (4 * d,),
        "mlp1.0.bias": (4 * d,),
        "mlp1.1.weight": (w, 4 * d),
        "mlp1.1.bias": (w,),
        "mlp1.3.weight": (w, w),
        "mlp1.3.bias": (w,),
        "language_model.model.tok_embeddings.weight": (v, w),
        "language_model.model.norm.weight": (w,),
        "language_model.output.weight": (v, w),
    }
    vit = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (f, d),
        "mlp.fc2": (d, f),
        "norm1": (d,),
        "norm2": (d,),
    }
    llm = {
        "attention.wqkv": (w + 2 * 1024, w),
        "attention.wo": (w, w),
        "feed_forward.w1": (g, w),
        "feed_forward.w2": (w, g),
        "feed_forward.w3": (g, w),
        "attention_norm": (w,),
        "ffn_norm": (w,),
    }
    for index in range(24):
        for name, shape in vit.items():
            shapes[f"vision_model.encoder.layers.{index}.{name}.weight"] = shape
            shapes[f"vision_model.encoder.layers.{index}.{name}.bias"] = shape[:1]
        for name in ("ls1", "ls2"):
            shapes[f"vision_model.encoder.layers.{index}.{name}"] = (d,)
        for name, shape in llm.items():
            shapes[f"language_model.model.layers.{index}.{name}.weight"] = shape
    return shapes


def test_published_2B_fits_exactly(tmp_path):
    """24 layers of 12,598,272 and 24 of 62,918,656 numbers, two vocabularies of 189,548,544, and the small parts."""
    write_json(tmp_path / "added_tokens.json", {"<IMG_CONTEXT>": 92546})
    raw = internvl2_config(FULL_TOWER, FULL_TEXT)
    config = internvl2.model_config(raw, tmp_path / "config.json")
    shapes = published_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_205_754_368
    state = internvl2.to_model(config, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    with init_empty_weights():
        model = HybridVLForCausalLM(config)
    load_exactly(model, state, "checkpoint")
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_205_754_368
    assert internvl2.to_checkpoint(config, state).keys() == shapes.keys()
    assert (config.tokens_per_tile, config.image_token_id, config.num_hidden_layers) == (256, 92546, 24)
    assert config.rope_parameters["factor"] == 2.0 and config.template == "internlm2-chat"


def test_names_of_the_test_checkpoint_are_the_published_ones(tmp_path, tokenizer):
    """So that what the other tests convert is what is on the hub."""
    theirs, _, _ = write_internvl2(tmp_path, tokenizer, "internlm2")
    found, published = (
        {re.sub(r"layers\.\d+", "layers.N", key) for key in keys}
        for keys in (internvl2_names(theirs, "internlm2"), published_shapes())
    )
    assert found == published


# ---------------------------------------------------------------- settings and mistakes


def test_processor_tiles_as_the_config_says(tmp_path, tokenizer):
    write_internvl2(tmp_path, tokenizer, max_dynamic_patch=6)
    processor = load_processor(tmp_path)
    assert (processor.image_size, processor.tokens_per_tile, processor.max_tiles, processor.fit) == (16, 4, 6, "tiles")
    assert (processor.normalisation, processor.use_thumbnail) == ("imagenet", True)
    assert processor.expand("<image>", [2]) == "<img>" + "<IMG_CONTEXT>" * 8 + "</img>"
    off = internvl2.processor_settings(internvl2_config(TOWER, {"model_type": "llama"}, dynamic_image_size=False))
    assert off["max_tiles"] == off["min_tiles"] == 1


@pytest.mark.parametrize("keep", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_image_token_is_found_in_any_tokenizer_file(tmp_path, keep):
    entry = {"content": "<IMG_CONTEXT>"}
    content = {
        "tokenizer.json": {"added_tokens": [{"id": 1, "content": "<a>"}, {"id": 77, **entry}]},
        "added_tokens.json": {"<IMG_CONTEXT>": 77},
        "tokenizer_config.json": {"added_tokens_decoder": {"77": entry}},
    }[keep]
    write_json(tmp_path / keep, content)
    raw = internvl2_config(TOWER, {**FULL_TEXT, "vocab_size": 80})
    assert internvl2.model_config(raw, tmp_path / "config.json").image_token_id == 77


def test_families_do_not_shadow_each_other(tmp_path, tokenizer):
    write_internvl2(tmp_path, tokenizer, "qwen2")
    assert teacher_family(tmp_path) is internvl2
    assert [f for f in FAMILIES if f.matches(hovle_config())] == [hovle]
    assert [f for f in FAMILIES if f.matches(json.loads((tmp_path / "config.json").read_text()))] == [internvl2]


def message_of(folder):
    texts = []
    for call in (load_teacher, load_processor):
        with pytest.raises(UserError) as error:
            call(folder)
        texts.append(str(error.value))
    assert texts[0] == texts[1] and "\n" not in texts[0]
    return texts[0]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(ps_version="v1"), "ps_version is 'v1', only 'v2' is supported"),
        (dict(ps_version=None), "ps_version is 'v1', only 'v2' is supported"),
        (dict(use_llm_lora=16), "use_llm_lora is 16: merge the adapter into the weights first"),
        (dict(select_layer=-9), "layer -9 of the vision tower is selected, which has 3 layers"),
        (dict(template=None), "template is missing"),
        (dict(vision_config__qkv_bias=None), "vision_config.qkv_bias is missing"),
        (dict(vision_config=None), "vision_config is missing"),
        (dict(vision_config__model_type="siglip"), "vision_config: model_type is 'siglip', only 'intern_vit_6b'"),
        (dict(vision_config__norm_type="batch_norm"), "vision_config.norm_type is 'batch_norm', expected"),
        (
            dict(vision_config__qk_normalization=True, vision_config__layer_norm_eps=1e-5),
            "layer_norm_eps is 1e-05, with",
        ),
        (dict(llm_config__model_type="phi3"), "llm_config has model_type 'phi3', expected one of internlm2, llama"),
        (dict(force_image_size=20), "a tile of 20 pixels gives 2.5 tokens a side"),
        (dict(llm_config__vocab_size=7), "llm_config.vocab_size is 7, but <IMG_CONTEXT> has the id"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_unsupported_variants_are_named(tmp_path, tokenizer, changes, expected):
    _, raw, _ = write_internvl2(tmp_path, tokenizer)
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        fields = raw[section] if section else raw
        if value is None:
            del fields[field]
        else:
            fields[field] = value
    write_json(tmp_path / "config.json", raw)
    text = message_of(tmp_path)
    assert text.startswith(f"{tmp_path / 'config.json'}: ") and expected in text


def test_a_missing_image_token_is_named(tmp_path, tokenizer):
    write_internvl2(tmp_path, tokenizer)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    assert message_of(tmp_path).startswith(f"{tmp_path} has no token <IMG_CONTEXT>: expected it in one of added_")
