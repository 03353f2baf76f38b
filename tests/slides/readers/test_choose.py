"""Which reader opens a file, and that what it shows is right or refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from medsd.errors import ConfigError, SlideError
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.readers.choose import READERS, open_reader
from medsd.slides.slide import open_slide

HEAVY = ("tiatoolbox", "zarr", "glymur", "torch", "matplotlib")


def test_opening_slides_imports_nothing_heavy(coded_slides: dict[str, Any]) -> None:
    code = (
        "import sys, medsd.slides.slide as slide\n"
        f"slide.open_slide({str(coded_slides['even-2x'].path)!r}).read(0, 0, 9, 9)\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def make(kind: str, folder: Path, coding: Any, formats: Any) -> Path:
    pixels = coding.coded_pixels(128, 96)
    if kind == "ngff":
        return formats.ngff(folder / "slide", [pixels])
    path = folder / "slide.tif"  # the same name for all
    if kind == "tiled":
        coding.write_levels(path, [pixels], 0.5, 2)
    elif kind == "alpha":
        alpha = np.full((96, 128, 1), 9, np.uint8)
        coding.write_levels(path, [np.concatenate([pixels, alpha], -1)], 0.5, 2, extrasamples=["unassalpha"])
    elif kind == "planes":
        formats.planes(path, [pixels, coding.halved(pixels, 2)])
    elif kind == "ome":
        with tifffile.TiffWriter(path, ome=True) as writer:
            options: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
            writer.write(pixels, subifds=1, metadata={"axes": "YXS"}, **options)
            writer.write(coding.halved(pixels, 2), subfiletype=1, metadata=None, **options)
    elif kind == "jp2":
        formats.jp2(path.with_suffix(".jp2"), pixels, tilesize=None).rename(path)
    else:
        Image.fromarray(pixels).save(path, format=kind)
    return path


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("tiled", "tifffile"),
        ("ome", "tifffile"),
        ("alpha", "openslide"),
        ("planes", "tiatoolbox"),
        ("jp2", "tiatoolbox"),
        ("ngff", "zarr"),
        ("TIFF", "pillow"),
        ("PNG", "pillow"),
        ("JPEG", "pillow"),
    ],
)
def test_what_is_in_the_file_decides(tmp_path: Path, coding: Any, formats: Any, kind: str, reader: str) -> None:
    path = make(kind, tmp_path, coding, formats)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.reader == reader and slide.dimensions == (128, 96)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["tiled", "planes", "jp2", "ngff", "PNG"])
def test_a_named_reader_reads_it_or_says_so(tmp_path: Path, coding: Any, formats: Any, kind: str, name: str) -> None:
    path = make(kind, tmp_path, coding, formats)
    if name == "openslide" and kind == "planes":
        return  # it takes the first page for the slide; whoever names it gets what it shows
    try:
        reader = open_reader(path, name)
    except SlideError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert reader.name == name
        pixels = coding.coded_pixels(128, 96)
        assert np.array_equal(reader.read(0, 0, 0, 128, 96), pixels)


def test_a_misspelt_reader() -> None:
    with pytest.raises(ConfigError, match="reader 'openslid' is unknown; did you mean 'openslide'"):
        open_reader(Path("any.svs"), "openslid")


@pytest.mark.parametrize("name", [None, "tifffile", "openslide"])
def test_a_folder_is_no_slide_unless_it_is_zarr(tmp_path: Path, name: str | None) -> None:
    with pytest.raises(SlideError, match="is a folder"):
        open_reader(tmp_path, name)
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(SlideError, match="a zarr folder"):
        open_reader(tmp_path, name)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("tile", [(64, 64), None])
def test_turned_tiffs_are_refused(tmp_path: Path, coding: Any, turn: int, tile: tuple[int, int] | None) -> None:
    path = tmp_path / "turned.tif"
    tag = [(274, "H", 1, turn, True)]
    tifffile.imwrite(path, coding.coded_pixels(128, 96), tile=tile, photometric="rgb", extratags=tag, metadata=None)
    names = (None, "openslide") if tile else (None, "pillow")
    for name in names:
        with pytest.raises(SlideError, match=rf"turned\.tif: stored turned \(Orientation {turn}\).*save it upright"):
            open_reader(path, name)


def test_a_tag_that_says_upright_is_fine(tmp_path: Path, coding: Any) -> None:
    path, pixels = tmp_path / "upright.tif", coding.coded_pixels(128, 96)
    tag = [(274, "H", 1, 1, True)]
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", extratags=tag, metadata=None)
    assert np.array_equal(open_reader(path).read(0, 0, 0, 128, 96), pixels)


@pytest.mark.parametrize("kind", ["tiled", "ome", "TIFF"])
def test_a_tiff_is_opened_once(tmp_path: Path, coding: Any, formats: Any, kind: str) -> None:
    """By this package; OpenSlide, whose opinion is asked, opens it in C. A picture is opened again to be decoded."""
    path = make(kind, tmp_path, coding, formats)
    opened = []
    watching = True

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(details[0]) == str(path):
            opened.append(details)

    sys.addaudithook(watch)
    with open_slide(path, mpp=0.5) as slide:
        slide.read(3, 4, 50, 40)
    watching = False
    assert len(opened) == (3 if kind == "TIFF" else 1)


CODED: dict[str, dict[str, Any]] = {
    "jpeg2000": {"compressionargs": {"level": 0}},
    "webp": {"compressionargs": {"lossless": True, "level": 100}},
    "jpegxl": {"compressionargs": {"lossless": True}},
}


@pytest.mark.parametrize("compression", CODED)
def test_tiles_that_openslide_cannot_decode_are_read(tmp_path: Path, coding: Any, compression: str) -> None:
    path = tmp_path / "slide.tif"
    levels = [coding.coded_pixels(300, 201)]
    levels.append(coding.halved(levels[0], 2))
    coding.write_levels(path, levels, 0.5, 2, compression=compression, **CODED[compression])
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("tifffile", 0.5, "TIFF resolution tags")
        for number, level in enumerate(levels):
            assert np.array_equal(slide.read(0, 0, *level.shape[1::-1], mpp=0.5 * 2**number), level)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "lerc"}, "compression LERC"),
        ({"compression": "png"}, "compression PNG"),
        ({"tile": None, "compression": "jpegxl"}, "compression JPEGXL in strips"),
        ({"dtype": np.float32}, "32 bits a colour"),
        ({"dtype": np.uint16, "tile": None}, "16 bits a colour"),
    ],
)
def test_what_is_only_unusual_is_not_called_damaged(
    tmp_path: Path, coding: Any, options: dict[str, Any], words: str
) -> None:
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None, **options}
    pixels = coding.coded_pixels(128, 96).astype(options.pop("dtype", np.uint8))
    tifffile.imwrite(tmp_path / "odd.tif", pixels, **options)
    with pytest.raises(SlideError, match=rf"odd\.tif: TIFF with {words} is not read; save it as 8-bit RGB") as caught:
        open_reader(tmp_path / "odd.tif")
    assert "copy it again" not in str(caught.value)


WRONG_IN_OPENSLIDE: list[tuple[dict[str, Any], int, str]] = [
    ({"photometric": "minisblack", "dtype": np.uint16}, 1, "grey of 16 bits"),
    ({"photometric": "minisblack", "extrasamples": ["unspecified"]}, 2, "grey of 2 channels"),
    ({"photometric": "rgb", "extrasamples": ["unspecified"]}, 4, "4 channels, of which the fourth is not called"),
    ({"photometric": "rgb", "extrasamples": ["unspecified"] * 2}, 5, "5 channels, of which the fourth"),
]


@pytest.mark.parametrize(("kinds", "channels", "words"), WRONG_IN_OPENSLIDE)
def test_what_openslide_shows_wrong_is_refused(tmp_path: Path, kinds: Any, channels: int, words: str) -> None:
    path, options = tmp_path / "odd.tif", {"tile": (64, 64), "planarconfig": "contig", "metadata": None, **kinds}
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, channels)).astype(options.pop("dtype", np.uint8))
    wanted = pixels[..., :3] if channels > 3 else pixels[..., :1]
    tifffile.imwrite(path, (pixels * (257 if pixels.itemsize > 1 else 1)).squeeze(), **options)
    assert (open_reader(path, "openslide").read(0, 0, 0, 150, 100) != wanted).mean() > 0.1
    with pytest.raises(SlideError, match=rf"odd\.tif: TIFF with {words}.* is not read; save it as 8-bit RGB"):
        open_reader(path)


@pytest.mark.parametrize("bits", [8, 16])
def test_what_openslide_shows_right_is_left_to_it(tmp_path: Path, coding: Any, bits: int) -> None:
    path, pixels = tmp_path / "slide.tif", coding.coded_pixels(150, 100)
    stored = pixels if bits == 8 else pixels.astype(np.uint16) * 257
    stored = np.dstack([stored, np.full_like(stored[..., 0], 2**bits - 1)])
    tifffile.imwrite(path, stored, tile=(64, 64), photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    reader = open_reader(path)
    assert reader.name == "openslide" and np.array_equal(reader.read(0, 0, 0, 150, 100), pixels)


@pytest.mark.parametrize("extra", [None, "unassalpha"])
def test_a_pyramid_in_motorolas_order_is_read_or_refused(tmp_path: Path, coding: Any, extra: str | None) -> None:
    """OpenSlide does not open it where it is no BigTIFF."""
    path, levels = tmp_path / "slide.tif", [coding.coded_pixels(300, 201)]
    levels.append(coding.halved(levels[0], 2))
    options: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": "lzw", "metadata": None}
    if extra is not None:
        levels = [np.dstack([level, level[..., 0]]) for level in levels]
        options["extrasamples"] = [extra]
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        for number, level in enumerate(levels):
            writer.write(level, subfiletype=number, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)
    if extra is not None:
        with pytest.raises(SlideError, match=r"slide\.tif: TIFF with 4 channels of RGB is not read"):
            open_reader(path)
        return
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("tifffile", 0.5, "TIFF resolution tags")
        for number, level in enumerate(levels):
            assert np.array_equal(slide.read(0, 0, *level.shape[1::-1], mpp=0.5 * 2**number), level)


@pytest.mark.parametrize("kinds", [(1, 0, 1), (0, 0, 1), (0, 0)])
def test_an_overview_or_label_before_the_slide_is_refused(tmp_path: Path, coding: Any, kinds: tuple[int, ...]) -> None:
    """OpenSlide would take the first page's scale, or the label itself, for the slide's."""
    path, base = tmp_path / "slide.tif", coding.coded_pixels(512, 384)
    pages = [coding.halved(base, 8), base, coding.halved(base, 2)]
    with tifffile.TiffWriter(path) as writer:
        for kind, page in zip(kinds, pages, strict=False):
            writer.write(page, tile=(64, 64), photometric="rgb", subfiletype=kind, metadata=None)
    for name in (None, "openslide"):
        with pytest.raises(SlideError, match=r"slide\.tif: its first page \(64 x 48 px\) is smaller .*512 x 384 px"):
            open_reader(path, name)


def test_a_name_that_is_no_utf8(tmp_path: Path, coding: Any) -> None:
    """As old archives and network disks have them."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xe9vrier.tif"))
    pixels = coding.coded_pixels(128, 96)
    coding.write_levels(path, [pixels], 0.5, 2)
    for opener in (open_slide, IsolatedSlide):
        with opener(path) as slide:
            assert np.array_equal(slide.read(0, 0, 128, 96), pixels)


