"""Errors that nobody foresaw, and that must cost one slide of a cohort only."""

from __future__ import annotations

from pathlib import Path

from shapely.errors import GEOSException

UNFORESEEN = (OSError, RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError, GEOSException)
"""What a damaged file or a full memory can raise deep inside a library."""


def in_one_line(path: Path, error: Exception) -> str:
    """The reason why a slide failed: its file, the kind of error and its words."""
    return f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"
