"""The file's own tiles against the pixels that were written, and against OpenSlide."""

from __future__ import annotations

import gc
import os
import pickle
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from medsd.errors import SlideError
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.codecs import TileCodec
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.tiff_layout import levels_of_sizes, ome_scale
from medsd.slides.readers.vendor import VendorSlide
from medsd.slides.slide import open_slide

SPACING = "0.00025"  # mm, as Philips writes it


def picture(height: int = 437, width: int = 371, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: JPEG keeps them roughly, nothing is constant."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([120 + 90 * np.sin(rows / 17), 120 + 90 * np.cos(columns / 23), 80 + (rows + columns) / 9], -1)
    return (smooth + np.random.default_rng(seed).normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, levels: list[np.ndarray], tile: int = 64, **kinds: Any) -> Path:
    kinds = {"photometric": "rgb" if levels[0].ndim == 3 else "minisblack", "metadata": None, **kinds}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate(levels):
            writer.write(level, tile=(tile, tile), subfiletype=1 if number else 0, **kinds)
    return path


def forget_tiles(path: Path, page: int, numbers: list[int]) -> None:
    """Make tiles absent as scanners do: no offset, no bytes."""
    with tifffile.TiffFile(path) as file:
        tags = [file.pages[page].tags[name] for name in ("TileOffsets", "TileByteCounts")]
        places = [(tag.valueoffset, tag.dtype) for tag in tags]
    with open(path, "r+b") as handle:
        for start, dtype in places:
            size = {3: 2, 4: 4, 16: 8}[int(dtype)]
            for number in numbers:
                handle.seek(start + size * number)
                handle.write(bytes(size))


def tile_bytes(path: Path, number: int) -> tuple[int, int]:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        return page.dataoffsets[number], page.databytecounts[number]


LOSSLESS: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate": {"compression": "deflate"},
    "deflate-predictor": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "lzw-predictor": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"},
    "jpeg2000": {"compression": 34712, "compressionargs": {"level": 0}},
    "aperio-jpeg2000-rgb": {"compression": 33005, "compressionargs": {"level": 0}},
}


@pytest.mark.parametrize(
    ("kind", "colours"),
    [(kind, colours) for kind in LOSSLESS for colours in ("rgb", "grey") if "jpeg2000" not in kind or colours == "rgb"],
)
def test_lossless_tiles_are_what_was_written(tmp_path: Path, kind: str, colours: str) -> None:
    base = picture() if colours == "rgb" else picture()[..., 0]
    path = write(tmp_path / "slide.tif", [base, base[::2, ::2]], **LOSSLESS[kind])
    reader = TiledTiff(path, *_levels(path))
    for number, level in enumerate((base, base[::2, ::2])):
        wanted = level if level.ndim == 3 else np.repeat(level[..., None], 3, axis=2)
        height, width = level.shape[:2]
        assert reader.sizes[number] == (width, height)
        for column, row, columns, rows in [
            (0, 0, width, height),
            (64, 64, 64, 64),  # one tile, decoded in place
            (1, 62, 131, 70),
            (width - 3, height - 5, 3, 5),
        ]:
            got = reader.read(number, column, row, columns, rows)
            assert np.array_equal(got, wanted[row : row + rows, column : column + columns]), (number, column)


def _levels(path: Path) -> tuple[Any, dict[str, str]]:
    with tifffile.TiffFile(path) as file:
        sizes = [(page.imagewidth, page.imagelength) for page in file.pages]
        levels = levels_of_sizes(file, sizes, absent=True)
    assert levels is not None
    return levels, {}


