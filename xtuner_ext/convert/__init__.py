"""Checkpoints of other families in and out, seeding of mixers, export."""

from .teacher import load_teacher, teacher_family

__all__ = ["load_teacher", "teacher_family"]
