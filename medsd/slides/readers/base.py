"""What every reader of slide files offers, and what they share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medsd.errors import SlideError

RGB = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Size = tuple[int, int]

# Where a reader cannot say which of its tiles is damaged, an area is halved down to about this side (level pixels).
_SMALLEST_UNSEEN_PX = 128


class LevelReader(Protocol):
    """The levels of one file, read in whole pixels. Safe for threads, for fork and for pickling.

    Attributes:
        name: the library that decodes the file.
        sizes: (width, height) of each level in its own pixels, level 0 first.
        properties: what the file says of itself; the scale is looked up here (see `mpp.resolve_mpp`).
    """

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> tuple[Size, ...]: ...
    @property
    def properties(self) -> Mapping[str, str]: ...

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """Pixels (rows, columns, 3) of a rectangle that lies inside the level, transparency on white.

        Raises:
            SlideError: the rectangle cannot be decoded.
        """
        ...

    def read_seen(self, level: int, column: int, row: int, columns: int, rows: int) -> tuple[RGB, Bools | None]:
        """Like `read`, with what cannot be decoded white, and (rows, columns) bool False there; None where whole."""
        ...

    def close(self) -> None:
        """Let go of this process's handles."""
        ...


def read_seen_by_halves(
    reader: LevelReader, level: int, column: int, row: int, columns: int, rows: int
) -> tuple[RGB, Bools | None]:
    """`LevelReader.read_seen` for readers that fail as a whole: the area is halved until its damage is fenced in."""
    try:
        return reader.read(level, column, row, columns, rows), None
    except SlideError:
        if max(columns, rows) <= _SMALLEST_UNSEEN_PX:
            return np.full((rows, columns, 3), 255, np.uint8), np.zeros((rows, columns), np.bool_)
    if columns >= rows:
        half = columns // 2
        parts = [(column, row, half, rows), (column + half, row, columns - half, rows)]
    else:
        half = rows // 2
        parts = [(column, row, columns, half), (column, row + half, columns, rows - half)]
    pixels = np.empty((rows, columns, 3), np.uint8)
    seen = np.ones((rows, columns), np.bool_)
    for left, top, width, height in parts:
        place = np.s_[top - row : top - row + height, left - column : left - column + width]
        pixels[place], part_seen = read_seen_by_halves(reader, level, left, top, width, height)
        if part_seen is not None:
            seen[place] = part_seen
    return pixels, seen


def check_file(path: Path) -> None:
    """Raise SlideError where `path` is not a file that can be read."""
    if not path.exists():
        raise SlideError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise SlideError(f"{path}: is a folder, not a slide; name a slide file in it")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: cannot be read (no permission); change its permissions")


def undecodable(path: Path, level: int, column: int, row: int, error: Exception) -> SlideError:
    """The error of an area that cannot be decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    place = f"level {level}, near its pixel ({column}, {row})"
    return SlideError(f"{path}: cannot be decoded at {place} ({reason}); copy it again from its source")


def damaged(path: Path, error: Exception) -> SlideError:
    """The error of a file that cannot be opened."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return SlideError(f"{path}: damaged slide ({reason}); copy it again from its source")
