"""Slides segmented by a network that knows colours alone: areas, contours, files, records, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import highdicom
import numpy as np
import pytest
import shapely
import tifffile
import torch
from scipy import ndimage
from shapely.geometry import shape
from torch import nn

from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import gather
from medsd.cohort.runner import Sharing
from medsd.errors import ConfigError, DatasetError, WeightsError
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.folder import holds_classes
from medsd.heatmap.store import BlockStore
from medsd.heatmap.tiff import is_map
from medsd.heatmap.view import ViewServer
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier
from medsd.phantom.files import write_pyramid
from medsd.record import read_record, rewrite_record
from medsd.segment import contours
from medsd.segment.contours import ClassRegion, class_regions, write_class_regions
from medsd.segment.label_tiff import NAMESPACE, label_map_words
from medsd.segment.network import SegmentationNetwork
from medsd.segment.slides import Segmented, SegmentRequest, segment_slides
from medsd.segment.weights import SegmentationCard, save_segmentation
from medsd.tables import read_table

CLASSES = ("background", "violet", "blue")
INKS = ((225, 150, 190), (120, 60, 140), (60, 60, 200))
GREEN = ModelCard("test_resnet", ("normal", "tumour"), 32, 1.0, "")
CARD = SegmentationCard("test_resnet", "unet", CLASSES, 128, "colours", mpp=1.0, validation={"validation_dice": 0.713})
MPP, SIDE_PX, BLOCK_PX = 0.5, 2304, 512
RING = (850, 850, 450, 225)
"""Level-0 centre and radii: the violet ring lies across the border of blocks of 512 px at 1 um; of blue a square."""
SQUARE = (1600, 300, 2000, 700)


class Colours(nn.Module):
    """The nearest of the classes' inks, by the red of the pixel."""

    classes, device = CLASSES, torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reds = torch.tensor([float(red) for red, _, _ in INKS])[:, None, None]
        return (2 * reds * x[:, :1] - reds**2) / 1000


def drawn() -> np.ndarray:
    """Pink tissue on glass, with a ring and a square on it."""
    pixels = np.full((SIDE_PX, SIDE_PX, 3), 244, np.uint8)
    pixels[100:-100, 100:-100] = INKS[0]
    rows, columns = np.ogrid[:SIDE_PX, :SIDE_PX]
    distance = np.hypot(columns + 0.5 - RING[0], rows + 0.5 - RING[1])
    pixels[(distance <= RING[2]) & (distance >= RING[3])] = INKS[1]
    left, top, right, bottom = SQUARE
    pixels[top:bottom, left:right] = INKS[2]
    return pixels


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "drawn.tif"
    write_pyramid(path, drawn(), MPP, 2)
    return path


def of_colours(monkeypatch: pytest.MonkeyPatch, card: SegmentationCard = CARD) -> None:
    for module in ("stitch", "contours"):
        monkeypatch.setattr(f"medsd.segment.{module}._BLOCK_PX", BLOCK_PX)
    monkeypatch.setattr("medsd.segment.slides.load_segmentation", lambda *_: (Colours(), card, "0" * 64))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, slide: Path) -> SimpleNamespace:
    """The slide's folder, its row, and the cohort's folder with a slide of glass in it."""
    folder = tmp_path_factory.mktemp("segmented")
    write_pyramid(folder / "glass.tif", np.full((512, 512, 3), 244, np.uint8), MPP, 2)
    entries = [SlideEntry("drawn", slide), SlideEntry("glass", folder / "glass.tif")]
    with pytest.MonkeyPatch.context() as patch:
        of_colours(patch)
        request = SegmentRequest(probabilities=True, dicom=True)
        row, empty = segment_slides(entries, "unused", folder / "out", request, "cpu", isolate=False)
    assert (row.status, empty.status) == ("ok", "empty")
    return SimpleNamespace(folder=folder / "out" / "drawn", row=row, out=folder / "out")


RING_MM2 = np.pi * (RING[2] ** 2 - RING[3] ** 2) * MPP**2 / 1e6
SQUARE_MM2 = 400 * 400 * MPP**2 / 1e6
TISSUE_MM2 = (SIDE_PX - 200) ** 2 * MPP**2 / 1e6


