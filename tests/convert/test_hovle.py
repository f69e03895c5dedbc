"""HoVLE checkpoints in and out, against the written-out model."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from tests.reference import hovle as reference
from xtuner_ext.convert import hovle, load_teacher
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.convert.teacher import load_exactly
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLForCausalLM, layer_types_from_attention

IMAGE = reference.SMALL["img_context_token_id"]
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes a small random checkpoint and returns its folder, config and weights."""

    def write(**changes):
        config = reference.hovle_config(**changes)
        return tmp_path, config, reference.random_hovle_checkpoint(tmp_path, config)

    return write


def make_ids(batch, length, tiles=()):
    """Token ids (B, L) whose rows start with a word and hold the same number of tiles."""
    ids = torch.randint(0, IMAGE, (batch, length), generator=torch.Generator().manual_seed(0))
    start = 1
    for count in tiles:
        ids[:, start : start + 4 * count] = IMAGE
        start += 4 * count + 2
    return ids


def make_tiles(count, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


INPUTS = {
    "text": (make_ids(1, 13), None),
    "one image": (make_ids(1, 13, [1]), make_tiles(1)),
    "several images": (make_ids(1, 29, [1, 3, 1]), make_tiles(5)),
    "batch": (make_ids(3, 13, [2]), make_tiles(6)),
    "batch of text": (make_ids(3, 7), None),
}


@pytest.mark.parametrize("ids, tiles", INPUTS.values(), ids=INPUTS.keys())
@torch.no_grad()
def test_logits_and_every_layer_input_equal_the_written_out_model(checkpoint, ids, tiles):
    folder, config, state = checkpoint()
    output = load_teacher(folder)(ids, pixel_values=tiles, output_hidden_states=True)
    logits, layer_inputs, _ = reference.hovle_logits(state, config, ids, tiles, return_hidden=True)
    torch.testing.assert_close(output.logits, logits, **TOLERANCE)
    assert len(output.hidden_states) == len(layer_inputs) + 1
    for index, expected in enumerate(layer_inputs):
        torch.testing.assert_close(
            output.hidden_states[index], expected, **TOLERANCE, msg=lambda text: f"layer {index}: {text}"
        )


@torch.no_grad()
def test_attention_head_outputs_equal_the_written_out_ones(checkpoint):
    """What stages 1 and 2 align, in the order of the query heads."""
    folder, config, state = checkpoint()
    ids = make_ids(2, 11)
    model = load_teacher(folder)
    _, layer_inputs, heads = reference.hovle_logits(state, config, ids, return_hidden=True)
    context = model.model.layer_context(model.embed(ids))
    for layer, hidden, expected in zip(model.model.layers, layer_inputs, heads):
        found = layer.mixer.head_outputs(layer.input_layernorm(hidden), **layer.mixer_context(context))
        torch.testing.assert_close(found, expected, **TOLERANCE)


DIFFERENCES = {
    "rope base": dict(rope_theta=300.0),
    "norm eps": dict(rms_norm_eps=0.3),
    "dynamic rope limit": dict(max_position_embeddings=8),
    "no rope scaling": dict(rope_scaling=None),
}


@pytest.mark.parametrize("half", ["embedding_config", "llm_config"])
@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES.keys())
@torch.no_grad()
def test_halves_may_differ(checkpoint, half, difference):
    folder, config, state = checkpoint(**{half: difference})
    ids = make_ids(1, 21)
    model = load_teacher(folder)
    torch.testing.assert_close(model(ids).logits, reference.hovle_logits(state, config, ids), **TOLERANCE)


@torch.no_grad()
def test_dynamic_rope_depends_on_this_sequence_alone(checkpoint):
    folder, config, state = checkpoint(max_position_embeddings=8)
    model = load_teacher(folder)
    for length in (21, 13, 5, 30, 9):
        ids = make_ids(1, length)
        torch.testing.assert_close(
            model(ids).logits,
            reference.hovle_logits(state, config, ids),
            **TOLERANCE,
            msg=lambda text: f"length {length}: {text}",
        )


