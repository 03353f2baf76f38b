"""Every real file at hand is what its source says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medsd.errors import MissingMppError, SlideError
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.vendor import VendorSlide
from medsd.slides.slide import open_slide

REAL = {
    "CMU-1-Small-Region.svs": ((2220, 2967), 0.499, "vendor property"),
    "boxes_0.dcm": ((16, 16), 0.499, "vendor property"),
    "boxes_1.dcm": ((16, 16), 0.499, "vendor property"),
    "derived/cmu1-region-pyramid-jpeg.tif": ((2220, 2967), 0.499, "TIFF resolution tags"),
    "derived/cmu1-region-pyramid.ome.tif": ((2220, 2967), 0.499, "OME-XML"),
    "sm_image.dcm": ((50, 50), 0.499, "vendor property"),
    "sm_image_numbers.dcm": ((50, 50), 0.499, "vendor property"),
    "small.svs": ((16, 16), 0.499, "vendor property"),
    "test3-DAPI-2-(387).ndpi": ((3968, 4864), 0.2282, "vendor property"),
}
NO_SCALE = {"boxes.tiff": (300, 250), "yb10kx5k.zstd.tiff": (10000, 5000)}


def test_every_real_file_is_known(shared_data: Path) -> None:
    files = {path.relative_to(shared_data / "wsi").as_posix() for path in (shared_data / "wsi").rglob("*.*")}
    assert files == {*REAL, *NO_SCALE, "seg_image_sm_numbers.dcm", "SOURCES.md"}


@pytest.mark.parametrize("name", REAL)
def test_real_slides_are_what_their_source_says(shared_data: Path, name: str) -> None:
    size, mpp, source = REAL[name]
    with open_slide(shared_data / "wsi" / name) as slide:
        assert slide.dimensions == size and slide.mpp_source == source
        assert slide.mpp == pytest.approx(mpp, abs=5e-5)
        notes = (shared_data / "wsi" / "SOURCES.md").read_text("utf-8")
        note = re.search(rf"^## {re.escape(name)}$.*?opened with openslide: (.*?)$", notes, re.M | re.S)
        assert note is not None
        levels = [(int(w), int(h)) for w, h in re.findall(r"(\d+)x(\d+)", note[1].split("levels")[1].split(";")[0])]
        if name.endswith(".ome.tif"):  # OpenSlide sees no SubIFDs; tifffile's note gives their number
            levels = [(2220, 2967), (1110, 1483), (555, 741), (277, 370)]
            assert "levels 4" in notes.split(f"## {name}")[1]
        assert [(level.width, level.height) for level in slide.levels] == levels


@pytest.mark.parametrize("name", NO_SCALE)
def test_files_without_a_believable_scale_need_one(shared_data: Path, name: str) -> None:
    path = shared_data / "wsi" / name
    with pytest.raises(MissingMppError, match=r"352\.\d+ um per pixel, which no microscope has.*mpp="):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.dimensions, slide.mpp, slide.mpp_source) == (NO_SCALE[name], 0.5, "given by the caller")


def test_a_segmentation_is_no_slide(shared_data: Path) -> None:
    with pytest.raises(SlideError, match="not a slide"):
        open_slide(shared_data / "wsi" / "seg_image_sm_numbers.dcm")


@pytest.mark.parametrize(
    "name",
    ["CMU-1-Small-Region.svs", "derived/cmu1-region-pyramid-jpeg.tif", "small.svs", "boxes.tiff", "yb10kx5k.zstd.tiff"],
)
def test_fast_tiles_are_openslides_pixels(shared_data: Path, name: str) -> None:
    path = shared_data / "wsi" / name
    fast, oracle = open_reader(path), VendorSlide(path)
    assert isinstance(fast, TiledTiff) and fast.sizes == oracle.sizes
    for number, (width, height) in enumerate(fast.sizes):
        size = min(width, 1000), min(height, 1000)
        # From the origin only: elsewhere OpenSlide interpolates levels of odd sizes.
        assert np.array_equal(fast.read(number, 0, 0, *size), oracle.read(number, 0, 0, *size)), number


def test_tiles_of_dicom_are_in_order(shared_data: Path) -> None:
    path = shared_data / "wsi" / "sm_image_numbers.dcm"
    pixels = open_slide(path).read(0, 0, 50, 50)
    tiles = pixels.reshape(5, 10, 5, 10, 3).swapaxes(1, 2).reshape(25, 10, 10, 3)
    assert np.array_equal(tiles, pydicom.dcmread(path).pixel_array)  # frames, row by row
    assert len({tile.tobytes() for tile in tiles}) > 20  # the last tiles are blank
