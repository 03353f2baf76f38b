from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from medsd.slides.slide import open_slide


def test_it_is_a_pyramid_of_the_slide_for_any_viewer(mapped: Path, fiducial_slide: Path) -> None:
    path = mapped / "overlay.tif"
    with openslide.OpenSlide(path) as opened, open_slide(fiducial_slide) as slide:
        assert opened.dimensions == (1024, 1024) and opened.level_dimensions == ((1024, 1024), (512, 512), (256, 256))
        assert opened.level_downsamples == (1, 2, 4)
        # Pixels of 1 um, where the slide has 0.5.
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(2 * slide.mpp)
    with tifffile.TiffFile(path) as tiff:
        assert [page.is_reduced for page in tiff.pages] == [False, True, True]
        assert all(page.is_tiled and page.compression == tifffile.COMPRESSION.JPEG for page in tiff.pages)
        assert (
            "Research use only" in tiff.pages.first.description
            and "Probability (tumour)" in tiff.pages.first.description
        )
        first = tiff.pages.first.asarray()
    with openslide.OpenSlide(path) as opened:
        shown = np.asarray(opened.read_region((256, 256), 0, (256, 256)).convert("RGB")).astype(int)
    assert np.abs(shown - first[256:512, 256:512]).mean() < 3


def test_its_levels_show_the_fiducials_at_their_place(mapped: Path, fiducials: tuple[tuple[int, int], ...]) -> None:
    with tifffile.TiffFile(mapped / "overlay.tif") as tiff:
        for page in tiff.pages:
            pixels = page.asarray().astype(int)
            side = 2048 / pixels.shape[1]
            # All is grey but the map.
            rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 2] > 60)
            places = np.stack([(columns + 0.5) * side, (rows + 0.5) * side], axis=1)
            for centre in fiducials:
                own = places[np.abs(places - centre).max(axis=1) < 200]
                assert len(own) and np.abs(own.mean(axis=0) - centre).max() <= 64
            assert all(np.abs(np.array(fiducials) - place).max(axis=1).min() <= 200 for place in places)
