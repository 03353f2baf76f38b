"""What the import of tiatoolbox does to the whole process, undone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logging_untouched() -> Iterator[None]:
    """Keep the root logger and Python's warnings as they are while tiatoolbox (2.1) is imported inside the block."""
    root = logging.getLogger()
    before, level, filters, show = root.handlers[:], root.level, root.filters[:], warnings.showwarning
    try:
        yield
    finally:
        root.handlers[:], root.filters[:] = before, filters
        root.setLevel(level)
        if warnings.showwarning is not show:
            logging.captureWarnings(False)
