"""Small decoders with weights large enough that a mistake anywhere shows."""

import pytest
import torch

from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM, Mamba2Mixer

Q = 8
IMAGE = 60
LAYER_TYPES = {
    "linear": ["linear_attention"] * 3,
    "hybrid": ["linear_attention", "full_attention", "linear_attention"],
    "attention": ["full_attention"] * 3,
    "windowed": ["linear_attention", "full_attention", "linear_attention"],
}
# A window shorter than most test sequences, so that the sink and the state matter.
KIND_MIXERS = {"windowed": dict(window=5, sink=True)}
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    image_token_id=IMAGE,
    eos_token_id=None,
    vision=dict(front_end="patch", image_size=16, patch_size=4, num_channels=3, downsample_ratio=0.5),
)


def _config(kind="linear", mixer=None, **changes):
    mixer = {"chunk_size": Q, **KIND_MIXERS.get(kind, {}), **(mixer or {})}
    values = {**SIZES, "layer_types": LAYER_TYPES[kind], "mixer": mixer, **changes}
    return HybridVLConfig(num_hidden_layers=len(values["layer_types"]), **values)


@torch.no_grad()
def _randomise(module, seed=0):
    """Give every parameter a size that matters, decay rates and time steps included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif "conv1d" in name or name.endswith("bias") or parameter.ndim < 2:
            noise = 0.5 * noise - (1.0 if name.endswith("dt_bias") else 0.0)
        elif "embed_tokens" not in name:
            noise = noise / parameter[0].numel() ** 0.5
        parameter.copy_(noise)
    return module.eval()


@pytest.fixture
def make_config():
    """Function that builds a small configuration of a kind of model, with changed fields."""
    return _config


@pytest.fixture
def make_model():
    """Function that builds a small model of a kind, with random weights."""

    def make(kind="linear", **changes):
        model = _randomise(HybridVLForCausalLM(_config(kind, **changes)))
        # As in a trained model, an image token is never the likeliest answer.
        model.lm_head.weight.data[IMAGE] = 0
        return model

    return make


@pytest.fixture
def make_mixer():
    """Function that builds a Mamba-2 mixer of a small model, with random weights."""
    return lambda **flags: _randomise(Mamba2Mixer(_config(mixer=flags), layer_idx=0))
