"""What the tests of slides share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def transparent(tmp_path: Path, coding: Any) -> tuple[Path, np.ndarray]:
    """An RGBA slide whose left half is transparent, and its colours; a kind that OpenSlide must read."""
    colours = coding.coded_pixels(256, 192)
    alpha = np.full((192, 256, 1), 255, np.uint8)
    alpha[:, :128] = 0
    pixels = np.concatenate([colours, alpha], -1)
    coding.write_levels(tmp_path / "alpha.tif", [pixels], 0.5, 2, extrasamples=["unassalpha"])
    return tmp_path / "alpha.tif", colours
