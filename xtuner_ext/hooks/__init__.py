"""Pieces of the training engine: one hook or loop, one file."""

from .bad_samples import BadSampleHook
from .checkpoint import SafeCheckpointHook
from .export import ExportTeacherHook
from .held_out import HeldOutHook
from .train_loop import ResumableTrainLoop

__all__ = ["BadSampleHook", "ExportTeacherHook", "HeldOutHook", "ResumableTrainLoop", "SafeCheckpointHook"]
