"""Tiles that are not in a file: left out on purpose, as background, or lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from medsd.slides.readers.base import RGB, Size
from medsd.slides.readers.damage import DAMAGED

LOST = "a tile is not in the file, though another level shows something there"
"""What is said of one."""

# Glass is not white, and levels are interpolated: tissue differs from background by more, and on more than a border
# (our choice).
_DIFFERENT, _SHARE = 35, 0.05
_LEAST_PX = 2


def is_lost(
    read: Callable[[int, int, int, int, int], RGB],
    sizes: Sequence[Size],
    level: int,
    area: tuple[int, int, int, int],
    shown: int = 255,
) -> bool:
    """Whether another level shows something where a level has no tile.

    Writers that leave out background make the coarser levels of what is left, so that these show background, too.

    Args:
        read: pixels of (level, column, row, columns, rows), absent tiles as `shown`; raises what damage raises.
        sizes: (width, height) of the levels.
        level: the one without the tile.
        area: (column, row, columns, rows) of the tile, in its pixels.
        shown: the grey that an absent tile is shown as.
    """
    return any(
        _differs(read, sizes, level, other, area, shown)
        for other in (*range(level + 1, len(sizes)), level - 1)
        if other >= 0
    )


def _differs(
    read: Callable[[int, int, int, int, int], RGB],
    sizes: Sequence[Size],
    level: int,
    other: int,
    area: tuple[int, int, int, int],
    shown: int,
) -> bool:
    scale = [there / here for there, here in zip(sizes[other], sizes[level], strict=True)]
    # Without the pixels at the border, which neighbours have a share in.
    left, top = (math.ceil(area[axis] * scale[axis]) + 1 for axis in (0, 1))
    ends = (min((area[axis] + area[axis + 2]) * scale[axis], sizes[other][axis]) for axis in (0, 1))
    right, bottom = (math.floor(end) - 1 for end in ends)
    if right - left < _LEAST_PX or bottom - top < _LEAST_PX:
        return False
    try:
        pixels = read(other, left, top, right - left, bottom - top)
    except DAMAGED:
        return False
    apart = np.abs(pixels.astype(np.int16) - shown).max(axis=2) > _DIFFERENT
    return bool(apart.mean() > _SHARE)
