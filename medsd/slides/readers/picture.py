"""Plain pictures (PNG, JPEG, TIFF without tiles) as slides of one level, decoded as a whole when first read."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from medsd.errors import SlideError
from medsd.slides.readers.base import RGB, Handles, LevelReader, Size
from medsd.slides.readers.damage import DAMAGED, damage_named
from medsd.slides.readers.vendor import on_white

# PIL has many more formats, each with a decoder of its own; bytes from anywhere reach these three alone.
_PLUGINS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"II*\0": TiffImagePlugin.TiffImageFile,
    b"MM\0*": TiffImagePlugin.TiffImageFile,
    b"II+\0": TiffImagePlugin.TiffImageFile,
    b"MM\0+": TiffImagePlugin.TiffImageFile,
}
MODES = {"1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr"}
"""Pillow's names of pixels of 8 bits a colour."""
_ALPHA = {"RGBA", "RGBa", "LA", "La", "PA"}
# Where PIL itself refuses (twice its MAX_IMAGE_PIXELS): 13,377 px a side. Decoding takes about 1.3 GB.
_MOST_PX = 178_956_970
_BAND_ROWS = 512


def is_picture(start: bytes) -> bool:
    """Whether a file that starts so is a PNG, JPEG or TIFF."""
    return start.startswith(tuple(_PLUGINS))


class Picture(LevelReader):
    """A picture: one level, kept whole in memory from the first read on.

    The orientation that a PNG or JPEG states is applied, as viewers do; transparency is on white; CMYK is converted
    without a colour profile. A file of several pages is refused, since none of them is the slide more than the others.
    Such files do not know their scale: dpi are made up by the program that wrote them.

    Args:
        path: a PNG, JPEG or TIFF of 8 bits a colour.

    Raises:
        SlideError: damaged, too large for memory, several pages, or pixels of more than 8 bits.
    """

    name = "pillow"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.properties: Mapping[str, str] = {}
        self._pixels: RGB | None = None
        self._damage: str | None = None
        # One lock a process: a fork while another thread decodes must not leave the child waiting.
        self._handles = Handles(threading.Lock)
        with damage_named(path), open(path, "rb") as handle:
            image = self._checked(handle)
            self._turn = _orientation(image)
        width, height = image.size
        self.sizes: tuple[Size, ...] = ((height, width) if self._turn >= 5 else (width, height),)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        return self._whole()[row : row + rows, column : column + columns].copy()

    def close(self) -> None:
        self._pixels = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def _checked(self, handle: BinaryIO) -> ImageFile.ImageFile:
        """The picture, of which no more than its header has been read."""
        start = handle.read(32)
        handle.seek(0)
        # Not Image.open: it would try formats by itself and warn of large pictures, whose size is checked here.
        plugin = next((plugin for magic, plugin in _PLUGINS.items() if start.startswith(magic)), None)
        if plugin is None:
            raise ValueError("not a PNG, JPEG or TIFF")
        image = plugin(handle)
        width, height = image.size
        if width < 1 or height < 1:
            raise ValueError(f"{width} x {height} px")
        if width * height > _MOST_PX:
            raise SlideError(
                f"{self.path}: {width} x {height} px are too many for a picture that is decoded as a whole; "
                "convert it to a tiled pyramidal TIFF"
            )
        if image.mode not in MODES or bits_a_colour(image, start) > 8:
            raise SlideError(f"{self.path}: not 8 bits a colour; save it as 8-bit RGB")
        # A JPEG shows its first picture in every viewer.
        if not isinstance(image, JpegImagePlugin.JpegImageFile) and getattr(image, "is_animated", False):
            raise SlideError(f"{self.path}: has several pages; save the one that is the slide as a file of its own")
        return image

    def _whole(self) -> RGB:
        with self._handles.here():
            if self._damage is not None:
                raise SlideError(self._damage)
            pixels = self._pixels
            if pixels is None:
                try:
                    with damage_named(self.path):
                        pixels = self._decode()
                except SlideError as error:
                    self._damage = str(error)
                    raise
                self._pixels = pixels
            return pixels

    def _decode(self) -> RGB:
        with open(self.path, "rb") as handle:
            image = self._checked(handle)
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                pixels = _decode_jpeg(self.path.read_bytes(), image.mode)
            elif ImageFile.LOAD_TRUNCATED_IMAGES:
                raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides damage: set it to False")
            else:
                pixels = _to_rgb(image)  # a PNG's own checksum is checked on the way
        pixels = _turned(pixels, self._turn)
        if pixels.shape[1::-1] != self.sizes[0]:
            raise ValueError("its size changed")
        return pixels


def bits_a_colour(image: Image.Image, start: bytes) -> int:
    """Bits a colour as stored in a file that starts so: PIL drops the lower half of 16-bit colours without a word."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        return start[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
    return 8


def _orientation(image: ImageFile.ImageFile) -> int:
    """How the picture is to be turned: EXIF orientation 1 to 8; 1 for TIFF, where the caller refuses others."""
    exif = image.info.get("exif")
    if exif is None or isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    tags, turn = Image.Exif(), 1
    with suppress(*DAMAGED):  # other programs' notes; the picture itself does not depend on them
        tags.load(exif)
        turn = tags.get(0x0112, 1)
    return turn if turn in range(1, 9) else 1


def _turned(pixels: RGB, orientation: int) -> RGB:
    """The picture upright (EXIF 2.3, tag 274)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_jpeg(data: bytes, mode: str) -> RGB:
    """Strict, which libjpeg under PIL is not: it fills what is damaged with grey."""
    if mode != "CMYK":
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    # Adobe stores ink upside down, and nobody else writes CMYK.
    inks: npt.NDArray[np.uint8] = 255 - simplejpeg.decode_jpeg(data, "CMYK", strict=True)
    return _to_rgb(Image.frombuffer("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes()))


def _to_rgb(image: Image.Image) -> RGB:
    """(height, width, 3) RGB on white, converted in bands so that memory holds the picture once beside PIL's."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    with warnings.catch_warnings():
        # Of its size, which is checked above.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()
        for top in range(0, height, _BAND_ROWS):
            band = image.crop((0, top, width, min(top + _BAND_ROWS, height)))
            seen_through = band.mode in _ALPHA or "transparency" in band.info
            pixels[top : top + _BAND_ROWS] = on_white(band) if seen_through else np.asarray(band.convert("RGB"))
    return pixels
