"""Phantom slides: the same from the same seed, tumour by its nuclei and not by its colour, files as scanners' are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import shapely
import tifffile
from defusedxml.ElementTree import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata

from medsd.annotations import read_annotations
from medsd.errors import ConfigError, DatasetError, OutputError
from medsd.phantom import Phantom, PhantomSpec, draw_phantom, write_phantom, write_phantom_dataset
from medsd.phantom.files import write_pyramid
from medsd.phantom.shapes import Grid, draw_lesions, draw_node

Floats = npt.NDArray[np.float64]
TILE_PX = 192  # 96 um at 0.5 um/px
SIZE_PX = 1536


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney)."""
    ranks, yes = rankdata(scores), int(positive.sum())
    return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * (positive.size - yes)))


def tile_means(field: npt.NDArray[np.generic]) -> Floats:
    """Means over tiles that overlap by half, (tiles, ...), of a field (size, size, ...)."""
    half, blocks = TILE_PX // 2, 2 * SIZE_PX // TILE_PX
    mean = field.reshape(blocks, half, blocks, half, *field.shape[2:]).mean(axis=(1, 3), dtype=np.float64)
    tiles = (mean[:-1, :-1] + mean[1:, :-1] + mean[:-1, 1:] + mean[1:, 1:]) / 4
    return np.asarray(tiles.reshape(-1, *field.shape[2:]))


class Tiles:
    """Tiles of slides that lie in tissue: mean RGB, a measure of nuclear size, tumour or not, the slide's number."""

    def __init__(self, slides: list[Phantom]) -> None:
        rows = []
        for number, slide in enumerate(slides):
            grey = slide.image.astype(np.float32) @ np.full(3, 1 / 3, np.float32)
            fine, middle, coarse = (gaussian_filter(grey, sigma, truncate=3) for sigma in (2.0, 4.0, 8.0))
            # Energy of blobs of about 6 um over that of about 3 um: grows with the nuclei.
            size = tile_means((middle - coarse) ** 2) / tile_means((fine - middle) ** 2)
            share = tile_means(slide.mask)
            chosen = (tile_means(slide.image[..., 1] > 215) < 0.1) & ((share == 0) | (share > 0.5))
            columns = (tile_means(slide.image), size[:, None], share[:, None] > 0.5, np.full((len(size), 1), number))
            rows.append(np.hstack(columns)[chosen])
        table = np.vstack(rows)
        self.colour, self.size = table[:, :3], table[:, 3]
        self.tumour, self.slide = table[:, 4] > 0, table[:, 5]


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    return Tiles([draw_phantom(PhantomSpec(seed, True, SIZE_PX)) for seed in range(4)])


def discriminant(colour: Floats, tumour: npt.NDArray[np.bool_]) -> Floats:
    """Fisher's direction for two classes."""
    groups = [colour[tumour], colour[~tumour]]
    scatter = sum((len(group) - 1) * np.cov(group.T) for group in groups)
    return np.asarray(np.linalg.solve(np.asarray(scatter), groups[0].mean(axis=0) - groups[1].mean(axis=0)))


def test_mean_colour_does_not_tell_tumour(tiles: Tiles) -> None:
    assert tiles.tumour.sum() > 70 < (~tiles.tumour).sum()
    for channel in range(3):
        single = auc(tiles.colour[:, channel], tiles.tumour)
        assert max(single, 1 - single) <= 0.65
    halves = []
    for fitted in (tiles.slide % 2 == 0, tiles.slide % 2 == 1):
        direction = discriminant(tiles.colour[fitted], tiles.tumour[fitted])
        halves.append(auc(tiles.colour[~fitted] @ direction, tiles.tumour[~fitted]))
    assert 0.45 <= np.mean(halves) <= 0.65, halves


def test_nuclei_tell_tumour(tiles: Tiles) -> None:
    assert auc(tiles.size, tiles.tumour) > 0.9


def test_at_difficulty_1_nuclei_are_alike() -> None:
    alike = Tiles([draw_phantom(PhantomSpec(seed, True, SIZE_PX, difficulty=1.0)) for seed in range(2)])
    assert 0.3 < auc(alike.size, alike.tumour) < 0.7


def test_a_slide_follows_from_its_specification() -> None:
    spec = PhantomSpec(11, True, 600)
    first, again, other = draw_phantom(spec), draw_phantom(spec), draw_phantom(replace(spec, seed=12))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.image.shape == (600, 600, 3)
    assert first.image.dtype == np.uint8
    assert np.mean(first.image != other.image) > 0.3


