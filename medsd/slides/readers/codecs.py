"""The tiles of TIFF files, from bytes to pixels.

Nothing here trusts the bytes: no tile becomes larger than its header allows, and damage is an error, never grey pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from medsd.slides.readers.base import RGB

_COMPRESSION, _PHOTOMETRIC = tifffile.COMPRESSION, tifffile.PHOTOMETRIC
_JPEG2000 = (_COMPRESSION.APERIO_JP2000_RGB, _COMPRESSION.JPEG2000)
# Codecs of whole pictures that refuse one of another size than the array to decode into.
_PICTURES: dict[int, Callable[..., npt.NDArray[np.uint8]]] = {
    _COMPRESSION.WEBP: imagecodecs.webp_decode,
    _COMPRESSION.JPEGXL: imagecodecs.jpegxl_decode,
    _COMPRESSION.JPEGXL_DNG: imagecodecs.jpegxl_decode,
}
_UNPACKERS: dict[int, Callable[..., bytes | bytearray]] = {
    _COMPRESSION.LZW: imagecodecs.lzw_decode,
    _COMPRESSION.DEFLATE: imagecodecs.zlib_decode,
    _COMPRESSION.ADOBE_DEFLATE: imagecodecs.zlib_decode,
    _COMPRESSION.ZSTD: imagecodecs.zstd_decode,
    _COMPRESSION.PACKBITS: imagecodecs.packbits_decode,
}
_PREDICTORS = (tifffile.PREDICTOR.NONE, tifffile.PREDICTOR.HORIZONTAL)
_SOI, _JPEG2000_HEAD = b"\xff\xd8", b"\xff\x4f\xff\x51"

# A tile is decoded as a whole; the largest seen in slides is 4,096 px a side.
_LARGEST_TILE_PX = 2**26


@dataclass(frozen=True)
class TileCodec:
    """How the tiles of one level are coded.

    Attributes:
        width, height: size of a tile in pixels.
        compression: TIFF compression.
        samples: colours of a pixel: 1 (grey) or 3 (RGB).
        differences: whether pixels are stored as differences to their left neighbour.
        jpeg_head: what to put before a JPEG tile in place of its first two bytes: tables that tiles share, and the
            colour space that the TIFF states (tiles themselves often do not).
    """

    width: int
    height: int
    compression: int
    samples: int
    differences: bool
    jpeg_head: bytes

    def decode(self, data: bytes, out: RGB | None = None) -> RGB:
        """The pixels (height, width, 3) of a tile.

        Args:
            data: the tile as it lies in the file.
            out: contiguous array of the result's shape to decode into, where the codec can.

        Raises:
            one of `damage.DAMAGED`: the bytes are not a whole tile.
        """
        if self.compression == _COMPRESSION.JPEG:
            return self._decode_jpeg(data, out)
        if self.compression in _JPEG2000:
            self._check_jpeg2000(data)
            return self._checked(np.asarray(imagecodecs.jpeg2k_decode(data)))
        if self.compression in _PICTURES:
            shape = (self.height, self.width, 3) if self.samples == 3 else (self.height, self.width)
            return self._checked(_PICTURES[self.compression](data, out=np.empty(shape, np.uint8)))
        size = self.width * self.height * self.samples
        unpack = _UNPACKERS.get(self.compression)
        raw = data if unpack is None else unpack(data, out=size)
        if len(raw) != size:
            raise ValueError(f"a tile has {len(raw)} bytes instead of {size}")
        pixels = np.frombuffer(raw, np.uint8).reshape(self.height, self.width, self.samples)
        if self.differences:
            pixels = imagecodecs.delta_decode(pixels, axis=1)
        return self._checked(pixels)

    def _decode_jpeg(self, data: bytes, out: RGB | None) -> RGB:
        if data[:2] != _SOI:
            raise ValueError("a tile is not JPEG")
        start = _after_applications(data, 2)
        if out is None or self.samples == 1:
            out = np.empty((self.height, self.width, self.samples), np.uint8)
        # A picture larger than the buffer is refused. Strict, for libjpeg fills what is missing with grey and goes on.
        colour = "GRAY" if self.samples == 1 else "RGB"
        return self._checked(simplejpeg.decode_jpeg(self.jpeg_head + data[start:], colour, buffer=out, strict=True))

    def _check_jpeg2000(self, data: bytes) -> None:
        """Raise ValueError where a tile says that it is larger, before memory is taken for it."""
        start = data.find(_JPEG2000_HEAD)
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        if start < 0 or (right - left, bottom - top) != (self.width, self.height):
            raise ValueError(f"a tile holds {right - left} x {bottom - top} px instead of {self.width} x {self.height}")

    def _checked(self, pixels: npt.NDArray[np.uint8]) -> RGB:
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.dtype != np.uint8 or pixels.shape != (self.height, self.width, self.samples):
            raise ValueError(f"a tile holds {pixels.shape} {pixels.dtype} instead of 8-bit pixels of its size")
        return np.repeat(pixels, 3, axis=2) if self.samples == 1 else pixels


def _after_applications(data: bytes, start: int) -> int:
    """Where the JPEG segments behind APP0 to APP15 begin.

    JFIF and Adobe heads tell decoders a colour space; the TIFF's word counts, and the last head would win.
    """
    while len(data) > start + 3 and data[start] == 0xFF and 0xE0 <= data[start + 1] <= 0xEF:
        start += 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
    return start


def codec_of(page: tifffile.TiffPage, believe_jfif: bool = False) -> TileCodec | None:
    """The codec of a page's tiles; None where they are not plain 8-bit grey or RGB of a known compression.

    Args:
        page: a page of a TIFF.
        believe_jfif: whether JFIF tiles are YCbCr where the TIFF says RGB: writers of OME-TIFF leave it wrong.
    """
    compression, colour = page.compression, page.photometric
    if not page.is_tiled or what_is_unusual(page) or not 0 < page.tilewidth * page.tilelength <= _LARGEST_TILE_PX:
        return None
    # An Adobe marker tells decoders the colour space: 0 as it is, 1 YCbCr.
    jfif = believe_jfif and compression == _COMPRESSION.JPEG and colour == _PHOTOMETRIC.RGB and page.is_jfif
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([colour == _PHOTOMETRIC.YCBCR or jfif])
    tables = (page.jpegtables or b"")[:-2]
    return TileCodec(
        width=page.tilewidth,
        height=page.tilelength,
        compression=int(compression),
        samples=page.samplesperpixel,
        differences=page.predictor == tifffile.PREDICTOR.HORIZONTAL,
        jpeg_head=_SOI + adobe + tables[_after_applications(tables, 2) :],
    )


def what_is_unusual(page: tifffile.TiffPage) -> str:
    """Why a page's pixels cannot be decoded here, in words; empty where they can."""
    compression, colour = page.compression, page.photometric
    rgb = colour == _PHOTOMETRIC.RGB or (colour == _PHOTOMETRIC.YCBCR and compression == _COMPRESSION.JPEG)
    if compression not in (_COMPRESSION.NONE, _COMPRESSION.JPEG, *_JPEG2000, *_PICTURES, *_UNPACKERS):
        return f"compression {getattr(compression, 'name', compression)}"
    if page.dtype != np.uint8 or page.bitspersample != 8:
        return f"{page.bitspersample} bits a colour"
    if (page.samplesperpixel, rgb, colour == _PHOTOMETRIC.MINISBLACK) not in ((3, True, False), (1, False, True)):
        return f"{page.samplesperpixel} channels of {getattr(colour, 'name', colour)}"
    if page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
        return "colours in planes"
    coded = page.fillorder == tifffile.FILLORDER.MSB2LSB and page.predictor in _PREDICTORS
    return "" if coded else f"predictor {page.predictor} or reversed bits"