@torch.no_grad()
def test_tiles_of_another_size_interpolate_the_position_table(checkpoint):
    folder, config, state = checkpoint()
    ids, tiles = make_ids(1, 13, [1]), make_tiles(1, size=32)
    ids = torch.cat([ids[:, :1], torch.full((1, 16), IMAGE), ids[:, 5:]], dim=1)
    logits = load_teacher(folder)(ids, pixel_values=tiles).logits
    torch.testing.assert_close(logits, reference.hovle_logits(state, config, ids, tiles), **TOLERANCE)


# ---------------------------------------------------------------- keys


def test_written_back_bit_by_bit(checkpoint):
    folder, raw, original = checkpoint()
    config = hovle.model_config(raw)
    back = hovle.to_checkpoint(config, hovle.to_model(config, read_state(folder)))
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(back[key], tensor), key


def full_config():
    return hovle.model_config(reference.hovle_config(full=True))


def empty_model(config):
    with init_empty_weights():
        return HybridVLForCausalLM(config)


def count(config):
    """Parameters of the model plus those that a checkpoint has and no model reads."""
    unread = sum(torch.Size(shape).numel() for shape in hovle.unread_shapes(config).values())
    return sum(parameter.numel() for parameter in empty_model(config).parameters()) + unread


def test_published_checkpoint_fits_exactly():
    """All 236 tensors are consumed, none is missing, and the count is the published one."""
    config = full_config()
    shapes = reference.hovle_key_shapes(reference.hovle_config(full=True))
    assert len(shapes) == 236
    state = hovle.to_model(config, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    load_exactly(empty_model(config), state, "checkpoint")
    unread = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("unread.")}
    assert unread == hovle.unread_shapes(config)
    assert hovle.to_checkpoint(config, state).keys() == shapes.keys()
    assert count(config) == 2_606_327_808


@pytest.mark.parametrize(
    "attention, parameters",
    [([], 2_741_992_448), (list(range(0, 32, 4)), 2_708_076_288)],
    ids=["linear", "hybrid with 8 attention layers"],
)
def test_students_have_the_published_size(attention, parameters):
    config = full_config()
    config.layer_types = layer_types_from_attention(attention, 32)
    assert count(config) == parameters


def test_config_is_translated():
    config = hovle.model_config(reference.hovle_config(full=True, embedding_config={"rope_theta": 5e5}))
    assert (config.num_hidden_layers, config.num_embedding_layers) == (32, 8)
    assert config.layer_types == ["full_attention"] * 32
    assert (config.head_dim, config.tokens_per_tile, config.image_token_id) == (128, 256, 92546)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.rope_parameters["rope_theta"] == 1e6 and config.rope_parameters["factor"] == 2.0
    assert config.embedding_config().rope_parameters["rope_theta"] == 5e5


def test_processor_settings_follow_the_config():
    settings = hovle.processor_settings(reference.hovle_config(full=True))
    assert settings == {"image_size": 448, "min_tiles": 1, "max_tiles": 12, "use_thumbnail": True}
    off = hovle.processor_settings(reference.hovle_config(full=True, dynamic_image_size=False))
    assert off["max_tiles"] == 1