REFUSED = {
    "broken.svs",
    "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif",
    "crash-0e16d3bfb83be87356d026d66919deaefca44dac.tif",
    "crash-1185209cf7655b5aed8ae5e77784dfdd18ab59e9.tif",
    "crash-338516dbd2f0e83caddb8ce256c22db3bd6dc40f.tif",
    "crash-63b1dffefc8c075ddc606c0a2f5fdc15ece78863.tif",
    "crash-86214e58da443d2b80820cff9677a38a33dcbbca.tif",
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif",
    "small_la.tiff",
    "test_orient3.tif",
    "test_orient6.tif",
    "tiff_strip_planar_16bit_RGB.tiff",
    "unopenable.tiff",
    "unreadable.svs",
    "zero_gi.tif",
}


@pytest.mark.parametrize(("name", "value"), [("ImageWidth", 2**20), ("TileWidth", 16), ("ImageLength", 5000)])
def test_a_page_with_too_few_tiles_is_refused(tmp_path: Path, name: str, value: int) -> None:
    """A header that claims 2^20 px of width would be read for minutes, one of other tiles shows them scrambled."""
    path = tmp_path / "wide.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].aspage().tags[name].overwrite(value)
    with pytest.raises(SlideError, match=r"wide\.tif: a page of .* has 35 tiles instead of \d+"):
        open_reader(path)


def test_odd_files_are_right_or_refused(shared_data: Path) -> None:
    paths = [path for path in sorted((shared_data / "wsi_odd").iterdir()) if path.suffix != ".md"]
    refused = set()
    for path in paths:
        try:
            with open_slide(path, mpp=0.5) as slide:
                pixels = slide.read(0, 0, *slide.dimensions)
                assert slide.read(-3, -3, 20, 20, mpp=0.8).shape == (20, 20, 3)
        except SlideError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused.add(path.name)
            continue
        expected = np.asarray(Image.open(path).convert("RGB"))
        if "cmyk" in path.name:  # libtiff and PIL round ink differently
            assert np.abs(pixels.astype(int) - expected).max() <= 1
        else:
            assert np.array_equal(pixels, expected), path.name
    assert refused == REFUSED