@pytest.fixture(scope="module")
def drawn() -> Phantom:
    return draw_phantom(PhantomSpec(5, True, 1100))


def test_a_normal_slide_has_no_tumour_and_else_the_same_node(drawn: Phantom) -> None:
    normal, tumour = draw_phantom(PhantomSpec(5, False, 1100)), drawn
    assert normal.polygons == ()
    assert not normal.mask.any()
    assert tumour.mask.any()
    change = tumour.image.astype(np.float32) - normal.image
    assert np.abs(change).mean() > 10  # other nuclei everywhere
    blurred = gaussian_filter(change, (40, 40, 0), truncate=2)
    assert np.abs(blurred[tumour.mask == 1].mean(axis=0)).max() < 1.5  # in the same colour
    assert np.abs(blurred).max() < 12


@pytest.mark.parametrize(("size_px", "mpp"), [(512, 2.0), (513, 0.5), (1000, 1.0)])
def test_any_size_and_scale(size_px: int, mpp: float) -> None:
    slide = draw_phantom(PhantomSpec(1, True, size_px, mpp))
    assert slide.image.shape == (size_px, size_px, 3)
    assert slide.mask.shape == (size_px, size_px)
    glass = np.mean(slide.image.min(axis=2) > 215)
    assert 0.3 < glass < 0.65


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), size_px=st.sampled_from([512, 1536, 4096]))
def test_anatomy_is_as_promised(seed: int, size_px: int) -> None:
    node = draw_node(np.random.default_rng(seed), size_px)
    outlines = draw_lesions(np.random.default_rng([seed, 1]), node, size_px, 10)
    whole, lesions = node.outline(), [shapely.Polygon(outline) for outline in outlines]
    assert 0.45 <= whole.area / size_px**2 <= 0.65
    assert shapely.box(0, 0, size_px, size_px).contains(whole)
    assert 1 <= len(lesions) <= 4
    assert all(lesion.is_valid for lesion in lesions)
    assert 0.10 <= sum(lesion.area for lesion in lesions) / whole.area <= 0.35
    for lesion in lesions:
        assert 0.1 <= 2 * np.sqrt(lesion.area / np.pi) / size_px <= 0.44
        assert whole.contains(lesion)


def test_mask_is_the_polygons(drawn: Phantom) -> None:
    slide = drawn
    assert set(np.unique(slide.mask)) == {0, 1}
    area = shapely.MultiPolygon([shapely.Polygon(polygon) for polygon in slide.polygons])
    x, y = np.meshgrid(np.arange(1100) + 0.5, np.arange(1100) + 0.5)
    away = shapely.distance(area.boundary, shapely.points(x[::3, ::3], y[::3, ::3])) > 1e-6
    np.testing.assert_array_equal(
        slide.mask[::3, ::3].astype(bool)[away], shapely.contains_xy(area, x[::3, ::3], y[::3, ::3])[away]
    )
    assert abs(float(slide.mask.sum()) - area.area) < 0.002 * area.area


def test_fields_are_brought_to_pixels_linearly() -> None:
    grid = Grid(100, 0.5)
    x, y = grid.centres_px()
    plane = (2 * x + 3 * y).astype(np.float32)
    up = grid.upsample(plane, 20, 60)
    at_x, at_y = np.arange(20, 60) + 0.5, np.arange(20, 60) + 0.5
    np.testing.assert_allclose(up[:, 20:60], 2 * at_x[None, :] + 3 * at_y[:, None], rtol=1e-5)


@pytest.mark.parametrize("cue", ["tint", "ink"])
def test_shortcut_lies_on_the_whole_slide(cue: str) -> None:
    plain, cued = (
        draw_phantom(PhantomSpec(3, False, 1024, shortcut=name)).image.astype(np.float32)  # type: ignore[arg-type]
        for name in ("none", cue)
    )
    blocks = np.abs(plain - cued).mean(axis=2).reshape(4, 256, 4, 256).mean(axis=(1, 3))
    assert np.mean(blocks > 4) > 0.6