def test_areas_are_those_that_were_drawn(done: SimpleNamespace) -> None:
    areas = done.row.areas_mm2
    assert areas["violet"] == pytest.approx(RING_MM2, rel=0.005)
    assert areas["blue"] == pytest.approx(SQUARE_MM2, rel=0.005)
    assert sum(areas.values()) == pytest.approx(TISSUE_MM2, rel=0.05)
    table = read_table(done.out / "slides.csv").set_index("slide")
    assert [float(table.loc["drawn", f"{name}_mm2"]) for name in CLASSES] == list(areas.values())
    assert (table.loc["glass", ["regions", "violet_mm2"]] == "").all() and table.loc["glass", "status"] == "empty"
    record = json.loads((done.folder / "record.json").read_text())
    assert record["model"].endswith("trained on colours, at 1 µm per px; validation dice 0.71 of 1.")
    assert table["weights"].tolist() == ["0" * 8] * 2
    assert record["result"]["areas_mm2"] == areas and record["scale"]["mpp"] == MPP


def test_contours_are_the_ring_with_its_hole_and_the_square(done: SimpleNamespace) -> None:
    features = json.loads((done.folder / "regions.geojson").read_text())["features"]
    assert [one["properties"]["name"] for one in features] == ["violet 1", "blue 1"]
    assert features[0]["properties"]["classification"]["name"] == "violet (model)"
    ring, square = (shape(one["geometry"]) for one in features)
    assert ring.is_valid and len(ring.interiors) == 1
    assert ring.exterior.is_ccw and not ring.interiors[0].is_ccw
    for polygon, mm2 in ((ring, RING_MM2), (square, SQUARE_MM2)):
        assert polygon.area * MPP**2 / 1e6 == pytest.approx(mm2, rel=0.005)
    centre = shapely.Point(RING[:2])
    expected = centre.buffer(RING[2], 256).difference(centre.buffer(RING[3], 256))
    assert ring.symmetric_difference(expected).area < 0.005 * expected.area
    assert square.symmetric_difference(shapely.box(*SQUARE)).area < 0.005 * square.area
    assert all(float(corner).is_integer() for corner in np.ravel(shapely.get_coordinates(ring)))
    assert features[0]["properties"]["measurements"]["Area um^2"] == pytest.approx(1e6 * RING_MM2, rel=0.005)


