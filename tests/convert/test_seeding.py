"""First weights of a mixer."""

import math

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.seeding import Seeding, first_token_states, seed_mixer
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import Attention, HybridVLConfig, Mamba2Mixer

HEADS, WIDTH = 16, 64


def seeded(seed=0, mixer=None, bias=False, **seeding):
    """A mixer filled from a random attention, and that attention."""
    config = HybridVLConfig(
        attention_bias=bias,
        num_hidden_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        mixer=mixer,
    )
    torch.manual_seed(5)
    attention, mamba = Attention(config, 0), Mamba2Mixer(config, 0)
    seed_mixer(mamba, attention, Seeding.from_dict(seeding), torch.Generator().manual_seed(seed))
    return mamba, attention


def time_steps(mixer):
    return F.softplus(mixer.dt_bias)


def test_projections_are_the_attention_own():
    mamba, attention = seeded()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(mamba, name).weight, getattr(attention, name).weight), name
    mamba.q_proj.weight.data.zero_()
    assert attention.q_proj.weight.abs().sum() > 0  # a copy, not the same tensor


def test_biases_of_q_k_and_v_are_the_attentions_own_or_zero():
    mamba, attention = seeded(bias=True)
    fresh, _ = seeded(bias=True, inherit_qkv=False)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(mamba, name).bias, getattr(attention, name).bias), name
        assert (getattr(fresh, name).bias == 0).all(), name


def test_reference_start():
    """Identity convolution, no dependence of dt on the input, A = -e, dt in [1e-3, 1e-1], small gate."""
    mamba, _ = seeded()
    taps = mamba.conv1d.weight[:, 0]
    assert (taps[:, 0] == 0).all() and (taps[:, 1] == 1).all() and (mamba.conv1d.bias == 0).all()
    assert (mamba.dt_proj.weight == 0).all()
    assert (mamba.A_log == 1).all()
    assert (mamba.g_norm.weight == 1).all()
    steps = time_steps(mamba)
    assert 1e-3 * 0.999 <= steps.min() and steps.max() <= 1e-1 * 1.001 and steps.std() > 0
    bound = 2**-2.5 * math.sqrt(6 / (2 * WIDTH))
    gate = mamba.g_proj.weight
    assert 0.98 * bound < gate.abs().max() <= bound
    assert abs(gate.mean().item()) < 0.02 * bound


def test_convolution_starts_as_the_activation_exactly():
    mamba, _ = seeded()
    u = torch.randn(2, 9, WIDTH)
    vkq = torch.cat([mamba.v_proj(u), mamba.k_proj(u), mamba.q_proj(u)], dim=-1)
    assert torch.equal(mamba._convolve(vkq, None, None), F.silu(vkq))


def test_reference_time_steps_are_log_uniform():
    logs = torch.cat([time_steps(seeded(seed)[0]).log10() for seed in range(40)])
    assert abs(logs.mean() + 2) < 0.1 and abs(logs.std() - 2 / 12**0.5) < 0.05


def test_improved_start():
    """Evenly spaced time steps from slow to fast, A = -1, and a gate that passes everything."""
    mamba, _ = seeded(mixer={"gate_bias": True}, A_log=0.0, dt_spacing="log", gate="open")
    assert torch.equal(mamba.A_log, torch.zeros(HEADS))
    torch.testing.assert_close(time_steps(mamba), torch.logspace(-3, -1, HEADS), rtol=1e-4, atol=0)
    gate = F.silu(mamba.g_proj(torch.randn(3, WIDTH)))
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-3)


def test_range_of_time_steps_can_be_set():
    steps = time_steps(seeded(dt_min=0.01, dt_max=0.02)[0])
    assert 0.0099 < steps.min() and steps.max() < 0.0201


def test_four_taps_start_as_the_identity_too():
    mamba, _ = seeded(mixer={"conv_kernel": 4})
    assert torch.equal(mamba.conv1d.weight[:, 0], torch.tensor([0.0, 0, 0, 1]).expand(2 * HEADS * 4, 4))


