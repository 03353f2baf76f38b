"""Tiled TIFF and Aperio slides as cuCIM reads them, for those who ask for it by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import COMPRESSION

from medsd.errors import SlideError
from medsd.slides.readers.base import RGB, Bools, damaged, read_seen_by_halves, undecodable
from medsd.slides.readers.codecs import DAMAGED
from medsd.slides.readers.tiff import TiledTiff

# Others it does not know, and it ends the process at some deflated ones (cuCIM 26.10).
_COMPRESSIONS = (COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.JPEG, COMPRESSION.APERIO_JP2000_RGB)


class CucimSlide:
    """A `LevelReader` over cuCIM: one handle a process, read by any thread.

    Never chosen by itself: cuCIM shows damaged tiles as grey, and can end the process at files it does not expect. So
    it gets those alone that this package knows well.

    Args:
        tiled: the slide as this package reads it.

    Raises:
        SlideError: cuCIM is not installed, or does not read such tiles.
    """

    name = "cucim"

    def __init__(self, tiled: TiledTiff) -> None:
        self.path = tiled.path
        self.sizes = tiled.sizes
        self.properties: Mapping[str, str] = tiled.properties
        plain = all(
            level.codec.compression in _COMPRESSIONS and level.codec.samples == 3 and level.counts.all()
            for level in tiled.levels
        )
        if not plain:
            raise _unfit(self.path)
        self._handles: dict[int, Any] = {}
        resolutions = self._handle().resolutions
        if tuple(map(tuple, resolutions["level_dimensions"])) != self.sizes:
            raise _unfit(self.path)
        self._downsamples: tuple[float, ...] = tuple(resolutions["level_downsamples"])

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """See `LevelReader.read`."""
        downsample = self._downsamples[level]
        # cuCIM divides level-0 places by its own mean downsample and rounds down: aim at the pixel's middle.
        place = (int((column + 0.5) * downsample), int((row + 0.5) * downsample))
        try:
            pixels = np.asarray(self._handle().read_region(place, (columns, rows), level))
            if pixels.shape != (rows, columns, 3) or pixels.dtype != np.uint8:
                raise ValueError(f"pixels of shape {pixels.shape} and {pixels.dtype}")
        except DAMAGED as error:
            raise undecodable(self.path, level, column, row, error) from error
        return pixels

    def read_seen(self, level: int, column: int, row: int, columns: int, rows: int) -> tuple[RGB, Bools | None]:
        """See `LevelReader.read_seen`."""
        return read_seen_by_halves(self, level, column, row, columns, rows)

    def close(self) -> None:
        """See `LevelReader.close`."""
        self._handles.pop(os.getpid(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _handle(self) -> Any:
        handle = self._handles.get(os.getpid())
        if handle is None:
            handle = self._handles[os.getpid()] = _open(self.path)
        return handle


def _unfit(path: Path) -> SlideError:
    return SlideError(f"{path}: not tiles of RGB that cuCIM reads (JPEG, LZW or none, no OME); leave out reader=cucim")


def _open(path: Path) -> Any:
    try:
        from cucim import CuImage
    except ImportError as error:
        raise SlideError(
            f"{path}: reader=cucim needs cuCIM, which is missing ({error}); install cucim-cu12 or leave out the reader"
        ) from error
    try:
        return CuImage(str(path))
    except DAMAGED as error:
        raise damaged(path, error) from error
