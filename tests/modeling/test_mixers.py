"""The Mamba-2 mixer against the written-out one, and what its flags do."""

import pytest
import torch
import torch.nn.functional as F

from tests.reference.mixer import mixer_param_shapes, naive_mamba_mixer
from xtuner_ext.modeling import Attention, HybridCache, Mamba2Mixer

HEADS, KV_HEADS, WIDTH = 4, 2, 32
OUR_NAMES = {"in_proj.weight": "dt_proj.weight", "A_log_bias": "A_log"}


def make_inputs(length=19, batch=2):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def reference_parameters(mixer):
    ours = dict(mixer.named_parameters())
    return {name: ours[OUR_NAMES.get(name, name)] for name in mixer_param_shapes(WIDTH, HEADS, KV_HEADS)}


def test_has_the_reference_parameters_and_no_other(make_mixer):
    shapes = mixer_param_shapes(WIDTH, HEADS, KV_HEADS)
    found = {name: tuple(p.shape) for name, p in make_mixer().named_parameters()}
    assert found == {OUR_NAMES.get(name, name): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["one sample", "packed"])
@pytest.mark.parametrize("length", [1, 7, 8, 19], ids="length{}".format)
def test_default_flags_equal_the_written_out_mixer_with_every_gradient(make_mixer, length, packed):
    mixer, u = make_mixer(), make_inputs(length)
    ids = torch.arange(length).div(5, rounding_mode="floor").expand(2, -1) if packed else None
    heads = mixer.head_outputs(u, segment_ids=ids)
    parameters = reference_parameters(mixer)
    expected_heads, expected = naive_mamba_mixer(parameters, u, HEADS, KV_HEADS, segment_ids=ids)
    torch.testing.assert_close(heads, expected_heads, rtol=1e-4, atol=1e-4)
    output = mixer(u, segment_ids=ids)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    for name, value, target in zip(parameters, found, wanted):
        error = (value - target).abs().max() / target.abs().max().clamp(min=1)
        assert error < 1e-3, f"gradient of {name} is off by {error:.2g}"


def test_query_heads_read_the_key_and_value_of_their_own_group(make_mixer):
    """Heads 0 and 1 belong to key/value head 0, heads 2 and 3 to head 1."""
    mixer, u = make_mixer(), make_inputs()
    before = mixer.head_outputs(u)
    with torch.no_grad():
        mixer.v_proj.weight[8:] *= -1  # the value rows of key/value head 1
    changed = (mixer.head_outputs(u) != before).any(-1).flatten(0, 1)
    assert not changed[:, :2].any() and changed[:, 2:].any(0).all()


def test_identity_convolution_is_silu_exactly(make_mixer):
    mixer, u = make_mixer(), make_inputs()
    with torch.no_grad():
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, 0, -1] = 1
        mixer.conv1d.bias.zero_()
    vkq = torch.cat([mixer.v_proj(u), mixer.k_proj(u), mixer.q_proj(u)], dim=-1)
    assert torch.equal(mixer._convolve(vkq, None, None), F.silu(vkq))


FLAGS = {
    "no convolution": dict(conv_kernel=0),
    "four taps": dict(conv_kernel=4),
    "no activation": dict(conv_activation=None),
    "no convolution, no activation": dict(conv_kernel=0, conv_activation=None),
    "layernorm on q and k": dict(qk_norm="layernorm"),
    "l2 on q and k": dict(qk_norm="l2"),
    "no gate": dict(gate=False),
    "gate with bias": dict(gate_bias=True),
    "D": dict(use_D=True),
    "fixed A": dict(learn_A=False),
    "rotary positions": dict(use_rope=True),
    "window": dict(window=4),
    "window and sink": dict(window=4, sink=True),
    "window longer than the sequence": dict(window=40),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_flag_changes_the_output_and_keeps_the_cache_contract(make_mixer, make_config, flags):
    """With equal shared weights another flag gives other numbers; prefill and decoding still agree."""
    base, mixer, u = make_mixer(), make_mixer(**flags), make_inputs()
    shared = {
        name: value
        for name, value in base.state_dict().items()
        if name in mixer.state_dict() and mixer.state_dict()[name].shape == value.shape
    }
    mixer.load_state_dict(shared, strict=False)
    angles = torch.arange(19)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.01] * 2)
    positions = torch.arange(19)[None]
    whole = mixer.head_outputs(u, position_embeddings=(angles.cos(), angles.sin()), position_ids=positions)
    assert whole.isfinite().all() and not torch.allclose(whole, base.head_outputs(u), atol=1e-3)
    cache = HybridCache(make_config(mixer=flags))
    parts = [
        mixer.head_outputs(part, position_embeddings=(angle.cos(), angle.sin()), position_ids=position, cache=cache)
        for part, angle, position in zip(*(t.split([9, 5, 1, 4], dim=1) for t in (u, angles, positions)))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_chunk_size_changes_speed_only(make_mixer):
    u = make_inputs()
    few, many = (make_mixer(chunk_size=size)(u) for size in (4, 64))
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)


