"""Outlines become areas of classes, by the names that are written with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile

from medsd.annotations import Outline, annotations_of, write_asap_xml, write_geojson
from medsd.cohort.entry import SlideEntry
from medsd.cohort.outlines import holds, raster, read_outlines
from medsd.errors import AnnotationError

NAMES = ("benign", "in situ", "invasive")
SIZE = (1000, 1000)


def entry(path: Path, *drawn: tuple[str, tuple[int, int, int, int]], label: int | None = None) -> SlideEntry:
    """A slide with an outline a group."""
    outlines = [Outline("", group, False, shapely.box(*place)) for group, place in drawn]
    (write_asap_xml if path.suffix == ".xml" else write_geojson)(path, annotations_of(outlines))
    return SlideEntry("a", path.with_suffix(".tif"), label, annotation=path)


@pytest.mark.parametrize("suffix", [".xml", ".geojson"])
def test_a_group_names_its_class(tmp_path: Path, suffix: str) -> None:
    drawn = [
        ("In Situ", (0, 0, 100, 100)),
        ("invasive: grade 2", (50, 0, 150, 100)),  # half of it on the other
        ("Invasive", (400, 400, 500, 500)),
        ("benign", (0, 0, 20, 100)),
        ("Exclusion", (400, 400, 410, 500)),
    ]
    slide = entry(tmp_path / f"a{suffix}", *drawn)
    found = read_outlines(slide, SIZE, (0, 0), NAMES)
    assert found is not None and {number: area.tumour.area for number, area in found.items()} == {
        0: 20 * 100,
        1: 80 * 100,
        2: 100 * 100 + 90 * 100,
    }
    assert [holds(slide, found, number) for number in (1, 2, 3)] == [True, True, False]
    mask = raster(found, 2, (100, 100), 10.0)
    assert mask.sum() == 190 and mask[:10, 5:15].all() and mask[40:50, 41:50].all()
    assert not raster(found, 3, (5, 5), 10.0).any() and not raster(None, 1, (5, 5), 10.0).any()
    assert read_outlines(SlideEntry("b", Path("b.tif")), SIZE, (0, 0), NAMES) is None


def test_outlines_without_a_name_are_of_the_slides_class(tmp_path: Path) -> None:
    for group in ("Tumor", "_0", "None"):
        for label in (1, 2):
            slide = entry(tmp_path / "a.xml", (group, (0, 0, 10, 10)), label=label)
            found = read_outlines(slide, SIZE, (0, 0), NAMES)
            assert found is not None and list(found) == [label]
        two = read_outlines(entry(tmp_path / "a.xml", (group, (0, 0, 10, 10))), SIZE, (0, 0), ("benign", "malignant"))
        assert two is not None and list(two) == [1]  # there is no other
        with pytest.raises(AnnotationError, match=rf"group '{group}' names none of the classes in situ, invasive"):
            read_outlines(entry(tmp_path / "a.xml", (group, (0, 0, 10, 10))), SIZE, (0, 0), NAMES)
    tifffile.imwrite(tmp_path / "a_mask.tif", np.eye(10, dtype=np.uint8) * 255)
    masked = SlideEntry("a", Path("a.tif"), 2, annotation=tmp_path / "a_mask.tif")
    found = read_outlines(masked, SIZE, (0, 0), NAMES)
    assert found is not None and list(found) == [2] and found[2].tumour.area == 10 * 100**2


def test_what_contradicts_is_refused_in_the_classes_own_words(tmp_path: Path) -> None:
    slide = entry(tmp_path / "a.geojson", ("invasive", (0, 0, 10, 10)), label=0)
    with pytest.raises(AnnotationError, match="outlines invasive on a slide that is labelled benign; correct either"):
        read_outlines(slide, SIZE, (0, 0), NAMES)
    slide = entry(tmp_path / "a.geojson", ("invasiv", (0, 0, 10, 10)))
    with pytest.raises(AnnotationError, match="'invasiv' is unknown; did you mean 'invasive'") as error:
        read_outlines(slide, SIZE, (0, 0), NAMES)
    assert "tumo" not in str(error.value) and "in situ, invasive, or of benign, " in str(error.value)
    slide = entry(tmp_path / "a.geojson", ("in situ", (2000, 2000, 2010, 2010)))
    with pytest.raises(AnnotationError, match="most of what is outlined, x 2000"):
        read_outlines(slide, SIZE, (0, 0), NAMES)