def test_teacher_is_loaded_in_the_dtype_asked_for(checkpoint):
    folder, _, _ = checkpoint()
    model = load_teacher(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training


def test_only_the_structure_is_built_without_weights(checkpoint):
    folder, _, _ = checkpoint()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with init_empty_weights():
        model = load_teacher(folder)
    assert all(parameter.is_meta for parameter in model.parameters())


# ---------------------------------------------------------------- mistakes


def message_of(folder):
    with pytest.raises(UserError) as error:
        load_teacher(folder)
    text = str(error.value)
    assert "\n" not in text
    return text


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        fields = config[section] if section else config
        if value is None:
            del fields[name]
        else:
            fields[name] = value
    path.write_text(json.dumps(config))


def test_missing_folder_is_named(tmp_path):
    assert message_of(tmp_path / "none") == f"model folder {tmp_path / 'none'} does not exist"


def test_folder_without_config_is_named(tmp_path):
    assert message_of(tmp_path) == f"model folder {tmp_path} has no config.json"


def test_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert message_of(tmp_path).startswith(f"{tmp_path / 'config.json'} is not valid JSON")


@pytest.mark.parametrize("raw", [{"model_type": "gpt2"}, {}], ids=["another", "none"])
def test_unknown_family_lists_the_known_ones(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert f"model_type {raw.get('model_type')!r}, which is none of: HoVLE" in message_of(tmp_path)


def test_missing_tensor_is_named(checkpoint):
    folder, _, _ = checkpoint()
    path = next(p for p in folder.glob("*.safetensors") if "language_model.output.weight" in load_file(p))
    state = load_file(path)
    del state["language_model.output.weight"]
    save_file(state, path)
    assert message_of(folder) == f"{folder}: 1 tensors are missing, the first is lm_head.weight"


def test_surplus_tensor_is_named(checkpoint):
    folder, _, _ = checkpoint()
    path = next(folder.glob("*.safetensors"))
    save_file({**load_file(path), "language_model.extra.weight": torch.zeros(1)}, path)
    assert message_of(folder) == f"{folder}: 1 tensors are unknown, the first is language_model.extra.weight"


def test_misshapen_tensor_is_named(checkpoint):
    folder, _, _ = checkpoint()
    edit_config(folder, llm_config__vocab_size=65)
    assert "model.embed_tokens.weight has shape (64, 32), expected (65, 32)" in message_of(folder)


def test_missing_weight_file_is_named(checkpoint):
    folder, _, _ = checkpoint()
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names model-00002-of-00003.safetensors, which does not exist" in message_of(folder)


def test_damaged_weight_file_is_named(checkpoint):
    folder, _, _ = checkpoint()
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert message_of(folder).startswith(f"{path} is not a readable safetensors file")


@pytest.mark.parametrize(
    "field, value",
    [("hidden_size", 64), ("num_key_value_heads", 4), ("intermediate_size", 50), ("hidden_act", "gelu")],
)
def test_halves_that_disagree_are_named(checkpoint, field, value):
    folder, config, _ = checkpoint()
    edit_config(folder, **{f"embedding_config__{field}": value})
    theirs = config["llm_config"][field]
    expected = f"embedding_config.{field} is {value}, llm_config.{field} is {theirs}: must agree"
    assert message_of(folder) == f"{folder / 'config.json'}: {expected}"


@pytest.mark.parametrize(
    "field", ["llm_config__rope_theta", "embedding_config__rms_norm_eps", "llm_config__vocab_size"]
)
def test_missing_field_is_named(checkpoint, field):
    folder, _, _ = checkpoint()
    edit_config(folder, **{field: None})
    assert message_of(folder) == f"{folder / 'config.json'}: {field.replace('__', '.')} is missing"


@pytest.mark.parametrize(
    "field, value",
    [("pixel_shuffle_loc", "post"), ("use_pixel_shuffle_proj", False), ("use_ls", True)],
)
def test_unsupported_variant_is_named(checkpoint, field, value):
    folder, _, _ = checkpoint()
    edit_config(folder, **{f"embedding_config__{field}": value})
    assert f"embedding_config.{field} is {value!r}, only " in message_of(folder)


@pytest.mark.parametrize("half", ["llm", "embedding"])
def test_unknown_rotary_scaling_is_named(checkpoint, half):
    folder, _, _ = checkpoint()
    edit_config(folder, **{f"{half}_config__rope_scaling": {"type": "su", "factor": 2.0}})
    assert "rotary scaling 'su' is not supported" in message_of(folder)
