from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import ome_types
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.heatmap.tiff import halve, is_map, read_ome_tiff, shrink, write_ome_tiff
from medsd.heatmap.value_map import ValueMap

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


def make_map(height: int, width: int, seed: int = 0) -> ValueMap:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(height, width)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    return ValueMap(values, 31.7, 0.2431 * 31.7, "saliency", "tumour", "gradient at layer2", "logit")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ValueMap]:
    path = tmp_path_factory.mktemp("tiff") / "saliency.ome.tif"
    value_map = make_map(701, 1030)
    write_ome_tiff(path, value_map)
    return path, value_map


def assert_same(left: ValueMap, right: ValueMap) -> None:
    np.testing.assert_array_equal(left.values, right.values)
    for name in ("level0_px", "mpp", "quantity", "target", "method", "unit"):
        assert getattr(left, name) == getattr(right, name)


def test_round_trip_is_exact(written: tuple[Path, ValueMap]) -> None:
    path, value_map = written
    assert_same(read_ome_tiff(path), value_map)


def test_levels_lie_in_subifds_tiled_and_deflated(written: tuple[Path, ValueMap]) -> None:
    path, _ = written
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert len(tiff.pages) == 2  # channels
        page = tiff.pages.first
        levels = tiff.series[0].levels
        assert tiff.series[0].axes == "CYX"  # of an image without channels tiatoolbox reads nothing
        assert [level.shape[1:] for level in levels] == [(701, 1030), (351, 515), (176, 258), (88, 129)]
        assert len(page.subifds or ()) == 3
        assert (page.tilewidth, page.tilelength) == (256, 256)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert page.dtype == np.float32
        # Bio-Formats knows no other predictor than 1 and 2.
        assert page.predictor == 1
        assert all(level.keyframe.subfiletype == 1 for level in levels[1:])


