"""JP2 and OME-TIFF through tiatoolbox: their scales, and what is refused. Importing tiatoolbox takes seconds."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import glymur
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from medsd.errors import MissingMppError, SlideError
from medsd.heatmap.overlay import shown_explanation
from medsd.heatmap.overlay_tiff import write_overlay_tiff
from medsd.heatmap.tiff import write_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.tiatoolbox_slide import TiatoolboxSlide
from medsd.slides.readers.vendor import VendorSlide
from medsd.slides.slide import open_slide


@pytest.fixture(scope="module")
def pixels(coding: Any) -> np.ndarray:
    return coding.coded_pixels(300, 201)


def test_another_decoder_sees_the_same_jp2(tmp_path: Path, formats: Any, pixels: np.ndarray) -> None:
    path = formats.jp2(tmp_path / "lossy.jp2", pixels, irreversible=True, cratios=[8])
    expected = imagecodecs.jpeg2k_decode(path.read_bytes())
    assert not np.array_equal(expected, pixels)
    assert np.array_equal(open_reader(path).read(0, 0, 0, 300, 201), expected)


@pytest.mark.parametrize("tile", [None, (64, 64), (100, 128)])
@pytest.mark.parametrize("irreversible", [False, True])
def test_parts_of_every_level_are_parts_of_the_whole(
    tmp_path: Path,
    formats: Any,
    pixels: np.ndarray,
    recwarn: pytest.WarningsRecorder,
    tile: tuple[int, int] | None,
    irreversible: bool,
) -> None:
    path = formats.jp2(tmp_path / "a.jp2", pixels, tilesize=tile, irreversible=irreversible, numres=4)
    reader, generator = open_reader(path), np.random.default_rng(0)
    assert reader.sizes == ((300, 201), (150, 101), (75, 51), (38, 26))
    for level, (width, height) in enumerate(reader.sizes):
        whole = reader.read(level, 0, 0, width, height)
        for _ in range(9):
            left, right = sorted(generator.choice(width + 1, 2, replace=False).tolist())
            top, bottom = sorted(generator.choice(height + 1, 2, replace=False).tolist())
            assert np.array_equal(
                reader.read(level, left, top, right - left, bottom - top), whole[top:bottom, left:right]
            )
    assert not [str(warning.message) for warning in recwarn if "OpenJPEG" in str(warning.message)]


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_levels_lie_less_than_half_a_pixel_off(tmp_path: Path, formats: Any, halvings: int) -> None:
    rising = np.tile(20 + np.arange(640) // 3, (320, 1)).astype(np.uint8)
    picture = np.stack([rising, 255 - rising, rising], -1)
    path = formats.jp2(tmp_path / "a.jp2", picture, irreversible=True, numres=4)
    ratio = 2**halvings
    with open_slide(path, mpp=0.5) as slide:
        got = slide.read(80, 80, 30, 20, mpp=0.5 * ratio).mean(axis=0)
    centres = 80 + (np.arange(30) + 0.5) * ratio
    # Rounding changes both colours alike, a shift does not.
    shown = ((got[:, 0] - got[:, 1] + 255) / 2 - 20) * 3 + 1.5
    assert np.mean(centres - shown) == pytest.approx((ratio - 1) / 2, abs=0.3)  # level-0 px


def test_grey_jp2(tmp_path: Path, formats: Any, pixels: np.ndarray) -> None:
    path = formats.jp2(tmp_path / "grey.jp2", pixels[..., 0])
    assert np.array_equal(open_reader(path).read(0, 0, 0, 300, 201), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        ({"capture_resolution": (2e6, 2e6)}, 0.5, "JPEG 2000 capture resolution"),
        ({"description": "Aperio Image | AppMag = 40 | MPP = 0.2525"}, 0.2525, "vendor property"),
        ({"description": "Omnyx | MPP = 0.2750", "capture_resolution": (2e6, 2e6)}, 0.275, "vendor property"),
        ({"description": "Omnyx | MPP = 0", "capture_resolution": (2e6, 2e6)}, 0.5, "JPEG 2000 capture resolution"),
    ],
)
def test_the_scale_of_jp2(
    tmp_path: Path, formats: Any, pixels: np.ndarray, options: dict[str, Any], mpp: float, source: str
) -> None:
    with open_slide(formats.jp2(tmp_path / "a.jp2", pixels, **options)) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp), source)


@pytest.mark.parametrize(
    "options", [{}, {"description": "Aperio | AppMag = 40"}, {"capture_resolution": (2834.0, 2834.0)}]
)
def test_the_scale_is_not_guessed_from_the_magnification(
    tmp_path: Path, formats: Any, pixels: np.ndarray, options: dict[str, Any]
) -> None:
    path = formats.jp2(tmp_path / "a.jp2", pixels, **options)
    with pytest.raises(MissingMppError, match=r"a\.jp2: scale unknown"):
        open_slide(path)


@pytest.mark.parametrize("keep", [0.0, 0.002, 0.02, 0.5, 0.99])
def test_a_truncated_jp2(tmp_path: Path, formats: Any, pixels: np.ndarray, keep: float) -> None:
    path = formats.jp2(tmp_path / "cut.jp2", pixels)
    data = path.read_bytes()
    path.write_bytes(data[: max(12, int(len(data) * keep))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SlideError, match=r"cut\.jp2") as caught:
            open_reader(path).read(0, 0, 0, 300, 201)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(12))
def test_changed_bytes_of_a_jp2_are_pixels_or_one_line(
    tmp_path: Path, formats: Any, pixels: np.ndarray, seed: int
) -> None:
    path = formats.jp2(tmp_path / "hurt.jp2", pixels, description="Aperio | MPP = 0.5", capture_resolution=(2e6, 2e6))
    data, generator = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for spot in generator.integers(12, 400, 6):  # boxes and the main header
        data[spot] = int(generator.integers(256))
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_slide(path, mpp=0.5) as slide:
                width, height = slide.dimensions
                assert slide.read(0, 0, min(width, 300), min(height, 201)).shape[2] == 3
        except SlideError as error:
            assert "hurt.jp2" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("picture", "options", "words"),
    [
        (np.zeros((40, 50, 3), np.uint16), {}, "16 bits a colour"),
        (np.zeros((40, 50, 2), np.uint8), {}, "2 channels"),
        (np.zeros((40, 50, 4), np.uint8), {}, "4 channels"),
        (np.zeros((40, 50), np.uint8), {"subsam": (2, 2)}, "larger picture"),
    ],
)
def test_jp2_that_is_no_rgb(
    tmp_path: Path, formats: Any, picture: np.ndarray, options: dict[str, Any], words: str
) -> None:
    path = formats.jp2(tmp_path / "other.jp2", picture, tilesize=None, **options)
    with pytest.raises(SlideError, match=rf"other\.jp2: not one picture of 8-bit RGB or grey.*{words}.*export it"):
        open_reader(path)


def test_another_colour_space_is_refused(tmp_path: Path, formats: Any, pixels: np.ndarray) -> None:
    path = formats.jp2(tmp_path / "ycc.jp2", pixels)
    data = path.read_bytes()
    at = data.index(b"colr") + 7
    assert int.from_bytes(data[at : at + 4], "big") == 16
    path.write_bytes(data[:at] + (18).to_bytes(4, "big") + data[at + 4 :])
    with pytest.raises(SlideError, match=r"ycc\.jp2.*colour space 18"):
        open_reader(path)


def test_without_openjpeg_it_says_what_to_install(
    tmp_path: Path, formats: Any, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.jp2(tmp_path / "a.jp2", pixels)
    monkeypatch.setattr(glymur.version, "openjpeg_version", "0.0.0")
    with pytest.raises(SlideError, match=r"a\.jp2: JPEG 2000 needs the OpenJPEG library; install it .*libopenjp2-7"):
        open_reader(path)


def test_without_tiatoolbox_it_says_what_to_install(
    tmp_path: Path, formats: Any, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.jp2(tmp_path / "a.jp2", pixels)
    monkeypatch.setitem(sys.modules, "tiatoolbox.wsicore.wsireader", None)
    with pytest.raises(SlideError, match=r"a\.jp2: only tiatoolbox reads it.*install tiatoolbox"):
        open_reader(path)


def test_logging_stays_as_it_was(tmp_path: Path, formats: Any, pixels: np.ndarray) -> None:
    handlers = logging.getLogger().handlers[:]
    open_reader(formats.jp2(tmp_path / "a.jp2", pixels)).read(0, 0, 0, 9, 9)
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    "options", [{}, {"compression": "lzma"}, {"compression": None, "tile": None, "rowsperstrip": 16}]
)
def test_planes_of_colours_are_joined(tmp_path: Path, formats: Any, coding: Any, options: dict[str, Any]) -> None:
    levels = [coding.coded_pixels(300, 201)]
    levels += [coding.halved(levels[0], 2), coding.halved(levels[0], 4)]
    path = formats.planes(tmp_path / "planes.ome.tif", levels, mpp=0.25, **options)
    if options == {}:  # what OpenSlide alone would show for the slide
        assert np.array_equal(VendorSlide(path).read(0, 0, 0, 300, 201), np.repeat(levels[0][..., :1], 3, axis=2))
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("tiatoolbox", 0.25, "OME-XML")
        for number, level in enumerate(levels):
            size = level.shape[1::-1]
            assert np.array_equal(slide.read(0, 0, *size, mpp=0.25 * 2**number), level)


@pytest.mark.parametrize(
    ("colours", "words"),
    [
        ((0x0000FFFF, 0x00FF00FF, -16776961), "colours 0000FF, 00FF00, FF0000"),  # DAPI, FITC, Cy5
        ((-16776961, 0x00FF00FF, 0x0000FFFF), None),
        ((-1, -1, -1), None),
    ],
)
def test_channels_in_other_colours_than_rgb_are_refused(
    tmp_path: Path, formats: Any, pixels: np.ndarray, colours: tuple[int, ...], words: str | None
) -> None:
    path = formats.planes(tmp_path / "three.ome.tif", [pixels], channels={"Color": list(colours)})
    if words is None:
        assert np.array_equal(open_reader(path).read(0, 0, 0, 300, 201), pixels)
        return
    with pytest.raises(SlideError, match=rf"three\.ome\.tif: not one picture of 8-bit RGB .*{words}"):
        open_reader(path)


def test_interleaved_colours_of_a_rarer_compression(tmp_path: Path, coding: Any) -> None:
    pixels, path = coding.coded_pixels(300, 201), tmp_path / "rare.ome.tif"
    half, options = coding.halved(pixels, 2), {"tile": (64, 64), "photometric": "rgb", "compression": "lzma"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(pixels, subifds=1, metadata={"axes": "YXS"}, **options)
        writer.write(half, subfiletype=1, metadata=None, **options)
    reader = open_reader(path)
    assert isinstance(reader, TiatoolboxSlide)
    assert np.array_equal(reader.read(1, 0, 0, *reader.sizes[1]), half)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"), [((5, 80, 90), "u1", "5 channels of uint8"), ((3, 80, 90), "u2", "channels of uint16")]
)
def test_fluorescence_is_refused(tmp_path: Path, shape: tuple[int, ...], dtype: str, words: str) -> None:
    path = tmp_path / "dapi.ome.tif"
    data = np.ones(shape, dtype)
    tifffile.imwrite(path, data, ome=True, metadata={"axes": "CYX"}, photometric="minisblack", tile=(32, 32))
    with pytest.raises(SlideError, match=rf"dapi\.ome\.tif: not one picture.*{words}.*export it"):
        open_reader(path)


def test_a_stack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stack.ome.tif"
    data = np.ones((4, 80, 90), np.uint8)
    tifffile.imwrite(path, data, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack", tile=(32, 32))
    with pytest.raises(SlideError, match=r"stack\.ome\.tif.*axes ZYX"):
        open_reader(path)


def test_a_truncated_ome_tiff(tmp_path: Path, formats: Any, coding: Any) -> None:
    pixels = coding.coded_pixels(300, 201)
    path = formats.planes(tmp_path / "cut.ome.tif", [pixels, coding.halved(pixels, 2)])
    reader = open_reader(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(SlideError, match=r"cut\.ome\.tif") as caught:
        reader.read(0, 0, 0, 300, 201)
    assert "\n" not in str(caught.value)


def test_tiatoolbox_reads_maps_and_overlays(tmp_path: Path, coding: Any) -> None:
    """Our outputs, opened by what others open slides with; here, where tiatoolbox is imported already."""
    from tiatoolbox.wsicore.wsireader import WSIReader

    values = np.random.default_rng(0).normal(size=(301, 420)).astype(np.float32)
    values[:, :100] = np.nan
    value_map = ValueMap(values, 16.0, 8.0, "saliency", "tumour", "drawn", "log-odds")
    write_ome_tiff(tmp_path / "saliency.ome.tif", value_map)
    shown = WSIReader.open(tmp_path / "saliency.ome.tif")
    assert tuple(shown.info.slide_dimensions) == (420, 301) and tuple(shown.info.mpp) == (8.0, 8.0)
    assert [tuple(level) for level in shown.info.level_dimensions] == [(420, 301), (210, 151)]
    np.testing.assert_array_equal(shown.read_rect((90, 20), (50, 40))[..., 0], values[20:60, 90:140])
    np.testing.assert_array_equal(shown.read_rect((90, 20), (50, 40))[..., 1], np.isfinite(values)[20:60, 90:140])

    path = coding.write_coded(tmp_path / "slide.tif", 1500, 1100, 2).path
    with open_slide(path) as slide:
        mapped = SimpleNamespace(maps=[shown_explanation("deeplift", value_map, 1.0, "")], name="slide", findings=None)
        write_overlay_tiff(tmp_path / "overlay.tif", slide, mapped)
    overlay = WSIReader.open(tmp_path / "overlay.tif")
    with openslide.OpenSlide(tmp_path / "overlay.tif") as opened:
        assert tuple(overlay.info.slide_dimensions) == opened.dimensions == (750, 550)
        assert overlay.info.mpp[0] == pytest.approx(1.0)
        region = np.asarray(opened.read_region((300, 200), 0, (64, 64)).convert("RGB"))
    assert np.array_equal(overlay.read_rect((300, 200), (64, 64)), region)


def hurt_tables(path: Path, table: str, tile: int, value: int, page: int = 0) -> None:
    """Change an element of a table of tiles."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages[page].aspage().tags[table]
        size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
    with open(path, "r+b") as handle:
        handle.seek(tag.valueoffset + tile * size)
        handle.write(value.to_bytes(size, "little"))


