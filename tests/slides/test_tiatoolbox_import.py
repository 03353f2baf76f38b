"""The process is left as it was."""

from __future__ import annotations

import logging
import warnings

import pytest

from medsd.slides.tiatoolbox_import import logging_untouched


def test_what_an_import_does_to_logging_is_undone() -> None:
    """tiatoolbox gives the root logger handlers, a filter and a level, and captures warnings."""
    root = logging.getLogger()
    state = root.handlers[:], root.level, root.filters[:], warnings.showwarning
    with pytest.raises(ImportError), logging_untouched():
        root.addHandler(logging.NullHandler())
        root.addFilter(logging.Filter("x"))
        root.setLevel(logging.CRITICAL)
        logging.captureWarnings(True)
        raise ImportError
    assert (root.handlers[:], root.level, root.filters[:], warnings.showwarning) == state