JPEGS: dict[str, dict[str, Any]] = {
    "ycbcr-420": {"compressionargs": {"level": 80}, "subsampling": (2, 2)},
    "ycbcr-422": {"compressionargs": {"level": 80}, "subsampling": (2, 1)},
    "ycbcr-444": {"compressionargs": {"level": 80}, "subsampling": (1, 1)},
    "grey": {"compressionargs": {"level": 80}},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_tiles_are_openslides_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    base = picture()[..., 0] if kind == "grey" else picture()
    path = write(tmp_path / "slide.tif", [base], compression="jpeg", **JPEGS[kind])
    fast, oracle = open_reader(path), VendorSlide(path)
    assert isinstance(fast, TiledTiff)
    shown = fast.read(0, 0, 0, *fast.sizes[0])
    assert np.array_equal(shown, oracle.read(0, 0, 0, *oracle.sizes[0]))
    assert np.abs(shown.astype(int) - (base if base.ndim == 3 else base[..., None])).mean() < 8  # it is the picture


def philips(path: Path, tile: int = 64) -> Path:
    """As CAMELYON's slides are: levels padded to whole tiles, their scale in XML, tiles of glass left out."""
    base = np.zeros((512, 448, 3), np.uint8) + 255
    base[:437, :371] = picture()
    half, quarter = base[::2, ::2], np.full((128, 128, 3), 255, np.uint8)
    quarter[:128, :112] = base[::4, ::4]
    half = np.pad(half, ((0, 0), (0, 256 - half.shape[1]), (0, 0)), constant_values=255)

    def spacing(factor: int) -> str:
        return f'"{float(SPACING) * factor}" "{float(SPACING) * factor}"'

    representations = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" '
        f'Element="0x0030" PMSVR="IDoubleArray">{spacing(2**number)}</Attribute><Attribute '
        f'Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER" Group="0x301D" Element="0x2001" PMSVR="IUInt16">{number}'
        f"</Attribute></DataObject>"
        for number in range(3)
    )
    description = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute '
        'Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject '
        'ObjectType="DPScannedImage"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" '
        f'PMSVR="IDoubleArray">{spacing(1)}</Attribute><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" '
        'Element="0x1004" PMSVR="IString">WSI</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" '
        f'Group="0x301D" Element="0x2000" PMSVR="IDataObjectArray"><Array>{representations}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate((base, half, quarter)):
            padding = [(0, -side % tile) for side in level.shape[:2]]
            level = np.pad(level, (*padding, (0, 0)), constant_values=255)
            writer.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                subfiletype=1 if number else 0,
                software="Philips DP v1.0",
                description=description if number == 0 else None,
                metadata=None,
            )
    return path


def test_a_camelyon_slide_with_padding_and_absent_tiles(tmp_path: Path) -> None:
    path = philips(tmp_path / "tumor_001.tif")
    forget_tiles(path, 0, [6, 13])
    slide, oracle = open_slide(path), VendorSlide(path)
    assert oracle.properties["openslide.vendor"] == "philips"
    assert (slide.reader, slide.mpp, slide.mpp_source) == ("tifffile", 0.25, "vendor property")
    assert [(level.width, level.height) for level in slide.levels] == [(448, 512), (224, 256), (112, 128)]
    for number, level in enumerate(slide.levels):
        got = slide.read(0, 0, level.width, level.height, slide.mpp * 2**number)
        assert np.array_equal(got, oracle.read(number, 0, 0, level.width, level.height)), number
    assert (slide.read(6 * 64, 0, 64, 64) == 255).all()  # absent is glass, and seen
    assert slide.read_seen(6 * 64, 0, 64, 64)[1] is None


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_tile_that_is_absent_where_another_level_shows_something_is_lost(tmp_path: Path, number: int) -> None:
    """As where a block of the disk that holds the table of byte counts was zeroed."""
    path = philips(tmp_path / "tumor_001.tif")
    forget_tiles(path, number, [1])  # tissue all over
    slide, mpp = open_slide(path), 0.25 * 2**number
    place = 64 * 2**number, 0, 64, 64
    pixels, seen = slide.read_seen(*place, mpp)
    assert seen is not None and not seen[:, :48].any() and (pixels == 255).all()  # level 2 ends in the tile
    with pytest.raises(
        SlideError, match=rf"level {number}, near its pixel \(64, 0\) \(a tile is not in the file, though"
    ):
        slide.read(*place, mpp)
    assert slide.read_seen(0, 0, 64, 64, mpp)[1] is None