@pytest.mark.parametrize("lost", [True, False])
def test_a_tile_that_an_ome_tiff_lacks_is_lost_or_white(
    tmp_path: Path, formats: Any, pixels: np.ndarray, lost: bool
) -> None:
    shown = pixels.copy()
    if not lost:
        shown[64:128, 128:192] = 255
    path = formats.planes(tmp_path / "hurt.ome.tif", [shown, shown[::2, ::2]])
    hurt_tables(path, "TileByteCounts", 5 + 2, 0)  # five tiles a row, of the red plane
    reader = open_reader(path)
    got, seen = reader.read_seen(0, 0, 0, 300, 201)
    assert reader.name == "tiatoolbox" and (seen is None) == (not lost)
    if seen is not None:
        assert not seen[64:128, 128:192].any() and np.array_equal(got[seen], shown[seen])
    else:
        assert np.array_equal(got, shown)


@pytest.mark.parametrize(("table", "value"), [("TileOffsets", 2**31), ("TileByteCounts", 9)])
def test_a_tile_that_an_ome_tiff_cannot_hold_is_not_black(
    tmp_path: Path, formats: Any, pixels: np.ndarray, table: str, value: int
) -> None:
    coding = {"compression": None} if table == "TileByteCounts" else {}
    path = formats.planes(tmp_path / "hurt.ome.tif", [pixels], **coding)
    hurt_tables(path, table, 0, value)
    reader = open_reader(path)
    with pytest.raises(SlideError, match=r"hurt\.ome\.tif: cannot be decoded"):
        reader.read(0, 0, 0, 10, 10)
    assert np.array_equal(reader.read(0, 64, 0, 100, 100), pixels[:100, 64:164])


def test_an_ome_tiff_with_too_few_tiles_is_refused(tmp_path: Path, formats: Any, pixels: np.ndarray) -> None:
    path = formats.planes(tmp_path / "hurt.ome.tif", [pixels])
    with tifffile.TiffFile(path) as file:
        where = file.pages[1].aspage().tags["TileOffsets"].offset
    with open(path, "r+b") as handle:
        handle.seek(where + 4)
        handle.write((1).to_bytes(4, "little"))
    with pytest.raises(SlideError, match=r"hurt\.ome\.tif: damaged slide"):
        open_reader(path)
