"""InternLM2 checkpoints in and out; the truth is HoVLE's written-out layers, which are InternLM2's."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.reference import hovle as reference
from xtuner_ext.convert import hovle, internlm2, load_teacher
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.errors import UserError

PREFIX = "language_model."


def write(folder, **changes):
    """Write the language half of a HoVLE checkpoint as a model of its own; return its state."""
    config = reference.hovle_config(**changes)
    state = reference.random_hovle_state_dict(config)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    (folder / "config.json").write_text(json.dumps(config["llm_config"]))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return config["llm_config"], state


@torch.no_grad()
def reference_logits(state, llm, ids):
    x = torch.nn.functional.embedding(ids, state["model.tok_embeddings.weight"])
    for index in range(llm["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        layer = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        x, _ = reference.decoder_layer(layer, llm, x)
    return reference.rms_norm(x, state["model.norm.weight"], llm["rms_norm_eps"]) @ state["output.weight"].T


@pytest.mark.parametrize("length", [5, 21], ids=["within the window", "dynamic rope"])
@torch.no_grad()
def test_logits_equal_the_written_out_model(tmp_path, length):
    llm, state = write(tmp_path, max_position_embeddings=8, num_llm_layers=3)
    ids = torch.randint(0, llm["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0))
    model = load_teacher(tmp_path)
    expected = reference_logits(state, llm, ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, length)], dim=1).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], expected, rtol=1e-5, atol=1e-5)


def test_written_back_bit_by_bit(tmp_path):
    llm, state = write(tmp_path)
    config = internlm2.model_config(llm)
    for found in (internlm2.to_model(config, read_state(tmp_path)), load_teacher(tmp_path).state_dict()):
        back = internlm2.to_checkpoint(config, found)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("kv_heads", [2, 4, 1], ids=["grouped", "one each", "shared by all"])
def test_packed_projection_splits_and_merges_bit_by_bit(kv_heads):
    heads = 4
    config = hovle.model_config(reference.hovle_config(num_key_value_heads=kv_heads))
    packed = torch.randn((heads + 2 * kv_heads) * 8, 32)
    parts = internlm2.split_wqkv(config, packed)
    assert torch.equal(internlm2.merge_wqkv(config, *parts), packed)
    for ours, theirs in zip(parts, reference.split_wqkv(packed, heads, kv_heads)):
        assert torch.equal(ours, theirs.flatten(0, 1))


def test_a_bias_is_refused_also_as_the_default(tmp_path):
    llm, _ = write(tmp_path)
    for bias in ({"bias": True}, {}):
        with pytest.raises(UserError, match="bias is not false"):
            internlm2.model_config({**{key: value for key, value in llm.items() if key != "bias"}, **bias})


def test_head_counts_that_do_not_fit_the_weights_are_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 4}))
    with pytest.raises(UserError, match="wqkv has shape .* and 4 key/value heads"):
        load_teacher(tmp_path)