def test_without_gate_D_adds_v(make_mixer):
    flags = dict(gate=False, conv_kernel=0, conv_activation=None)
    mixer, u = make_mixer(use_D=True, **flags), make_inputs()
    v = mixer.v_proj(u).unflatten(-1, (KV_HEADS, 8))[:, :, [0, 0, 1, 1]]
    with_D = mixer.head_outputs(u)
    mixer.D.data.zero_()
    bare = mixer.head_outputs(u)
    mixer.D.data.fill_(2.0)
    torch.testing.assert_close(mixer.head_outputs(u) - bare, 2 * v, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_D, bare)


def test_l2_norm_makes_the_scale_of_q_and_k_irrelevant(make_mixer):
    flags = dict(qk_norm="l2", conv_kernel=0, conv_activation=None)
    mixer, u = make_mixer(**flags), make_inputs()
    before = mixer(u)
    with torch.no_grad():
        mixer.q_proj.weight *= 3
        mixer.k_proj.weight *= 5
    torch.testing.assert_close(mixer(u), before, rtol=1e-4, atol=1e-4)


def test_attention_reads_the_key_and_value_of_its_own_group(make_config):
    torch.manual_seed(0)
    attention, u = Attention(make_config("attention"), 0), make_inputs()
    positions = (torch.ones(2, 19, 8), torch.zeros(2, 19, 8))
    before = attention.head_outputs(u, position_embeddings=positions)
    with torch.no_grad():
        attention.v_proj.weight[8:] *= -1
    changed = (attention.head_outputs(u, position_embeddings=positions) != before).any(-1).flatten(0, 1)
    assert not changed[:, :2].any() and changed[:, 2:].any(0).all()


def test_mixer_and_attention_share_the_projections_of_the_checkpoint(make_config):
    attention, mamba = (
        {name: tuple(p.shape) for name, p in kind(make_config(), 0).named_parameters()}
        for kind in (Attention, Mamba2Mixer)
    )
    assert attention.items() <= mamba.items() and len(attention) == 4


def test_a_window_over_everything_with_the_state_switched_off_is_attention(make_mixer, make_config):
    """Then the mixer with the attention's own projections gives the attention's own heads."""
    mixer, u = make_mixer(window=19, gate_bias=True), make_inputs()
    attention = Attention(make_config("attention"), 0)
    attention.load_state_dict({k: v for k, v in mixer.state_dict().items() if k in attention.state_dict()})
    attention.config._attn_implementation = "eager"
    with torch.no_grad():
        for parameter in (mixer.g_proj.weight, mixer.g_proj.bias, mixer.share_proj.weight):
            parameter.zero_()
        mixer.share_proj.bias.fill_(50.0)
    angles = torch.arange(19)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.01] * 2)
    positions = (angles.cos(), angles.sin())
    causal = torch.full((19, 19), -torch.inf).triu(1)[None, None]
    expected = attention.head_outputs(u, position_embeddings=positions, attention_mask=causal)
    torch.testing.assert_close(mixer.head_outputs(u, position_embeddings=positions), expected)