def test_the_label_pyramid_says_where_classes_lie(done: SimpleNamespace, slide: Path) -> None:
    path = done.folder / "labels.ome.tif"
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert series.axes == "CYX" and series.dtype == np.uint8
        levels = [level.asarray() for level in series.levels]
        xml = tiff.ome_metadata or ""
    assert [level.shape for level in levels] == [(2, 1152, 1152), (2, 576, 576), (2, 288, 288)]
    assert 'PhysicalSizeX="1.0"' in xml and "class: 0 background, 1 violet, 2 blue" in xml
    for number, level in enumerate(levels):
        side = 2 ** (number + 1)
        labels, seen = level
        for (x, y), label in {(200, 200): 0, (500, 850): 1, (850, 850): 0, (1800, 500): 2}.items():
            assert labels[y // side, x // side] == label and seen[y // side, x // side] == 1
        assert labels[10 // side, 10 // side] == seen[10 // side, 10 // side] == 0
        # The middle of each square of the first level, none between two numbers.
        step = 2**number
        np.testing.assert_array_equal(level, levels[0][:, step // 2 :: step, step // 2 :: step])
    assert is_map(path, NAMESPACE) and "violet 0.119" in label_map_words(path)
    with pytest.raises(DatasetError, match=r"drawn\.tif: lacks medsd's record"):
        label_map_words(slide)


def test_probabilities_lie_where_the_labels_do(done: SimpleNamespace) -> None:
    values = tifffile.imread(done.folder / "probabilities.ome.tif")
    labels, seen = tifffile.imread(done.folder / "labels.ome.tif")
    assert values.shape == (4, 1152, 1152) and (values[3] == seen).all()
    judged = seen > 0
    assert np.abs(values[:3].sum(axis=0, dtype=int)[judged] - 255).max() <= 2 and not values[:3, ~judged].any()
    assert (values[:3].argmax(axis=0) == labels)[judged].mean() > 0.999


def test_the_dicom_segmentation_is_the_labels(done: SimpleNamespace) -> None:
    found = highdicom.seg.segread(done.folder / "regions.dcm")
    assert [one.SegmentLabel for one in found.SegmentSequence] == ["violet (model)", "blue (model)"]
    matrix = found.get_total_pixel_matrix(combine_segments=True)
    np.testing.assert_array_equal(matrix, tifffile.imread(done.folder / "labels.ome.tif")[0])
    assert found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == pytest.approx([0.001] * 2)


def test_pages_show_areas_and_are_served(done: SimpleNamespace) -> None:
    page = (done.folder / "report.html").read_text("utf-8")
    assert "Area of violet" in page and "0.04 mm² of the slide" in page and "Slide score" not in page
    assert "<dt>Share of blue</dt>" in page and "<b>blue</b>: The share" in page
    assert "coloured: the class; uncoloured: another" in page
    index = (done.out / "index.html").read_text("utf-8")
    assert "violet, mm²" in index and f"{done.row.areas_mm2['violet']:.4f}" in index and "Verdict" not in index
    with ViewServer(done.out) as server:
        assert list(server.slides) == ["drawn"]


def test_what_is_done_is_kept_and_gathered(done: SimpleNamespace, slide: Path, monkeypatch, tmp_path: Path) -> None:
    of_colours(monkeypatch)
    before = (done.folder / "labels.ome.tif").stat().st_mtime_ns
    request = SegmentRequest(probabilities=True, dicom=True)
    (row,) = segment_slides([SlideEntry("drawn", slide)], "unused", done.out, request, "cpu", isolate=False)
    assert row == done.row and (done.folder / "labels.ome.tif").stat().st_mtime_ns == before
    copy = shutil.copytree(done.out, tmp_path / "out")
    for name in ("slides.csv", "index.html"):
        (copy / name).unlink()
    assert holds_classes(copy) and [one.slide for one in gather(Segmented(copy))] == ["drawn", "glass"]
    assert (copy / "index.html").read_text() == (done.out / "index.html").read_text()


def test_a_run_that_is_killed_goes_on(slide: Path, done: SimpleNamespace, monkeypatch, tmp_path: Path) -> None:
    of_colours(monkeypatch)
    write, names = BlockStore.write, []

    def counted(store, name, **arrays):
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(name)
        write(store, name, **arrays)

    entries = [SlideEntry("drawn", slide)]
    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "write", counted)
        with pytest.raises(KeyboardInterrupt):
            segment_slides(entries, "unused", tmp_path, None, "cpu", sharing=Sharing(gather=False), isolate=False)
    assert not (tmp_path / "drawn" / "record.json").exists() and (tmp_path / "drawn" / "blocks").is_dir()
    seen = []
    monkeypatch.setattr(
        BlockStore, "write", lambda store, name, **arrays: (seen.append(name), write(store, name, **arrays))
    )
    (row,) = segment_slides(entries, "unused", tmp_path, None, "cpu", isolate=False)
    assert not set(seen) & set(names) and row.areas_mm2 == done.row.areas_mm2
    for name in ("labels.ome.tif", "regions.geojson"):
        assert (tmp_path / "drawn" / name).read_bytes() == (done.folder / name).read_bytes()
    assert not (tmp_path / "drawn" / "blocks").exists()


def test_small_specks_are_in_areas_and_not_in_contours(array_slide) -> None:
    numbers = np.ones((300, 300), np.uint8)
    numbers[10:17, 10:17] = 2
    numbers[50:150, 50:150] = 2
    numbers[80:83, 80:83] = 1  # a hole as small
    numbers[100:140, 0:20] = 3  # at the slide's edge
    labels = SimpleNamespace(numbers=numbers, classes=CLASSES, pixels=(1, 1, 1), level0_px=2.0, mpp=1.0)
    regions = class_regions(labels, 0.5, (600, 600))
    assert [region.number for region in regions] == [1, 2]
    assert not regions[0].polygon.interiors and regions[0].polygon.bounds == (100, 100, 300, 300)
    assert regions[1].polygon.bounds == (0, 200, 40, 280)
    numbers[10:17, 10:17] = numbers[50:150, 50:150] = numbers[100:140, 0:20] = 1
    numbers[10, 10] = 2
    labels.level0_px = 0.5  # nothing is left of it at whole pixels
    assert class_regions(labels, 0.5, (150, 150)) == []


def test_contours_count_from_where_qupath_does(tmp_path: Path) -> None:
    region = ClassRegion(2, shapely.box(100, 60, 300, 200), 7.0)
    write_class_regions(tmp_path / "r.geojson", [region], CLASSES, "slide", (100, 60))
    (feature,) = json.loads((tmp_path / "r.geojson").read_text(encoding="utf-8"))["features"]
    assert shape(feature["geometry"]).bounds == (0, 0, 200, 140)
    assert feature["properties"]["name"] == "blue 1"


@pytest.mark.parametrize("side", [1.0, 1.37, 2.0])
def test_outlines_that_lie_apart_are_not_united(monkeypatch: pytest.MonkeyPatch, side: float) -> None:
    """The union of all of them at once is the answer, and takes long where there are many."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(300, 300)), 4)
    numbers = (1 + (smooth > np.quantile(smooth, 0.9))).astype(np.uint8)
    labels = SimpleNamespace(numbers=numbers, classes=CLASSES[:2], pixels=(1, 1), level0_px=side, mpp=1.0)
    union, seen, united = shapely.union_all, [], []
    monkeypatch.setattr(contours, "_BLOCK_PX", 128)
    monkeypatch.setattr(shapely, "simplify", lambda polygons, _: seen.append(polygons) or polygons)
    monkeypatch.setattr(shapely, "union_all", lambda pieces, **how: united.append(len(pieces)) or union(pieces, **how))
    dimensions = (int(300 * side),) * 2
    class_regions(labels, 0.5, dimensions)
    pieces = list(contours._pieces(labels, 1, dimensions))
    wanted = shapely.get_parts(union(pieces, grid_size=1.0))
    found = seen[0][~shapely.is_empty(seen[0])]
    assert sorted(map(str, found)) == sorted(map(str, shapely.normalize(wanted)))
    assert 0 < sum(united) < len(pieces) / 2


def test_what_cannot_be_used_is_told_in_a_line(slide: Path, done: SimpleNamespace, monkeypatch, tmp_path: Path) -> None:
    entries = [SlideEntry("drawn", slide)]
    torch.manual_seed(0)
    save_classifier(tmp_path / "c.safetensors", TileClassifier("test_resnet"), GREEN)
    with pytest.raises(WeightsError, match=r"c\.safetensors: no weights of a segmentation network"):
        segment_slides(entries, tmp_path / "c.safetensors", tmp_path / "out")
    network = SegmentationNetwork("test_resnet", CLASSES, "fpn")
    card = replace(CARD, decoder="fpn", mpp=None)
    save_segmentation(tmp_path / "images.safetensors", network, card)
    with pytest.raises(ConfigError, match=r"images\.safetensors was trained on images and does not say its scale"):
        segment_slides(entries, tmp_path / "images.safetensors", tmp_path / "out")
    save_segmentation(tmp_path / "s.safetensors", network, replace(card, mpp=1.0))
    with pytest.raises(ConfigError, match=r"network_mpp=2: .*says it itself \(1\)"):
        segment_slides(entries, tmp_path / "s.safetensors", tmp_path / "out", SegmentRequest(mpp=2.0))
    with pytest.raises(ConfigError, match=r"overlap=0\.9"):
        segment_slides(entries, tmp_path / "s.safetensors", tmp_path / "out", SegmentRequest(overlap=0.9))
    assert not (tmp_path / "out").exists()
    copy = shutil.copytree(done.folder, tmp_path / "maps" / "drawn")
    with pytest.raises(DatasetError, match="holds segmented slides, whose files would be replaced"):
        map_slides(entries, tmp_path / "s.safetensors", copy.parent)
    record = read_record(copy / "record.json")
    assert record is not None
    del record["result"]["areas_mm2"]
    rewrite_record(copy / "record.json", record)
    with pytest.raises(DatasetError, match="holds maps of slides, whose files would be replaced"):
        segment_slides(entries, tmp_path / "s.safetensors", tmp_path / "maps")
