"""Phantom slides on disk: pyramidal TIFF files as scanners write them, and ASAP XML annotations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from shapely.geometry import Polygon

from medsd.annotations import Outline, annotations_of, write_asap_xml
from medsd.files import atomic_path
from medsd.phantom.shapes import ByteArray, IntArray

_TILE_PX = 256
_SMALLEST_LEVEL_PX = 512
_JPEG_QUALITY = 85
_BIG_TIFF_BYTES = 2**31
# As in the files of CAMELYON16.
_OUTLINE_COLOUR, _GROUP_COLOUR = (0xF4, 0xFA, 0x58), (0x64, 0xFE, 0x2E)


def pyramid(level0: ByteArray, factor: int) -> Iterator[ByteArray]:
    """`level0` and block means of it, each `factor` smaller than the one before, down to 512 px or less.

    A mask of 0 and 1 stays one: a pixel is 1 where at least half of its block is.
    """
    level = level0
    yield level
    while max(level.shape[:2]) > _SMALLEST_LEVEL_PX:
        height, width = level.shape[0] // factor, level.shape[1] // factor
        whole = level[: height * factor, : width * factor]
        # Row by row, then column by column: NumPy's own sum over the axes of blocks takes ten times as long.
        rows = sum((whole[row::factor] for row in range(1, factor)), whole[::factor].astype(np.uint16))
        total = sum((rows[:, column::factor] for column in range(1, factor)), rows[:, ::factor])
        level = ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)
        yield level


def write_pyramid(path: str | Path, level0: ByteArray, mpp: float, factor: int) -> None:
    """Write a generic tiled pyramidal TIFF: JPEG for RGB (height, width, 3), deflate for a mask (height, width).

    Lower levels are pages marked as reduced images; each carries its resolution in pixels per centimetre.

    Args:
        mpp: micrometres per pixel of `level0`.

    Raises:
        OutputError: the file cannot be written.
    """
    coding: dict[str, Any] = {"photometric": "minisblack", "compression": "deflate"}
    if level0.ndim == 3:
        coding = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": _JPEG_QUALITY}}
    with (
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=level0.nbytes > _BIG_TIFF_BYTES) as writer,
    ):
        for index, level in enumerate(pyramid(level0, factor)):
            level_mpp = mpp * level0.shape[1] / level.shape[1]
            writer.write(
                level,
                tile=(_TILE_PX, _TILE_PX),
                resolution=(1e4 / level_mpp, 1e4 / level_mpp),
                resolutionunit="CENTIMETER",
                subfiletype=1 if index else 0,
                metadata=None,
                software="medsd phantom",
                **coding,
            )


def write_outlines(path: str | Path, polygons: tuple[IntArray, ...]) -> None:
    """Write outlines (n, 2) of level-0 pixels (x, y) as ASAP XML, in group `_0` (tumour) as CAMELYON16 does.

    Raises:
        OutputError: the file cannot be written.
    """
    outlines = [
        Outline(f"Annotation {index}", "_0", False, Polygon(polygon), _OUTLINE_COLOUR, _GROUP_COLOUR)
        for index, polygon in enumerate(polygons)
    ]
    write_asap_xml(path, annotations_of(outlines))