def test_low_levels_of_one_padded_size_are_not_confused(tmp_path: Path) -> None:
    """As in CAMELYON: the two lowest levels are both padded to one tile, and only the file's order tells them apart."""
    path = philips(tmp_path / "low.tif", tile=256)
    fast, oracle = open_reader(path), VendorSlide(path)
    assert fast.name == "tifffile" and fast.sizes == oracle.sizes == ((512, 512), (256, 256), (128, 128))
    for number, size in enumerate(fast.sizes):
        assert np.array_equal(fast.read(number, 0, 0, *size), oracle.read(number, 0, 0, *size)), number


def test_a_page_that_is_not_marked_as_reduced_is_no_level(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    base, other = picture(512, 512), picture(256, 256, seed=9)[::-1]
    kinds: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(base, **kinds)
        writer.write(other, subfiletype=0, **kinds)
        writer.write(base[::2, ::2], subfiletype=1, **kinds)
    reader = open_reader(path)
    assert reader.name == "tifffile" and reader.sizes == ((512, 512), (256, 256))
    assert np.array_equal(reader.read(1, 0, 0, 256, 256), base[::2, ::2])


def adobe(path: Path, page: int, transform: int) -> None:
    """Put an Adobe head into every JPEG tile of a page, moved to the end of the file."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        tags = [file.pages[page].tags[name] for name in ("TileOffsets", "TileByteCounts")]
        places = [(tag.valueoffset, {3: 2, 4: 4, 16: 8}[int(tag.dtype)], tag.value) for tag in tags]
    head = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    for number, (start, count) in enumerate(zip(places[0][2], places[1][2], strict=True)):
        tile = bytes(data[start : start + count])
        tile = tile[:2] + head + tile[2:]
        for (where, size, _), value in zip(places, (len(data), len(tile)), strict=True):
            data[where + size * number : where + size * (number + 1)] = value.to_bytes(size, "little")
        data += tile
    path.write_bytes(data)


def test_the_tiffs_colour_space_counts_whatever_a_tile_says(tmp_path: Path) -> None:
    base = picture(512, 512)
    path = write(tmp_path / "slide.tif", [base, base[::2, ::2]], compression="jpeg")
    wanted = open_reader(path).read(1, 0, 0, 256, 256)
    adobe(path, 1, transform=0)
    reader = open_reader(path)
    assert np.array_equal(reader.read(1, 0, 0, 256, 256), wanted)


def test_ome_tiff_that_calls_its_jfif_tiles_rgb(tmp_path: Path) -> None:
    """Writers of OME-TIFF leave the tag at RGB over YCbCr tiles; tifffile and Bio-Formats believe the tiles."""
    path = tmp_path / "slide.ome.tif"
    base = picture(256, 256)
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as writer:
        writer.write(base, tile=(128, 128), photometric="rgb", compression="jpeg", metadata={"axes": "YXS"})
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        data[file.pages[0].tags["PhotometricInterpretation"].valueoffset] = 2
        jfif = file.pages[0].is_jfif
    path.write_bytes(data)
    shown = open_reader(path).read(0, 0, 0, 256, 256).astype(int)
    assert jfif and np.abs(shown - base).mean() < 8


def test_an_ome_tiff_that_begins_with_a_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    kinds: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(picture(70, 90), metadata={"axes": "YXS"}, **kinds)
        writer.write(picture(300, 400), metadata={"axes": "YXS"}, **kinds)
    with pytest.raises(SlideError, match="first image is not its largest"):
        open_slide(path, mpp=0.5)


def test_a_file_that_went_away_is_not_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture()], compression="deflate")
    slide = pickle.loads(pickle.dumps(open_slide(path, mpp=0.5)))
    path.rename(tmp_path / "moved.tif")
    with pytest.raises(SlideError, match="cannot be opened any more"):
        slide.read_seen(0, 0, 100, 100)


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


def test_a_level_larger_than_level_0_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    kinds: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(picture(100, 100), subifds=1, metadata={"axes": "YXS"}, **kinds)
        writer.write(picture(300, 300), subfiletype=1, **kinds)
    with pytest.raises(SlideError, match=r"slide\.ome\.tif: a level is larger than level 0"):
        open_slide(path, mpp=0.5)


def test_a_shared_cache_forgets_a_file_that_was_rewritten(tmp_path: Path) -> None:
    cache = TileCache()
    path = tmp_path / "slide.tif"
    for seed in (1, 2):
        base = picture(seed=seed)
        write(path, [base], compression="deflate")
        os.utime(path, ns=(seed, seed))
        with open_slide(path, mpp=0.5, cache=cache) as slide:
            assert np.array_equal(slide.read(3, 3, 30, 30), base[3:33, 3:33])


def test_absent_tiles_of_aperio_are_left_to_openslide(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.svs", [picture()], description="Aperio Image|MPP = 0.5", compression="jpeg")
    assert open_reader(path).name == "tifffile"
    forget_tiles(path, 0, [3])
    assert open_reader(path).name == "openslide"


def test_levels_in_subifds_of_ome_tiff(tmp_path: Path) -> None:
    base = picture()
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as writer:
        kind = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
        scale = {
            "axes": "YXS",
            "PhysicalSizeX": 350,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 350,
            "PhysicalSizeYUnit": "nm",
        }
        writer.write(base, subifds=1, metadata=scale, **kind)
        writer.write(base[::2, ::2], subfiletype=1, **kind)
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp) == ("tifffile", pytest.approx(0.35))
        assert [(level.width, level.height) for level in slide.levels] == [(371, 437), (186, 219)]
        assert np.array_equal(slide.read(0, 0, 186, 219, 0.7), base[::2, ::2])
        assert np.array_equal(slide.read(100, 50, 90, 80), base[50:130, 100:190])


def test_the_real_ome_pyramid_is_the_real_tiff_pyramid(shared_data: Path) -> None:
    ome, plain = (
        open_reader(shared_data / "wsi" / "derived" / f"cmu1-region-pyramid{end}") for end in (".ome.tif", "-jpeg.tif")
    )
    assert isinstance(ome, TiledTiff) and ome.sizes == plain.sizes and len(ome.sizes) == 4
    for number, size in enumerate(ome.sizes):
        assert np.array_equal(ome.read(number, 0, 0, *size), plain.read(number, 0, 0, *size)), number


def _pixels(x: str, y: str) -> str:
    return f'<OME xmlns="http://x"><Image><Pixels {x} {y}/></Image></OME>'


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        (_pixels('PhysicalSizeX="0.5"', 'PhysicalSizeY="0.5"'), 0.5),
        (_pixels('PhysicalSizeX="250" PhysicalSizeXUnit="nm"', 'PhysicalSizeY="250" PhysicalSizeYUnit="nm"'), 0.25),
        (_pixels('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"', 'PhysicalSizeY="0.5"'), None),
        (_pixels('PhysicalSizeX="half"', 'PhysicalSizeY="0.5"'), None),
        (_pixels('PhysicalSizeX="0.5"', ""), None),
        ("<OME", None),
        ('<!DOCTYPE a [<!ENTITY b "c">]><OME>&b;</OME>', None),
    ],
)
def test_scale_of_ome_xml(description: str, mpp: float | None) -> None:
    scale = ome_scale(description)
    assert [float(value) for value in scale.values()] == ([] if mpp is None else [pytest.approx(mpp)] * 2)


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
    reader = TiledTiff(path, *_levels(path))
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


def test_flipped_bits_are_refused_where_openslide_refuses_them(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture(192, 192)], tile=192, compression="jpeg")
    data, (start, count) = path.read_bytes(), tile_bytes(path, 0)
    good = TiledTiff(path, *_levels(path))
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


def _or_none(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        return read()
    except SlideError:
        return None


def test_a_tile_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [np.zeros((64, 64, 3), np.uint8)], compression="deflate")
    start, _ = tile_bytes(path, 0)
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        where, size = tag.valueoffset, {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
    data = bytearray(path.read_bytes()[:start] + bomb)
    if size >= 4:
        data[where : where + size] = len(bomb).to_bytes(size, "little")
    path.write_bytes(data)
    reader = TiledTiff(path, *_levels(path))
    with pytest.raises(SlideError, match="cannot be decoded"):
        reader.read(0, 0, 0, 64, 64)


def test_a_tiff_that_contradicts_itself_is_left_to_openslide(tmp_path: Path) -> None:
    """The tag says RGB, the tiles are YCbCr and say so: whoever decodes must follow the tag, as OpenSlide does."""
    path = write(tmp_path / "slide.tif", [picture()], compression="jpeg")
    with tifffile.TiffFile(path) as file:
        where = file.pages[0].tags["PhotometricInterpretation"].valueoffset
    with open(path, "r+b") as handle:
        handle.seek(where)
        handle.write((2).to_bytes(2, "little"))
    shown = open_reader(path).read(0, 0, 0, 371, 437)
    assert np.array_equal(shown, VendorSlide(path).read(0, 0, 0, 371, 437))


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


def test_threads_share_a_small_cache(tmp_path: Path) -> None:
    base = picture(900, 800)
    path = write(tmp_path / "slide.tif", [base], compression="deflate")
    cache = TileCache(5 * 64 * 64 * 3)
    reader = TiledTiff(path, *_levels(path), cache)
    generator = np.random.default_rng(0)
    places = [(int(x), int(y)) for x, y in generator.integers(0, 700, (300, 2))]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda place: reader.read(0, *place, 97, 83), places))
    assert all(np.array_equal(part, base[y : y + 83, x : x + 97]) for part, (x, y) in zip(got, places, strict=True))
    assert 0 < cache.used_bytes <= cache.max_bytes


def test_a_neighbours_read_finds_the_tile_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "slide.tif", [picture(512, 512)], compression="deflate")
    reader = TiledTiff(path, *_levels(path))
    decoded = []
    inner = TileCodec.decode
    monkeypatch.setattr(TileCodec, "decode", lambda self, *tile: decoded.append(1) or inner(self, *tile))
    for y in range(0, 480, 48):
        for x in range(0, 480, 48):
            reader.read(0, x, y, 48, 48)
    assert len(decoded) == 64  # each of the 8 x 8 tiles once, though most lie under four reads


def test_cache_drops_the_least_recently_used() -> None:
    cache = TileCache(3 * 12)
    tiles = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    for number in range(3):
        cache.put(("a", 0, number), tiles[number])
    assert cache.get(("a", 0, 0)) is tiles[0]
    cache.put(("a", 0, 3), tiles[3])
    assert cache.get(("a", 0, 1)) is None and cache.get(("a", 0, 0)) is tiles[0]
    cache.put(("a", 0, 0), tiles[1])  # replaced, not counted twice
    assert cache.used_bytes == 36
    cache.put(("a", 0, 9), np.zeros((5, 5, 3), np.uint8))
    assert cache.get(("a", 0, 9)) is None and cache.used_bytes == 36
    assert pickle.loads(pickle.dumps(cache)).max_bytes == 36


def test_descriptors_are_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", [picture()], compression="deflate")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with open_slide(path, mpp=0.5) as slide:
            slide.read(0, 0, 100, 100)
            copy = pickle.loads(pickle.dumps(slide))
            copy.read(0, 0, 10, 10)
        del copy, slide
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
