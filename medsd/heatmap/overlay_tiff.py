"""The slide with its map as a picture that any viewer of slides opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from medsd import RESEARCH_USE_ONLY
from medsd.drawing import outline
from medsd.files import atomic_path, printable
from medsd.heatmap.overlay import MappedSlide, with_map
from medsd.heatmap.zoom import TILE_PX, read_tile, zoom_steps
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide

FINEST_MPP = 0.9
"""No pixel is smaller (our choice): a map has no finer detail, and a slide of 100,000 px stays near 100 MB."""
_JPEG_QUALITY = 85


def write_overlay_tiff(path: str | Path, slide: Slide, mapped: MappedSlide) -> None:
    """Write the slide in light grey, its first map over it and its regions outlined, as `overlay.tif`, atomically.

    A generic tiled BigTIFF as scanners write them: JPEG tiles of 256 px, each level half the one before, as pages
    marked as reduced, with their resolution. OpenSlide, QuPath, ASAP and tiatoolbox read it. Memory stays at a few
    tiles.

    Args:
        path: the file.
        slide: the slide.
        mapped: what is shown of it.

    Raises:
        OutputError: the file cannot be written.
    """
    steps = zoom_steps(slide.dimensions)
    steps = [step for step in steps if step * slide.mpp >= FINEST_MPP] or steps[-1:]
    shown = mapped.maps[0]
    about = printable(f"{mapped.name}: {shown.heading}. {RESEARCH_USE_ONLY}")
    with (
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=True) as writer,  # tiatoolbox takes another for a plain picture
    ):
        for number, step in enumerate(steps):
            width, height = (-(-side // step) for side in slide.dimensions)
            writer.write(
                _tiles(slide, mapped, step),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                resolution=(1e4 / (slide.mpp * step),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=1 if number else 0,
                metadata=None,
                software="medsd",
                description=None if number else about.encode("ascii", "replace"),
            )


def _tiles(slide: Slide, mapped: MappedSlide, step: int) -> Iterator[RGB]:
    """The level's tiles from left to right and top to bottom, white beyond the slide."""
    size = TILE_PX * step
    columns, rows = (-(-side // size) for side in slide.dimensions)
    shown = mapped.maps[0]
    for row in range(rows):
        for column in range(columns):
            place = column * size, row * size
            pixels = with_map(read_tile(slide, step, column, row), shown, (step, step), place=place)
            outline(pixels, _shapes_in(mapped, place, step))
            tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
            tile[: pixels.shape[0], : pixels.shape[1]] = pixels
            yield tile


def _shapes_in(mapped: MappedSlide, place: tuple[int, int], step: int) -> list[list[Any]]:
    """Rings, in the pixels of a tile, of the regions that it may show."""
    margin, size = 4 * step, TILE_PX * step
    (x, y), found = place, []
    for region in [] if mapped.findings is None else mapped.findings.regions:
        left, top, right, bottom = region.polygon.bounds
        if left < x + size + margin and right > x - margin and top < y + size + margin and bottom > y - margin:
            found.append([(ring - place) / step for ring in region.rings])
    return found
