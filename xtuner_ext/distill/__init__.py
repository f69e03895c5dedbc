"""Three-stage distillation under MMEngine."""

from .model import DistillModel

__all__ = ["DistillModel"]
