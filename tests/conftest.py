"""Fixtures shared by all tests."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real files (MEDSD_DATA, or `shared/data` beside the checkout); skips where it is not."""
    folder = Path(os.environ.get("MEDSD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "SOURCES.md").is_file():
        pytest.skip(f"real data not present: {folder} (set MEDSD_DATA to the folder that holds them)")
    return folder


class ArraySlide:
    """A slide held in memory, read at multiples of its mpp only: whole pixels, white outside."""

    reader, mpp_source, path = "array", "test", Path("array")

    def __init__(self, pixels: np.ndarray, mpp: float = 1.0) -> None:
        self.pixels, self.mpp = pixels, mpp
        self.dimensions = (pixels.shape[1], pixels.shape[0])

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> np.ndarray:
        step = round((mpp or self.mpp) / self.mpp)
        left, top = math.floor(x), math.floor(y)
        rows = np.arange(top, top + height * step, step)
        columns = np.arange(left, left + width * step, step)
        region = np.full((height, width, 3), 255, np.uint8)
        inside_rows = (rows >= 0) & (rows < self.pixels.shape[0])
        inside_columns = (columns >= 0) & (columns < self.pixels.shape[1])
        region[np.ix_(inside_rows, inside_columns)] = self.pixels[np.ix_(rows[inside_rows], columns[inside_columns])]
        return region

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        return self.read(x, y, width, height, mpp), None

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def array_slide() -> type[ArraySlide]:
    """Makes a slide of an RGB array."""
    return ArraySlide