def test_levels_are_means_of_what_is_seen(written: tuple[Path, ValueMap]) -> None:
    path, value_map = written
    level, seen = tifffile.imread(path, series=0, level=1)
    for row, column in ((0, 0), (17, 200), (350, 514), (350, 3)):
        block = value_map.values[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        expected = np.mean(block[~np.isnan(block)]) if (~np.isnan(block)).any() else np.nan
        np.testing.assert_allclose(level[row, column], expected, rtol=1e-6)
        assert seen[row, column] == np.mean(~np.isnan(block))
    np.testing.assert_array_equal(tifffile.imread(path, series=0, level=0)[1], value_map.seen)


def test_the_schema_of_ome_holds(written: tuple[Path, ValueMap]) -> None:
    path, value_map = written
    described = ome_types.from_tiff(path, validate=True)
    pixels = described.images[0].pixels
    assert (pixels.size_x, pixels.size_y, pixels.size_c, pixels.type.value) == (1030, 701, 2, "float")
    assert pixels.physical_size_x == pixels.physical_size_y == value_map.mpp
    assert [channel.name for channel in pixels.channels] == ["saliency tumour", "seen"]


def test_the_frame_is_the_whole_canvas_and_emptiness_is_small(tmp_path: Path) -> None:
    """A scanned area of 40 x 30 map px from (1500, 2000) on the canvas of a MIRAX slide."""
    values = np.full((4000, 3000), np.nan, np.float32)
    values[2000:2030, 1500:1540] = np.random.default_rng(0).normal(size=(30, 40))
    value_map = ValueMap(values, 32.0, 8.0, "saliency", "tumour", "drawn", "log-odds")
    write_ome_tiff(tmp_path / "m.ome.tif", value_map)
    assert_same(read_ome_tiff(tmp_path / "m.ome.tif"), value_map)
    assert (tmp_path / "m.ome.tif").stat().st_size < 500_000  # of 48 million bytes


def test_it_is_told_what_a_map_holds(tmp_path: Path, written: tuple[Path, ValueMap]) -> None:
    path, value_map = written
    assert is_map(path) and not is_map(tmp_path) and not is_map(tmp_path / "missing.tif")
    tifffile.imwrite(tmp_path / "plain.tif", np.zeros((4, 4), np.uint8))
    assert not is_map(tmp_path / "plain.tif")
    words = value_map.in_words().splitlines()
    assert words[0] == "map         saliency of tumour: gradient at layer2"
    assert words[1].startswith("dimensions  1030 x 701 px, 7.94 x 5.40 mm")
    assert words[2] == "mpp         7.70627 um per pixel, which is 31.7 px of the slide's level 0"


def test_ome_xml_carries_scale_channel_and_warning(written: tuple[Path, ValueMap]) -> None:
    path, value_map = written
    with tifffile.TiffFile(path) as tiff:
        root = ET.fromstring(tiff.ome_metadata or "")
    pixels = root.find(f".//{OME}Pixels")
    assert pixels is not None
    assert float(pixels.attrib["PhysicalSizeX"]) == value_map.mpp
    assert float(pixels.attrib["PhysicalSizeY"]) == value_map.mpp
    assert pixels.attrib["PhysicalSizeXUnit"] == "µm"
    assert pixels.attrib["Type"] == "float"
    channel = root.find(f".//{OME}Channel")
    assert channel is not None and channel.attrib["Name"] == "saliency tumour"  # the first
    description = root.findtext(f".//{OME}Image/{OME}Description") or ""
    for words in ("gradient at layer2", "logit", "Research use only"):
        assert words in description


def test_a_small_map_has_one_level(tmp_path: Path) -> None:
    write_ome_tiff(tmp_path / "m.ome.tif", make_map(256, 3))
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        assert len(tiff.series[0].levels) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.ome.tif"]


@settings(max_examples=10, deadline=None)
@given(text=st.text(max_size=20), numbers=st.tuples(*[st.floats(1e-3, 1e5)] * 2), seed=st.integers(0, 99))
def test_any_text_and_number_comes_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, numbers: tuple[float, float], seed: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "m.ome.tif"
    value_map = ValueMap(make_map(5, 7, seed).values, *numbers, text, text[::-1], text + "<&>]]>\x00\ud800", text)
    write_ome_tiff(path, value_map)
    assert_same(read_ome_tiff(path), value_map)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_halving_keeps_the_sum_of_a_full_map(height: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(2 * height, 2 * width)).astype(np.float32)
    half = halve(values)
    assert half.shape == (height, width)
    np.testing.assert_allclose(4 * half.sum(dtype=float), values.sum(dtype=float), atol=1e-4)


def test_shrinking_keeps_the_place_and_the_scale() -> None:
    value_map = make_map(701, 1030)
    small = shrink(value_map, 300)
    assert small.values.shape == (176, 258)
    assert small.level0_px == 4 * value_map.level0_px
    assert small.mpp == 4 * value_map.mpp


def test_refuses_what_is_not_a_map(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="height, width"):
        write_ome_tiff(tmp_path / "m.ome.tif", ValueMap(np.zeros((2, 2, 2), np.float32), 1, 1, "", "", "", ""))
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path: Path, written: tuple[Path, ValueMap]) -> None:
    whole = written[0].read_bytes()
    bad = {
        "missing.tif": None,
        "empty.tif": b"",
        "text.tif": b"not a tiff",
        "head.tif": whole[:300],
        "damaged.tif": whole[:3000] + bytes(2000) + whole[5000:],
    }
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=name):
            read_ome_tiff(tmp_path / name)
    tifffile.imwrite(tmp_path / "plain.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(DatasetError, match=r"plain\.tif"):
        read_ome_tiff(tmp_path / "plain.tif")
    tifffile.imwrite(tmp_path / "other.ome.tif", np.zeros((4, 4), np.float32), ome=True)
    with pytest.raises(DatasetError, match="record"):
        read_ome_tiff(tmp_path / "other.ome.tif")


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 20_000))
def test_a_truncated_file_is_an_error_with_a_name(
    tmp_path_factory: pytest.TempPathFactory, written: tuple[Path, ValueMap], cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.ome.tif"
    path.write_bytes(written[0].read_bytes()[:cut])
    with pytest.raises(DatasetError, match="cut"):
        read_ome_tiff(path)