def test_without_mimicry_the_start_is_the_library_own():
    """dt = softplus(0), A between -16 and -1, dt projection and convolution uniform by fan-in."""
    mamba, attention = seeded(mimic=False)
    assert (mamba.dt_bias == 0).all()
    rates = mamba.A_log.exp()
    assert rates.min() >= 1 and rates.max() <= 16 and rates.std() > 1
    for tensor, bound in (
        (mamba.dt_proj.weight, WIDTH**-0.5),
        (mamba.conv1d.weight, 2**-0.5),
        (mamba.conv1d.bias, 2**-0.5),
    ):
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert torch.equal(mamba.q_proj.weight, attention.q_proj.weight)


def test_without_inheritance_q_k_v_are_drawn_and_o_is_kept():
    mamba, attention = seeded(inherit_qkv=False)
    for name in ("q_proj", "k_proj", "v_proj"):
        ours = getattr(mamba, name).weight
        assert not torch.equal(ours, getattr(attention, name).weight), name
        assert 0.9 * WIDTH**-0.5 < ours.abs().max() <= WIDTH**-0.5
    assert torch.equal(mamba.o_proj.weight, attention.o_proj.weight)


OPTIONS = {
    "reference": {},
    "non-mimic": {"mimic": False},
    "no inheritance": {"inherit_qkv": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_same_seed_gives_the_same_weights(options):
    first, again, other = (seeded(seed, **options)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


FLAGS = {
    "no convolution": {"conv_kernel": 0},
    "no gate": {"gate": False},
    "fixed A": {"learn_A": False},
    "D": {"use_D": True},
    "layernorm": {"qk_norm": "layernorm"},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize("mimic", [True, False], ids=["mimic", "non-mimic"])
def test_every_shape_of_mixer_can_be_seeded(flags, mimic):
    mamba, _ = seeded(mixer=flags, mimic=mimic)
    assert mamba(torch.randn(1, 5, WIDTH)).isfinite().all()
    if flags.get("use_D"):
        assert (mamba.D == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dt_spacing": "linear"}, r"seeding.dt_spacing is 'linear', expected one of \('random', 'log'\)"),
        ({"gate": "shut"}, r"seeding.gate is 'shut', expected one of \('xavier', 'open'\)"),
        ({"dt_mn": 0.1}, "unknown seeding key 'dt_mn', expected one of .*dt_min"),
        ({"gate": "open"}, "seeding.gate 'open' needs mixer.gate_bias=True"),
    ],
    ids=["spacing", "gate", "key", "open gate without bias"],
)
def test_unknown_word_is_named(options, message):
    with pytest.raises(UserError, match=message):
        seeded(**options)


ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 1e4},
    # Makes queries and keys longer at every position, the first one too.
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@torch.no_grad()
def test_first_token_states_are_what_transformers_caches_for_one_token(write_text_model, tmp_path, rope):
    theirs = write_text_model(tmp_path, "llama", rope_parameters=rope)
    cache = theirs(torch.tensor([[7]]), use_cache=True).past_key_values
    states = first_token_states(load_teacher(tmp_path), 7)
    assert len(states) == len(cache.layers) == 3
    for (key, value), layer in zip(states, cache.layers):
        torch.testing.assert_close(key, layer.keys[0, :, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, layer.values[0, :, 0], rtol=1e-5, atol=1e-5)


def test_a_sink_starts_as_the_first_token_and_the_window_with_nearly_all_weight():
    config = HybridVLConfig(
        num_hidden_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        mixer=dict(window=4, sink=True),
    )
    first = torch.randn(HEADS // 2, 4), torch.randn(HEADS // 2, 4)
    mamba = Mamba2Mixer(config, 0)
    seed_mixer(mamba, Attention(config, 0), Seeding(), torch.Generator().manual_seed(0), first)
    assert torch.equal(mamba.sink_key, first[0]) and torch.equal(mamba.sink_value, first[1])
    share = torch.sigmoid(mamba.share_proj(torch.randn(5, WIDTH)))
    torch.testing.assert_close(share, torch.full((5, HEADS), 0.9526), rtol=0, atol=1e-3)


def test_first_token_states_need_no_flash_attention(write_text_model, tmp_path):
    """A teacher for a GPU is seeded while it is still on the CPU."""
    write_text_model(tmp_path, "llama")
    model = load_teacher(tmp_path)
    expected = first_token_states(model, 3)
    model.config._attn_implementation = "flash_attention_2"
    for ours, theirs in zip(first_token_states(model, 3), expected):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert model.config._attn_implementation == "flash_attention_2"
