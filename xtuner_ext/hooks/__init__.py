"""Pieces of the training engine: one hook or loop, one file."""

from .checkpoint import SafeCheckpointHook
from .export import ExportTeacherHook
from .held_out import HeldOutHook
from .train_loop import ResumableTrainLoop

__all__ = ["ExportTeacherHook", "HeldOutHook", "ResumableTrainLoop", "SafeCheckpointHook"]
