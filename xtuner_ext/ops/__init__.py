"""Sequence-mixing numerics: one function per operation, a torch twin, backends by name."""

from .causal_conv import causal_conv
from .causal_conv_step import causal_conv_step
from .ssd import ssd
from .ssd_step import ssd_step

__all__ = ["causal_conv", "causal_conv_step", "ssd", "ssd_step"]
