"""The file's own tiles against the pixels that were written, and against OpenSlide."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from medsd.errors import SlideError
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.tiff_layout import ome_scale
from medsd.slides.readers.vendor import VendorSlide
from medsd.slides.slide import open_slide
from tests.slides.readers.tiffs import forget_tiles, levels, picture, place_tile, tile_bytes, write

SPACING = "0.00025"  # mm, as Philips writes it


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
    reader = TiledTiff(path, *levels(path))
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
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        tiles = [*zip(file.pages[page].dataoffsets, file.pages[page].databytecounts, strict=True)]
    head = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    for number, (start, count) in enumerate(tiles):
        tile = data[start : start + 2] + head + data[start + 2 : start + count]
        place_tile(path, page, number, path.stat().st_size, len(tile))
        with open(path, "ab") as handle:
            handle.write(tile)


def test_the_tiffs_colour_space_counts_whatever_a_tile_says(tmp_path: Path) -> None:
    base = picture(512, 512)
    path = write(tmp_path / "slide.tif", [base, base[::2, ::2]], compression="jpeg")
    wanted = open_reader(path).read(1, 0, 0, 256, 256)
    adobe(path, 1, transform=0)
    start, count = tile_bytes(path, 3, page=1)
    assert b"Adobe" in path.read_bytes()[start : start + count]
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


def test_a_level_larger_than_level_0_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    kinds: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(picture(100, 100), subifds=1, metadata={"axes": "YXS"}, **kinds)
        writer.write(picture(300, 300), subfiletype=1, **kinds)
    with pytest.raises(SlideError, match=r"slide\.ome\.tif: a level is larger than level 0"):
        open_slide(path, mpp=0.5)


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


KINDS_OF_OME: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (64, 64)},
    "strips": {},
    "deep": {"tile": (64, 64), "dtype": np.uint16},
    "alpha": {"tile": (64, 64), "extrasamples": ["unassalpha"]},
    "planes": {"tile": (64, 64), "planarconfig": "separate"},
}


@pytest.mark.parametrize("kind", KINDS_OF_OME)
def test_the_scale_of_ome_xml_is_known_whoever_reads_the_pixels(tmp_path: Path, kind: str) -> None:
    path, options, pixels = tmp_path / "slide.ome.tif", {**KINDS_OF_OME[kind]}, picture()
    pixels = np.dstack([pixels, pixels[..., 0]]) if kind == "alpha" else pixels
    pixels = pixels.astype(options.pop("dtype", np.uint8))
    stored = np.moveaxis(pixels, -1, 0) if kind == "planes" else pixels
    scale = {f"PhysicalSize{axis}": 0.35 for axis in "XY"}
    axes = "SYX" if kind == "planes" else "YXS"
    tifffile.imwrite(path, stored, ome=True, photometric="rgb", metadata={"axes": axes, **scale}, **options)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source, slide.dimensions) == (0.35, "OME-XML", (371, 437))


def test_an_ome_tiff_that_states_no_size_has_that_of_its_tags(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    options: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "tile": (64, 64)}
    tifffile.imwrite(path, picture(), ome=True, photometric="rgb", metadata={"axes": "YXS"}, **options)
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("tifffile", 0.5, "TIFF resolution tags")


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
