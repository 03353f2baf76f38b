"""Slides of any vendor, as OpenSlide reads them; OpenSlide also says what a file is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from medsd.errors import SlideError
from medsd.slides.readers.base import RGB, Handles, LevelReader, Size
from medsd.slides.readers.damage import damage_named

_CACHE_BYTES = 64 * 2**20


class VendorSlide(LevelReader):
    """A reader over OpenSlide: one handle a thread and process, with one cache for all of a process.

    Raises:
        SlideError: damaged, or of a format that OpenSlide does not know.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self.path = path
        cache = Handles(partial(openslide.OpenSlideCache, _CACHE_BYTES))
        self._handles = Handles(partial(_open, path, cache), by_thread=True)
        slide = self._handles.here()
        self.sizes: tuple[Size, ...] = slide.level_dimensions
        self.properties: Mapping[str, str] = dict(slide.properties)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        slide = self._handles.here()
        # OpenSlide divides level-0 places by its own mean downsample, so multiply by just that.
        downsample = slide.level_downsamples[level]
        place = (round(column * downsample), round(row * downsample))
        try:
            with damage_named(self.path, (level, column, row)):
                region = np.asarray(slide.read_region(place, level, (columns, rows)))
        except SlideError:
            self._handles.forget()  # OpenSlide refuses everything after its first error
            raise
        if region[..., 3].min() == 255:
            return np.ascontiguousarray(region[..., :3])
        return on_white(Image.fromarray(region))


def on_white(picture: Image.Image) -> RGB:
    """(height, width, 3) of a picture with transparency."""
    shown = picture.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", shown.size, (255, 255, 255, 255)), shown).convert("RGB"))


def is_unknown(error: SlideError) -> bool:
    """Whether a file could not be opened because OpenSlide does not know its format."""
    return isinstance(error.__cause__, openslide.OpenSlideUnsupportedFormatError)


def _open(path: Path, cache: Handles[openslide.OpenSlideCache]) -> openslide.OpenSlide:
    with damage_named(path):
        try:
            slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideError(f"{path}: not a slide of a known format; convert it to a tiled pyramidal TIFF") from error
    slide.set_cache(cache.here())
    return slide
