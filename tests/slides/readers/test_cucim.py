"""cuCIM by name: what is said without it, and the pixels that it shows of real slides."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsd.errors import SlideError
from medsd.slides.readers.choose import open_reader

with_cucim = pytest.mark.skipif(importlib.util.find_spec("cucim") is None, reason="cuCIM not installed (cucim-cu12)")


def test_without_cucim_it_says_what_to_install(tmp_path: Path, coding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lzw.tif"
    coding.write_levels(path, [coding.coded_pixels(128, 96)], 0.5, 2, compression="lzw")
    monkeypatch.setitem(sys.modules, "cucim", None)
    with pytest.raises(SlideError, match=r"lzw\.tif: reader=cucim needs cuCIM.*install cucim-cu12 or leave") as caught:
        open_reader(path, "cucim")
    assert "\n" not in str(caught.value)


def test_tiles_that_it_does_not_know_never_reach_it(
    coded_slides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cucim", None)
    with pytest.raises(SlideError, match=r"even-2x\.tif: not tiles of RGB that cuCIM reads.*leave out reader=cucim"):
        open_reader(coded_slides["even-2x"].path, "cucim")  # deflate ends the process


def test_what_is_no_tiled_tiff(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_text("text")
    with pytest.raises(SlideError, match=r"a\.svs: not a plain tiled TIFF, so cucim cannot read it; leave out"):
        open_reader(tmp_path / "a.svs", "cucim")


@with_cucim
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "derived/cmu1-region-pyramid-jpeg.tif", "small.svs"])
def test_its_pixels_are_the_files_own(shared_data: Path, name: str) -> None:
    path = shared_data / "wsi" / name
    ours, theirs = open_reader(path), open_reader(path, "cucim")
    assert (theirs.name, theirs.sizes) == ("cucim", ours.sizes)
    generator = np.random.default_rng(0)
    for level, (width, height) in enumerate(ours.sizes):
        assert np.array_equal(theirs.read(level, 0, 0, width, height), ours.read(level, 0, 0, width, height))
        for _ in range(30):
            column, row = int(generator.integers(width)), int(generator.integers(height))
            place = (level, column, row, min(99, width - column), min(77, height - row))
            assert np.array_equal(theirs.read(*place), ours.read(*place)), place


@with_cucim
@pytest.mark.parametrize("name", ["boxes.tiff", "yb10kx5k.zstd.tiff", "derived/cmu1-region-pyramid.ome.tif"])
def test_real_files_that_are_not_for_it(shared_data: Path, name: str) -> None:
    with pytest.raises(SlideError, match="leave out reader=cucim"):
        open_reader(shared_data / "wsi" / name, "cucim")
