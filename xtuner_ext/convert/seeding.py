"""Giving a Mamba-2 mixer its first weights from the attention it replaces.

C, B, x and the output projection of the mixer are the attention's q, k, v and o (mmMamba, arXiv
2502.13145, section 3.2). The rest starts so that the layer is close to linear attention.
"""

import dataclasses
import math

import torch
from torch import nn

from ..errors import UserError
from ..modeling import HybridCache


@dataclasses.dataclass
class Seeding:
    """How new weights start.

    Attributes:
        inherit_qkv (bool): Copy q, k and v; False draws them anew.
        mimic (bool): Identity convolution, zero dt projection and the dt and A below; False takes the
            library's random initialisation, which forgets within a few tokens.
        A_log (float): Log of the decay rate; A = -exp(A_log).
        dt_min (float): Smallest time step.
        dt_max (float): Largest time step.
        dt_spacing (str): ``random`` draws each head's step log-uniformly, ``log`` spaces the heads evenly.
        gate (str): ``xavier`` starts near zero (gain 2**-2.5), ``open`` near one through a bias.
    """

    inherit_qkv: bool = True
    mimic: bool = True
    A_log: float = 1.0
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_spacing: str = "random"
    gate: str = "xavier"

    def __post_init__(self):
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError(f"seeding.dt_min is {self.dt_min} and dt_max {self.dt_max}, expected 0 < dt_min <= dt_max")
        for name, value, words in (("dt_spacing", self.dt_spacing, ("random", "log")), ("gate", self.gate, ("xavier", "open"))):
            if value not in words:
                raise UserError(f"seeding.{name} is {value!r}, expected one of {words}")

    @classmethod
    def from_dict(cls, values):
        """Build from a config dict.

        Raises:
            UserError: For an unknown key or word.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown seeding key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
        return cls(**values)


# SiLU(1.28) is about 1, so that a gate with zero weights and this bias passes everything.
OPEN_GATE_BIAS = 1.2785


# sigmoid(3) = 0.95: nearly all weight lies in the window at first.
FULL_SHARE_BIAS = 3.0


@torch.no_grad()
def seed_mixer(mixer, attention, seeding, generator, first_token=None):
    """Fill a mixer's weights.

    Args:
        mixer (Mamba2Mixer): Filled in place.
        attention (Attention): Gives q, k, v and o.
        seeding (Seeding): How new weights start.
        generator (torch.Generator): Source of randomness, on the CPU.
        first_token (tuple[Tensor, Tensor], optional): Key and value that the attention gives the first token
            of a sequence, (G, P) each; a sink starts as these.
    """
    if seeding.inherit_qkv:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())
    else:
        for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
            _uniform(module.weight, module.in_features**-0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
    mixer.o_proj.load_state_dict(attention.o_proj.state_dict())
    if seeding.mimic:
        _mimic(mixer, seeding, generator)
    else:
        _forgetful(mixer, generator)
    if mixer.mixer.use_D:
        mixer.D.fill_(1.0)
    if mixer.mixer.window:
        mixer.share_proj.weight.zero_()
        mixer.share_proj.bias.fill_(FULL_SHARE_BIAS)
    if mixer.mixer.sink and first_token is not None:
        mixer.sink_key.copy_(first_token[0])
        mixer.sink_value.copy_(first_token[1])
    if mixer.mixer.gate:
        mixer.g_norm.weight.fill_(1.0)
        if seeding.gate == "open":
            if mixer.g_proj.bias is None:
                raise UserError("seeding.gate 'open' needs mixer.gate_bias=True")
            mixer.g_proj.weight.zero_()
            mixer.g_proj.bias.fill_(OPEN_GATE_BIAS)
        else:
            fan = mixer.g_proj.in_features + mixer.g_proj.out_features
            _uniform(mixer.g_proj.weight, 2**-2.5 * math.sqrt(6 / fan), generator)
            if mixer.g_proj.bias is not None:
                mixer.g_proj.bias.zero_()


@torch.no_grad()
def first_token_states(model, token_id):
    """Keys and values that every layer gives a token at the start of a sequence.

    Args:
        model (HybridVLForCausalLM): Attention everywhere.
        token_id (int): Usually the one that conversations start with.

    Returns:
        list[tuple[Tensor, Tensor]]: Key, with its position applied, and value (G, P) of each layer.
    """
    cache, chosen = HybridCache(model.config), model.config._attn_implementation
    # The model is still on the CPU, where flash attention does not run.
    model.config._attn_implementation = "sdpa"
    model.model(torch.tensor([[token_id]], device=model.device), past_key_values=cache)
    model.config._attn_implementation = chosen
    return [(layer.keys[0, :, 0], layer.values[0, :, 0]) for layer in cache.layers]


def _mimic(mixer, seeding, generator):
    if mixer.mixer.conv_kernel:
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, 0, -1] = 1.0
        mixer.conv1d.bias.zero_()
    mixer.dt_proj.weight.zero_()
    low, high = math.log(seeding.dt_min), math.log(seeding.dt_max)
    if seeding.dt_spacing == "log":
        dt = torch.linspace(low, high, mixer.num_heads).exp()
    else:
        dt = (torch.rand(mixer.num_heads, generator=generator) * (high - low) + low).exp()
    # Inverse of softplus.
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    if mixer.mixer.learn_A:
        mixer.A_log.fill_(seeding.A_log)


def _forgetful(mixer, generator):
    if mixer.mixer.conv_kernel:
        bound = mixer.mixer.conv_kernel**-0.5
        _uniform(mixer.conv1d.weight, bound, generator)
        _uniform(mixer.conv1d.bias, bound, generator)
    _uniform(mixer.dt_proj.weight, mixer.dt_proj.in_features**-0.5, generator)
    mixer.dt_bias.zero_()
    if mixer.mixer.learn_A:
        mixer.A_log.copy_(torch.log(torch.rand(mixer.num_heads, generator=generator) * 15 + 1))


def _uniform(tensor, bound, generator):
    if not tensor.is_meta:
        nn.init.uniform_(tensor, -bound, bound, generator=generator)
