"""Llama and Qwen2 checkpoints in and out, against transformers' own models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from xtuner_ext.convert import llama, load_teacher, qwen2
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLForCausalLM

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e6, original_max_position_embeddings=16)
VARIANTS = {
    "llama": ("llama", {}),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "linear rope": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
    "dynamic rope": ("llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=8)),
    "yarn": ("qwen2", dict(rope_parameters=YARN)),
    "wide heads": ("llama", dict(head_dim=16, rms_norm_eps=1e-3)),
    "mlp bias": ("llama", dict(mlp_bias=True)),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
}
FAMILIES = {"llama": llama, "qwen2": qwen2}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, tmp_path, write_text_model):
    """A folder, its family and transformers' model of it."""
    family, changes = request.param
    return tmp_path, family, write_text_model(tmp_path, family, **changes)


@torch.no_grad()
def test_logits_equal_those_of_transformers(variant, left_padded, is_tied):
    folder, _, theirs = variant
    ids, mask = left_padded
    model = load_teacher(folder)
    torch.testing.assert_close(model(ids[:1]).logits, theirs(ids[:1]).logits, **TOLERANCE)
    padded, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, theirs))
    torch.testing.assert_close(padded, expected, **TOLERANCE)
    assert is_tied(model) == theirs.config.tie_word_embeddings == is_tied(model.to(torch.bfloat16))


@torch.no_grad()
def test_saved_and_read_again_it_is_the_same(variant, left_padded, tmp_path_factory, is_tied):
    folder, out = variant[0], tmp_path_factory.mktemp("saved")
    model = load_teacher(folder)
    model.save_pretrained(out)
    again = HybridVLForCausalLM.from_pretrained(out).eval()
    assert is_tied(again) == is_tied(model) and again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(again(left_padded[0]).logits, model(left_padded[0]).logits)


def test_written_back_bit_by_bit(variant):
    folder, family, theirs = variant
    stored = load_file(folder / "model.safetensors")
    config = FAMILIES[family].model_config(json.loads((folder / "config.json").read_text()))
    renamed = FAMILIES[family].to_model(config, read_state(folder))
    back = FAMILIES[family].to_checkpoint(config, renamed)
    from_model = FAMILIES[family].to_checkpoint(config, load_teacher(folder).state_dict())
    for found in (back, from_model):
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[key], stored[key]) for key in stored)


def old_style(raw, rope):
    """The same config.json as transformers 4 wrote it."""
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    return {**raw, "torch_dtype": "float32", **rope}


@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_config_of_transformers_4_means_the_same(tmp_path, write_text_model, left_padded, word):
    theirs = write_text_model(tmp_path, "llama", rope_parameters=LLAMA3)
    path = tmp_path / "config.json"
    scaling = {word if key == "rope_type" else key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    raw = old_style(json.loads(path.read_text()), {"rope_theta": 500000.0, "rope_scaling": scaling})
    path.write_text(json.dumps(raw))
    with torch.no_grad():
        found, expected = (model(left_padded[0]).logits for model in (load_teacher(tmp_path), theirs))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_missing_keys_take_the_family_own_defaults():
    bare = llama.model_config({"model_type": "llama", "vocab_size": 32064})
    assert (bare.hidden_size, bare.num_hidden_layers, bare.num_key_value_heads, bare.head_dim) == (4096, 32, 32, 128)
    assert (bare.rms_norm_eps, bare.rope_parameters["rope_theta"], bare.tie_word_embeddings) == (1e-6, 1e4, False)
    assert (bare.vision, bare.image_token_id, bare.template) == (None, None, None)
    qwen = qwen2.model_config({"model_type": "qwen2"})
    assert (qwen.vocab_size, qwen.intermediate_size, qwen.attention_bias) == (151936, 22016, True)


def test_reading_a_config_leaves_it_as_it_was():
    raw = {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = json.dumps(raw)
    config = llama.model_config(raw)
    assert json.dumps(raw) == before
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}


# ---------------------------------------------------------------- heads and embeddings


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_checkpoint_may_carry_its_head(tmp_path, write_text_model, left_padded, is_tied):
    theirs = write_text_model(tmp_path, "qwen2", tie_word_embeddings=True)
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    model = load_teacher(tmp_path)
    assert is_tied(model)
    with torch.no_grad():
        torch.testing.assert_close(model(left_padded[0]).logits, theirs(left_padded[0]).logits, **TOLERANCE)
    config = qwen2.model_config(json.loads((tmp_path / "config.json").read_text()))
    back = qwen2.to_checkpoint(config, qwen2.to_model(config, read_state(tmp_path)))
    assert back.keys() == load_file(tmp_path / "model.safetensors").keys()


def test_a_tied_head_that_differs_is_refused(tmp_path, write_text_model):
    write_text_model(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_teacher(tmp_path)


def test_an_untied_checkpoint_needs_its_head(tmp_path, write_text_model):
    write_text_model(tmp_path, "llama")
    rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(UserError, match="1 tensors are missing, the first is lm_head.weight"):
        load_teacher(tmp_path)


def test_stored_rotary_frequencies_are_carried_and_not_read(tmp_path, write_text_model):
    write_text_model(tmp_path, "llama")
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda state: state.update({key: torch.ones(4)}))
    load_teacher(tmp_path)
    config = llama.model_config(json.loads((tmp_path / "config.json").read_text()))
    back = llama.to_checkpoint(config, llama.to_model(config, read_state(tmp_path)))
    assert torch.equal(back[key], torch.ones(4))
