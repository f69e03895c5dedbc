"""Pure functions from result rows to metrics; they know neither models nor data."""

from .exact import exact_match, mark_rows, score_rows

__all__ = ["exact_match", "mark_rows", "score_rows"]