@pytest.mark.parametrize(("factor", "mpp", "sides"), [(2, 0.5, [1100, 550, 275]), (4, 0.243, [1100, 275])])
def test_openslide_reads_the_levels(drawn: Phantom, tmp_path: Path, factor: int, mpp: float, sides: list[int]) -> None:
    write_pyramid(tmp_path / "s.tif", drawn.image, mpp, factor)
    write_pyramid(tmp_path / "m.tif", drawn.mask, mpp, factor)
    for name, level0 in (("s.tif", drawn.image), ("m.tif", np.repeat(drawn.mask[..., None], 3, axis=2))):
        with openslide.OpenSlide(tmp_path / name) as slide:
            assert slide.properties["openslide.vendor"] == "generic-tiff"
            assert slide.level_dimensions == tuple((side, side) for side in sides)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-4)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-4)
            read = np.asarray(slide.read_region((0, 0), 0, (1100, 1100)).convert("RGB")).astype(int)
            assert np.abs(read - level0).mean() < (6 if name == "s.tif" else 1e-9)
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        lowest = file.pages[len(sides) - 1].asarray()
    step = 1100 // sides[-1]
    means = (
        drawn.mask[: step * sides[-1], : step * sides[-1]].reshape(sides[-1], step, sides[-1], step).mean(axis=(1, 3))
    )
    assert set(np.unique(lowest)) == {0, 1}
    assert np.all(lowest[means > 0.8] == 1)
    assert np.all(lowest[means < 0.2] == 0)


def skeleton(element: Element) -> set[tuple[str, frozenset[str], str]]:
    """Tags with their attributes' names and their parents."""
    return {(child.tag, frozenset(child.attrib), parent.tag) for parent in element.iter() for child in parent}


def test_annotations_are_the_polygons_in_camelyons_words(tmp_path: Path) -> None:
    spec = PhantomSpec(6, True, 512)
    write_phantom(spec, tmp_path / "s.tif", tmp_path / "s.xml")
    root = parse(tmp_path / "s.xml").getroot()
    polygons = draw_phantom(spec).polygons
    found = root.findall("Annotations/Annotation")
    assert len(found) == len(polygons)
    for annotation, polygon in zip(found, polygons, strict=True):
        assert (annotation.get("Type"), annotation.get("PartOfGroup")) == ("Polygon", "_0")
        corners = [(float(c.get("X", "")), float(c.get("Y", ""))) for c in annotation.iter("Coordinate")]
        np.testing.assert_array_equal(corners, polygon)
        assert [c.get("Order") for c in annotation.iter("Coordinate")] == [str(i) for i in range(len(polygon))]
    assert [group.get("Name") for group in root.findall("AnnotationGroups/Group")] == ["_0"]
    read = read_annotations(tmp_path / "s.xml")
    expected = shapely.MultiPolygon([shapely.Polygon(polygon) for polygon in polygons])
    assert read.tumour.symmetric_difference(expected).area < 1e-6
    assert read.repaired == 0


def test_annotations_have_the_shape_of_real_ones(tmp_path: Path, shared_data: Path) -> None:
    write_phantom(PhantomSpec(6, True, 512), tmp_path / "s.tif", tmp_path / "s.xml")
    real = parse(shared_data / "camelyon16_annotations" / "asap_xml" / "tumor_001.xml").getroot()
    assert skeleton(parse(tmp_path / "s.xml").getroot()) == skeleton(real)


LAYOUT = {
    "phantom.json",
    "training/normal/normal_001.tif",
    "training/tumor/tumor_001.tif",
    "training/tumor/tumor_002.tif",
    "training/lesion_annotations/tumor_001.xml",
    "training/lesion_annotations/tumor_002.xml",
    "testing/images/test_001.tif",
    "testing/images/test_002.tif",
    "testing/lesion_annotations/test_001.xml",
    "testing/reference.csv",
    "masks/tumor_001_mask.tif",
    "masks/tumor_002_mask.tif",
    "masks/test_001_mask.tif",
}


def files(folder: Path) -> dict[str, int]:
    """The files of a folder and when each was written."""
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_dataset_is_made_once_and_mended(tmp_path: Path) -> None:
    def make() -> Path:
        return write_phantom_dataset(tmp_path / "set", slides=5, size_px=512, seed=1)

    folder = make()
    made = files(folder)
    assert set(made) == LAYOUT
    with open(folder / "testing/reference.csv", newline="") as handle:
        assert list(csv.reader(handle)) == [["slide", "label"], ["test_001", "tumor"], ["test_002", "normal"]]
    contents = {(folder / name).read_bytes() for name in made if name.endswith(".tif") and "mask" not in name}
    assert len(contents) == 5  # no slide twice
    make()
    assert files(folder) == made
    lost = "training/tumor/tumor_002.tif"
    before = (folder / lost).read_bytes()
    (folder / lost).unlink()
    (folder / "training" / ".77-killed.tif").touch()
    make()
    changed = {name for name, when in files(folder).items() if made.get(name, when) != when}
    assert changed == {lost, "training/lesion_annotations/tumor_002.xml", "masks/tumor_002_mask.tif"}
    assert (folder / lost).read_bytes() == before


