"""Fields that are checked, sizes that are counted, and the file that is written."""

import json

import pytest

from xtuner_ext.modeling import (
    HybridCache,
    HybridVLConfig,
    MixerConfig,
    layer_types_from_attention,
)


def test_unknown_layer_type_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"layer_types\[1\] is 'mamba3', expected full_attention or"):
        HybridVLConfig(num_hidden_layers=2, layer_types=["full_attention", "mamba3"])


@pytest.mark.parametrize("count", [1, 3], ids="{} words".format)
def test_layer_types_must_have_one_word_per_layer(count):
    with pytest.raises(ValueError, match=f"layer_types names {count} layers, the model has 2"):
        HybridVLConfig(num_hidden_layers=2, layer_types=["full_attention"] * count)


@pytest.mark.parametrize("layer", [-1, 4])
def test_attention_layer_out_of_range_is_named(layer):
    with pytest.raises(ValueError, match=f"attention layer {layer} is out of range, .* layers 0 to 3"):
        layer_types_from_attention([0, layer], 4)


def test_attention_layer_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"attention_layers names a layer twice: \[1, 1, 2\]"):
        layer_types_from_attention([1, 2, 1], 4)


def test_layer_types_follow_the_indices_in_any_order():
    expected = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    assert layer_types_from_attention([3, 0], 4) == expected
    assert layer_types_from_attention([], 2) == ["linear_attention"] * 2


@pytest.mark.parametrize(
    "mixer, message",
    [
        ({"conv_kernl": 2}, "unknown mixer key 'conv_kernl', expected one of .*conv_kernel"),
        ({"qk_norm": "rms"}, "unknown mixer.qk_norm 'rms', expected None, 'layernorm' or 'l2'"),
        ({"conv_activation": "gelu"}, "unknown mixer.conv_activation 'gelu', expected None or 'silu'"),
        ({"conv_kernel": 1}, "mixer.conv_kernel is 1, expected 0 or at least 2"),
        ({"conv_kernel": -2}, "mixer.conv_kernel is -2, expected 0 or at least 2"),
        ({"chunk_size": 0}, "mixer.chunk_size is 0, expected at least 1"),
    ],
    ids=["key", "qk_norm", "activation", "one tap", "negative taps", "empty chunks"],
)
def test_bad_mixer_field_is_named(mixer, message):
    with pytest.raises(ValueError, match=message):
        HybridVLConfig(num_hidden_layers=1, mixer=mixer)


def test_attention_everywhere_is_the_default():
    assert HybridVLConfig(num_hidden_layers=3).layer_types == ["full_attention"] * 3


def test_save_and_load_round_trip(make_config, tmp_path):
    config = make_config(
        "hybrid",
        mixer=dict(conv_kernel=4, qk_norm="l2", gate_bias=True),
        num_embedding_layers=1,
        embedding_overrides={"rms_norm_eps": 1e-3},
        eos_token_id=[2, 5],
    )
    config.save_pretrained(tmp_path)
    loaded = HybridVLConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.mixer_config == MixerConfig(conv_kernel=4, qk_norm="l2", gate_bias=True, chunk_size=8)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "hybrid_vl" and written["layer_types"] == config.layer_types


def test_embedding_config_takes_only_the_overrides(make_config):
    config = make_config(embedding_overrides={"rms_norm_eps": 1e-3})
    assert config.embedding_config().rms_norm_eps == 1e-3 and config.rms_norm_eps == 1e-5
    assert config.embedding_config().hidden_size == config.hidden_size


def test_tokens_per_tile():
    vision = dict(front_end="patch", image_size=448, patch_size=14, num_channels=3, downsample_ratio=0.5)
    assert HybridVLConfig(num_hidden_layers=1, vision=vision).tokens_per_tile == 256


def test_cache_bytes_of_the_published_sizes():
    """HoVLE keeps 128 KiB a token; the linear student 32 MiB of state and 0.25 MiB of conv inputs, ever."""
    teacher = HybridVLConfig()
    student = HybridVLConfig(layer_types=["linear_attention"] * 32)
    hybrid = HybridVLConfig(layer_types=layer_types_from_attention(list(range(0, 32, 4)), 32))
    assert teacher.cache_bytes(1000) == 1000 * 128 * 2**10
    assert student.cache_bytes(1) == student.cache_bytes(103_000) == 32 * 2**20 + 2**18
    assert hybrid.cache_bytes(1001) - hybrid.cache_bytes(1000) == 32 * 2**10


def test_empty_cache_takes_nothing(make_config):
    assert HybridCache(make_config("hybrid")).nbytes() == 0
