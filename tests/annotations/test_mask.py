"""Masks to polygons and back, bit for bit, and masks that are none."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from scipy import ndimage
from shapely.geometry import MultiPolygon

from medsd.annotations import (
    Annotations,
    rasterise,
    read_annotations,
    write_asap_xml,
    write_geojson,
)
from medsd.annotations import mask as mask_module
from medsd.annotations.mask import _corners, _edges, mask_polygons
from medsd.errors import AnnotationError
from medsd.phantom.files import write_pyramid

Mask = npt.NDArray[Any]


def write(tmp_path: Path, mask: Mask, **options: Any) -> Path:
    tifffile.imwrite(tmp_path / "mask.tif", mask, **options)
    return tmp_path / "mask.tif"


@settings(max_examples=150, deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_any_mask_comes_back(mask: Mask) -> None:
    polygons = list(mask_polygons(mask))
    assert len(polygons) == ndimage.label(mask)[1]  # pixels that meet at a corner only are apart
    assert all(polygon.is_valid for polygon in polygons)
    area = MultiPolygon(polygons)
    assert area.is_valid and area.area == mask.sum()
    assert (rasterise(Annotations(area, 0, MultiPolygon()), mask.shape[1], mask.shape[0], 1.0) == mask).all()
    assert _corners(mask) == sum(len(_edges(side.view(np.int8))) for side in (mask, mask.T))


def test_corners_by_hand() -> None:
    mask = np.array([[letter == "#" for letter in row] for row in ["####", "#..#", "#.##", "##.."]])
    (polygon,) = mask_polygons(mask)
    # No corner on a straight edge; the hole touches the outer ring at (2, 3) and stays a hole.
    assert set(polygon.exterior.coords) == {(0, 0), (4, 0), (4, 3), (2, 3), (2, 4), (0, 4)}
    (hole,) = polygon.interiors
    assert set(hole.coords) == {(1, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3)}


def test_real_region_mask_comes_back(shared_data: Path, tmp_path: Path) -> None:
    (file,) = (shared_data / "region_mask_bcss").glob("*.png")
    values = np.array(Image.open(file))[1000:2500, 1000:2700]
    path = write(tmp_path, values, tile=(512, 512), compression="deflate")
    height, width = values.shape
    found = read_annotations(path, (4 * width, 4 * height), tumour_values=[1, 3])
    expected = np.isin(values, [1, 3])
    assert found.tumour.is_valid and found.tumour.area == 16 * expected.sum() > 0
    assert (rasterise(found, width, height, 4.0) == expected).all()
    for name, writer in (("a.xml", write_asap_xml), ("a.geojson", write_geojson)):
        writer(tmp_path / name, found)
        back = read_annotations(tmp_path / name)
        assert (rasterise(back, width, height, 4.0) == expected).all(), name


def blobs(height: int, width: int) -> Mask:
    field = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((height, width)), 6)
    return (field > 0.01).astype(np.uint8)


@pytest.mark.parametrize("factor", [2, 4])
def test_level_that_fits_is_read(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = blobs(1203, 901)
    write_pyramid(tmp_path / "m.tif", mask, 0.25, factor)
    whole = read_annotations(tmp_path / "m.tif", (901, 1203))
    assert (rasterise(whole, 901, 1203, 1.0) == mask).all()
    monkeypatch.setattr(mask_module, "MOST_MASK_PX", 1203 * 901 - 1)
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        level = file.pages[1].asarray()
    coarse = read_annotations(tmp_path / "m.tif", (901, 1203))
    # The level's size is rounded, and its pixels are square all the same.
    assert 901 / level.shape[1] != 1203 / level.shape[0]
    assert (rasterise(coarse, level.shape[1], level.shape[0], float(factor)) == level).all()
    assert coarse.tumour.area == pytest.approx(whole.tumour.area, rel=0.05)
    monkeypatch.setattr(mask_module, "MOST_MASK_PX", 1000)
    with pytest.raises(AnnotationError, match="save it as a pyramid"):
        read_annotations(tmp_path / "m.tif", (901, 1203))


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("value", [1, 255])
def test_values_of_tumour(dtype: Any, value: int, tmp_path: Path) -> None:
    mask = np.zeros((40, 60), dtype)
    mask[10:20, 30:50] = value
    assert read_annotations(write(tmp_path, mask), (60, 40)).tumour.bounds == (30, 10, 50, 20)
    assert read_annotations(write(tmp_path, mask * 0), (60, 40)).tumour.is_empty


def test_camelyon_values_need_a_word(tmp_path: Path) -> None:
    mask = np.ones((40, 60), np.uint8)
    mask[10:20, 30:50] = 2  # 1 is tissue, 2 tumour
    path = write(tmp_path, mask)
    with pytest.raises(AnnotationError, match=r"values 1, 2, not 0 and 1.*tumour_values"):
        read_annotations(path, (60, 40))
    assert read_annotations(path, (120, 80), tumour_values=[2]).tumour.bounds == (60, 20, 100, 40)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1, 5, 6), (5, 6, 1)])
def test_thin_masks_and_needless_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path, np.ones(shape, np.uint8))
    height, width = (side for side in shape) if len(shape) == 2 else (5, 6)
    assert read_annotations(path, (width, height)).tumour.area == width * height


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((40, 60, 3), np.uint8), "no mask, but uint8"),
        (np.zeros((40, 60), np.float32), "no mask, but float32"),
        (np.full((40, 60), 7, np.uint8), "values 7"),
        (np.array([[0, 1, 255]] * 40, np.uint8), "values 0, 1, 255"),
        (np.zeros((60, 40), np.uint8), "does not fit a slide of 60 x 40"),
        (np.zeros((40, 57), np.uint8), "does not fit"),
    ],
)
def test_what_is_no_mask_of_the_slide(mask: Mask, words: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=words):
        read_annotations(write(tmp_path, mask), (60, 40))


def test_mask_needs_the_slides_size(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="slide_size_px"):
        read_annotations(write(tmp_path, np.zeros((4, 4), np.uint8)))
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotations(tmp_path / "missing.tif", (4, 4))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 1500), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    cut=st.integers(0, 1500) | st.none(),
)
@example(edits=[(23, b"\x00"), (37, b"\x01")], cut=190)  # a page of no width
def test_damaged_masks_are_read_or_raise_annotation_error(edits: list[Any], cut: int | None, tmp_path: Path) -> None:
    if not (tmp_path / "good.tif").exists():
        write_pyramid(tmp_path / "good.tif", blobs(600, 520), 0.25, 2)
    data = bytearray((tmp_path / "good.tif").read_bytes())
    for place, replacement in edits:
        # The header and the first page's tags, then its tiles.
        data[place : place + len(replacement)] = replacement
    (tmp_path / "bad.tif").write_bytes(data[:cut])
    try:
        found = read_annotations(tmp_path / "bad.tif", (520, 600))
    except AnnotationError as error:
        assert "\n" not in str(error)
    else:
        assert found.tumour.is_valid


def test_a_list_of_pages_without_end_is_no_mask(tmp_path: Path) -> None:
    """Bytes that no page ends: 20,000 pages without a tag, each naming the next."""
    places = range(8, 8 + 6 * 20_000, 6)
    chain = b"".join(struct.pack("<HI", 0, place + 6) for place in places)
    (tmp_path / "mask.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8) + chain)
    with pytest.raises(AnnotationError, match=r"mask\.tif: damaged mask \(a list of pages without end\)"):
        read_annotations(tmp_path / "mask.tif", (600, 600))


def test_noise_is_refused_before_it_is_outlined(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (1200, 1200), dtype=np.uint8)
    with pytest.raises(AnnotationError, match=r"mask.tif: areas with .* straight edges, more than 500,000: noise\?"):
        read_annotations(write(tmp_path, noise), (1200, 1200))