def test_pyramids_of_both_factors_in_both_classes_and_parts(written: Callable[..., dict[str, PhantomSpec]]) -> None:
    specs = written(slides=12)
    for part, tumour in (("training", True), ("training", False), ("testing", True), ("testing", False)):
        chosen = {spec.pyramid_factor for name, spec in specs.items() if part in name and spec.tumour is tumour}
        assert chosen == {2, 4}
    assert len({spec.seed for spec in specs.values()}) == 12


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, PhantomSpec]]:
    """Makes a data set without drawing: the specification of every slide by its path."""
    specs: dict[str, PhantomSpec] = {}

    def note(spec: PhantomSpec, slide: Path, *_: Path) -> None:
        specs[slide.relative_to(tmp_path).as_posix()] = spec

    def make(**options: int | str) -> dict[str, PhantomSpec]:
        write_phantom_dataset(tmp_path, **options)  # type: ignore[arg-type]
        return specs

    monkeypatch.setattr("medsd.phantom.slides.write_phantom", note)
    return make


def test_shortcut_goes_with_the_label_and_is_swapped(written: Callable[..., dict[str, PhantomSpec]]) -> None:
    for name, spec in written(slides=10, shortcut="ink").items():
        cued = spec.tumour if name.startswith("training") else not spec.tumour
        assert spec.shortcut == ("ink" if cued else "none")


@pytest.mark.parametrize(("slides", "testing"), [(4, 2), (6, 2), (10, 4), (23, 10)])
def test_shares_of_a_dataset(written: Callable[..., dict[str, PhantomSpec]], slides: int, testing: int) -> None:
    specs = written(slides=slides)
    tests = [spec.tumour for name, spec in specs.items() if name.startswith("testing")]
    train = [spec.tumour for name, spec in specs.items() if name.startswith("training")]
    assert (len(tests), sum(tests)) == (testing, testing // 2)
    assert (len(train), sum(train)) == (slides - testing, -(-(slides - testing) // 2))


def test_dataset_refuses_what_is_not_its_own(tmp_path: Path, written: Callable[..., dict[str, PhantomSpec]]) -> None:
    written(slides=4)
    with pytest.raises(DatasetError, match=r"of another difficulty, seed \(see phantom\.json\).*delete"):
        written(slides=4, seed=9, difficulty=0.5)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DatasetError, match=r"notes\.txt.*delete"):
        written(slides=4)
    for damaged in ("{", "[]", '{"parameters": 1}'):
        (tmp_path / "phantom.json").write_text(damaged)
        with pytest.raises(DatasetError, match=r"phantom\.json: says nothing of phantom slides"):
            written(slides=4)
    (tmp_path / "phantom.json").unlink()
    with pytest.raises(DatasetError, match="no phantom data set"):
        written(slides=4)
    with pytest.raises(DatasetError, match="is a file"):
        write_phantom_dataset(tmp_path / "notes.txt", slides=4)


def test_record_holds_the_parameters(tmp_path: Path, written: Callable[..., dict[str, PhantomSpec]]) -> None:
    written(slides=4, seed=3, shortcut="tint")
    record = json.loads((tmp_path / "phantom.json").read_text())
    assert record["format"] >= 1
    assert record["parameters"] == {
        "slides": 4, "seed": 3, "size_px": 4096, "mpp": 0.5, "difficulty": 0.3, "shortcut": "tint"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("size_px", 511),
        ("size_px", 16385),
        ("mpp", 0.0),
        ("mpp", float("nan")),
        ("difficulty", 1.01),
        ("pyramid_factor", 3),
        ("shortcut", "smell"),
    ],
)
def test_bad_parameters_are_named_with_their_range(name: str, value: object) -> None:
    good = {"seed": 1, "tumour": True}
    with pytest.raises(ConfigError, match=rf"^{name}=[^\n]*: (must be|use one of) [^\n]*$"):
        PhantomSpec(**{**good, name: value})  # type: ignore[arg-type]


def test_fewer_than_four_slides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slides=3: must be a whole number from 4 to 999"):
        write_phantom_dataset(tmp_path / "set", slides=3)
    assert not (tmp_path / "set").exists()


def test_a_slide_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile.TiffWriter, "write", full_disk)
    with pytest.raises(OutputError, match=r"s\.tif.*No space"):
        write_phantom(PhantomSpec(1, True, 512), tmp_path / "s.tif", tmp_path / "s.xml")
    assert [p.name for p in tmp_path.iterdir()] == ["s.xml"]
