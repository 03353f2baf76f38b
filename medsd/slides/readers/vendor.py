"""Slides of any vendor, as OpenSlide reads them; OpenSlide also says what a file is."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from medsd.errors import SlideError
from medsd.slides.readers.base import RGB, Bools, Size, damaged, read_seen_by_halves, undecodable

_CACHE_BYTES = 64 * 2**20


class VendorSlide:
    """A `LevelReader` over OpenSlide: one handle a thread and process, opened lazily, with one cache for all."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[tuple[int, int], openslide.OpenSlide] = {}
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)
        slide = self._handle()
        self.sizes: tuple[Size, ...] = slide.level_dimensions
        self.properties: Mapping[str, str] = dict(slide.properties)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """See `LevelReader.read`."""
        slide = self._handle()
        # OpenSlide divides level-0 places by its own mean downsample, so multiply by just that.
        downsample = slide.level_downsamples[level]
        place = (round(column * downsample), round(row * downsample))
        try:
            region = np.asarray(slide.read_region(place, level, (columns, rows)))
        except openslide.OpenSlideError as error:
            # OpenSlide refuses everything after its first error; the next read starts with a new handle.
            self._handles.pop((os.getpid(), threading.get_ident()), None)
            raise undecodable(self.path, level, column, row, error) from error
        if region[..., 3].min() == 255:
            return np.ascontiguousarray(region[..., :3])
        white = Image.new("RGBA", (columns, rows), (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, Image.fromarray(region)).convert("RGB"))

    def read_seen(self, level: int, column: int, row: int, columns: int, rows: int) -> tuple[RGB, Bools | None]:
        """See `LevelReader.read_seen`."""
        return read_seen_by_halves(self, level, column, row, columns, rows)

    def close(self) -> None:
        """See `LevelReader.close`."""
        for key in list(self._handles):
            # A handle that another thread is reading with lives until that read ends; those of a parent process are
            # not ours to close.
            if key[0] == os.getpid():
                self._handles.pop(key, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)

    def _handle(self) -> openslide.OpenSlide:
        key = (os.getpid(), threading.get_ident())
        slide = self._handles.get(key)
        if slide is None:
            slide = self._handles[key] = _open(self.path)
            slide.set_cache(self._cache)
        return slide


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise UnknownFormatError(
            f"{path}: not a slide of a known format; convert it to a tiled pyramidal TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise damaged(path, error) from error


class UnknownFormatError(SlideError):
    """OpenSlide does not know the file's format."""
