"""Supervised fine-tuning."""

from .model import SupervisedModel

__all__ = ["SupervisedModel"]
