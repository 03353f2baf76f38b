"""A damaged tile costs itself: it is said to be lost, where OpenSlide refuses it and where it does not."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from medsd.errors import SlideError
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.codecs import TileCodec
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.vendor import VendorSlide
from medsd.slides.slide import open_slide
from tests.slides.readers.tiffs import levels, picture, place_tile, tile_bytes, write


def test_a_file_that_went_away_is_not_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture()], compression="deflate")
    slide = pickle.loads(pickle.dumps(open_slide(path, mpp=0.5)))
    path.rename(tmp_path / "moved.tif")
    with pytest.raises(SlideError, match="cannot be opened any more"):
        slide.read_seen(0, 0, 100, 100)


def _cut(data: bytes, start: int, count: int) -> bytes:
    return data[: start + count // 2]


def _zeros(data: bytes, start: int, count: int) -> bytes:
    return data[: start + count // 2] + bytes(count - count // 2) + data[start + count :]


def _noise(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + np.random.default_rng(0).bytes(count) + data[start + count :]


@pytest.mark.parametrize("damage", [_cut, _zeros, _noise])
@pytest.mark.parametrize("compression", ["jpeg", "deflate", "lzw", "zstd"])
def test_a_damaged_tile_is_not_seen_and_nothing_else(
    tmp_path: Path, compression: str, damage: Callable[[bytes, int, int], bytes]
) -> None:
    path = write(tmp_path / "slide.tif", [picture()], compression=compression)
    whole = open_slide(path, mpp=0.5).read(0, 0, 371, 437)
    number = 41 if damage is _cut else 15  # the last tile that was written, so that a cut costs no other
    data = path.read_bytes()
    path.write_bytes(damage(data, *tile_bytes(path, number)))
    reader = TiledTiff(path, *levels(path))
    row, column = divmod(number, 6)
    with pytest.raises(SlideError, match=r"slide\.tif: cannot be decoded at level 0, near its pixel \(") as caught:
        reader.read(0, 0, 0, 371, 437)
    assert "\n" not in str(caught.value)
    pixels, seen = reader.read_seen(0, 0, 0, 371, 437)
    assert seen is not None
    wanted = np.ones((437, 371), bool)
    wanted[row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64] = False
    assert np.array_equal(seen, wanted)
    assert (pixels[~seen] == 255).all() and np.array_equal(pixels[seen], whole[seen])


def test_what_is_not_seen_survives_resampling_and_borders(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture()], compression="deflate")
    start, count = tile_bytes(path, 0)
    path.write_bytes(_zeros(path.read_bytes(), start, count))
    slide = open_slide(path, mpp=0.5)
    pixels, seen = slide.read_seen(-30, -20, 100, 90, mpp=0.6)
    assert seen is not None and pixels.shape == (90, 100, 3)
    # Output pixels whose source reaches into the tile (0 to 64) and none else.
    centres = (-30 + (np.arange(100) + 0.5) * 1.2), (-20 + (np.arange(90) + 0.5) * 1.2)
    surely = [(centre > 1.7) & (centre < 62.3) for centre in centres]
    never = [(centre < -1.7) | (centre > 65.7) for centre in centres]
    assert not seen[np.ix_(surely[1], surely[0])].any()
    assert seen[never[1]].all() and seen[:, never[0]].all()
    with pytest.raises(SlideError):
        slide.read(-30, -20, 100, 90, mpp=0.6)


@pytest.mark.parametrize(
    ("compression", "encode"),
    [
        (34712, imagecodecs.jpeg2k_encode),
        (50001, imagecodecs.webp_encode),
        (50002, imagecodecs.jpegxl_encode),
        (52546, imagecodecs.jpegxl_encode),
    ],
)
def test_a_tile_larger_than_it_may_be_or_cut_is_refused(compression: int, encode: Callable[..., bytes]) -> None:
    codec = TileCodec(64, 64, compression, 3, differences=False, jpeg_head=b"")
    small, large = (encode(picture(side, side)) for side in (64, 256))
    assert codec.decode(small).shape == (64, 64, 3)
    for data in (large, small[:20], small[: len(small) // 2], b""):
        with pytest.raises(DAMAGED):
            codec.decode(data)


def _or_none(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        return read()
    except SlideError:
        return None


def test_flipped_bits_are_refused_where_openslide_refuses_them(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture(192, 192)], tile=192, compression="jpeg")
    data, (start, count) = path.read_bytes(), tile_bytes(path, 0)
    good = TiledTiff(path, *levels(path))
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(120):
        hurt = bytearray(data)
        hurt[start + int(generator.integers(2, count))] ^= 1 << int(generator.integers(8))
        copy = tmp_path / "hurt.tif"
        copy.write_bytes(hurt)
        reader = TiledTiff(copy, good.levels, {})
        ours = _or_none(lambda reader=reader: reader.read(0, 0, 0, 192, 192))
        theirs = _or_none(lambda copy=copy: VendorSlide(copy).read(0, 0, 0, 192, 192))
        refused += ours is None
        # A flip that still decodes cannot be told from a picture; then both show the same.
        assert theirs is None or ours is None or np.array_equal(ours, theirs)
        assert theirs is not None or ours is None
    assert refused > 20


def test_a_tile_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [np.zeros((64, 64, 3), np.uint8)], compression="deflate")
    start, _ = tile_bytes(path, 0)
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    path.write_bytes(path.read_bytes()[:start] + bomb)
    place_tile(path, 0, 0, start, len(bomb))
    reader = TiledTiff(path, *levels(path))
    with pytest.raises(SlideError, match="cannot be decoded"):
        reader.read(0, 0, 0, 64, 64)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_damaged_tile_leaves_no_slide_to_openslide(tmp_path: Path, levels: int) -> None:
    """OpenSlide shows a deflated tile before it finds that its sum is wrong; here it is said to be lost."""
    base = picture(512, 512)
    path = write(tmp_path / "slide.tif", [base, base[::8, ::8]][:levels], compression="deflate")
    with tifffile.TiffFile(path) as file:
        page = file.pages[levels - 1].aspage()
        fullest = int(np.argmax(page.databytecounts))
        start, count = page.dataoffsets[fullest], page.databytecounts[fullest]
    data = bytearray(path.read_bytes())
    data[start + count - 1] ^= 1  # of the sum
    path.write_bytes(data)
    reader = open_reader(path)
    assert reader.name == "tifffile"
    pixels, seen = reader.read_seen(levels - 1, 0, 0, *reader.sizes[levels - 1])
    assert seen is not None and (~seen).sum() == 64 * 64
    assert np.array_equal(pixels[seen], (base, base[::8, ::8])[levels - 1][seen])
