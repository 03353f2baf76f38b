"""ASAP files against the JSON they come from, CAMELYON16's labelled points, and figures done by hand."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon, box

from medsd.annotations import (
    Annotations,
    areas,
    rasterise,
    read_annotations,
    tumour_share,
)
from medsd.annotations.mask import mask_polygons
from medsd.errors import AnnotationError

SQUARE = [(0, 0), (100, 0), (100, 100), (0, 100)]


def asap(*outlines: tuple[str, str, list[tuple[float, float]]]) -> str:
    """An ASAP file with outlines of (group, type, corners)."""
    annotations = ""
    for index, (group, kind, ring) in enumerate(outlines):
        corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(ring))
        annotations += (
            f'<Annotation Name="A {index}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{corners}</Coordinates></Annotation>"
        )
    return f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{annotations}</Annotations></ASAP_Annotations>'


def read(tmp_path: Path, text: str | bytes) -> Annotations:
    path = tmp_path / "slide.xml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_annotations(path)


def of(*polygons: Polygon) -> Annotations:
    return Annotations(MultiPolygon(polygons), 0, MultiPolygon())


def even_odd(rings: list[Any], x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which points lie in any of the rings, each by the even-odd rule; written without shapely."""
    inside = np.zeros(len(x), bool)
    for ring in rings:
        x0, y0 = np.asarray(ring, float).T
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = (x1 - x0) * (y[:, None] - y0) / (y1 - y0) + x0
        crosses = ((y0 > y[:, None]) != (y1 > y[:, None])) & (x[:, None] < crossing)
        inside |= crosses.sum(axis=1) % 2 == 1
    return inside


def contains(annotations: Annotations, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which points lie in the tumour, by shapely.

    A point on an outline belongs to what lies right of it, on a horizontal one to what lies below: the rule of
    `rasterise`, and of the program that sampled the labelled points of CAMELYON16 (NCRF).
    """
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    tumour = annotations.tumour
    inside = np.array(shapely.contains_xy(tumour, x, y), np.bool_)
    edge = shapely.intersects_xy(tumour, x, y) & ~inside
    # Beside the outline: right, and much less down, in pixels.
    inside[edge] = shapely.contains_xy(tumour, x[edge] + 2.0**-12, y[edge] + 2.0**-24)
    return inside


def test_shared_xml_equals_json(shared_data: Path) -> None:
    files = sorted((shared_data / "camelyon16_annotations" / "asap_xml").glob("*.xml"))
    assert len(files) >= 4
    for file in files:
        outlines = json.loads((file.parents[1] / "json" / f"{file.stem.capitalize()}.json").read_text())
        found = read_annotations(file)
        drawn = {key: [shapely.make_valid(Polygon(o["vertices"])) for o in outlines[key]] for key in outlines}
        excluded = shapely.union_all(drawn["negative"])
        expected = shapely.union_all(drawn["positive"]).difference(excluded)
        assert expected.area > 0
        assert found.tumour.symmetric_difference(expected).area == 0, file.name
        assert found.excluded.symmetric_difference(excluded).area == 0, file.name


@pytest.fixture(scope="module")
def slides(shared_data: Path) -> dict[str, Annotations]:
    """The outlines of the 37 shared slides."""
    files = sorted((shared_data / "camelyon16_annotations" / "json").glob("*.json"))
    return {file.stem: read_annotations(file) for file in files}


def test_all_26396_camelyon_points_lie_on_the_right_side(shared_data: Path, slides: dict[str, Annotations]) -> None:
    """Three of them lie on an outline; the rule for these is the one of the program that chose the points."""
    folder = shared_data / "camelyon16_annotations"
    points: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    for name, label in (("tumor_valid_coords.csv", True), ("normal_valid_coords.csv", False)):
        for slide, x, y in csv.reader((folder / name).read_text().splitlines()):
            points.setdefault((slide, label), []).append((int(x), int(y)))
    assert sum(len(places) for places in points.values()) == 26_396
    on_outline = 0
    for (slide, label), places in points.items():
        found = slides[slide]
        x, y = np.array(places, float).T
        assert (contains(found, x, y) == label).all(), (slide, label)
        on_outline += int((shapely.distance(found.tumour.boundary, shapely.points(x, y)) == 0).sum())
    assert on_outline == 3


def test_counts_of_the_shared_slides(shared_data: Path, slides: dict[str, Annotations]) -> None:
    """Polygons, holes, corners and areas as the folder's index has them (which was counted without this code)."""
    folder = shared_data / "camelyon16_annotations"
    with open(folder / "index.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 37
    for row in rows:
        found = slides[row["slide"]]
        tumour = [outline for outline in found.outlines if not outline.excluded]
        assert len(tumour) == int(row["positive_polygons"])
        assert len(found.outlines) - len(tumour) == int(row["negative_polygons"])
        drawn_px2 = sum(outline.shape.area for outline in tumour)
        assert drawn_px2 == pytest.approx(float(row["positive_area_px2_level0"]), abs=1), row["slide"]
        if tumour:  # the other slides' rings repeat their first corner, which is not kept
            assert sum(len(o.shape.exterior.coords) - 1 for o in found.outlines) == int(row["vertices"])


@settings(max_examples=40, deadline=None)
@given(corners=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=3, max_size=8))
def test_pixel_centres_contained_are_the_raster(corners: list[tuple[int, int]]) -> None:
    # Many centres lie on edges. Crossing rings are left out: their repair puts corners at rounded places.
    drawn = Polygon(corners)
    found = of(drawn if drawn.is_valid else drawn.convex_hull.buffer(0))
    x, y = np.meshgrid(np.arange(12) + 0.5, np.arange(12) + 0.5)
    assert (contains(found, x.ravel(), y.ravel()).reshape(12, 12) == rasterise(found, 12, 12, 1.0)).all()


def test_every_shared_slide_agrees_with_an_even_odd_count(shared_data: Path, slides: dict[str, Annotations]) -> None:
    """Random points in and around each outline; single outlines are compared, since outlines may overlap."""
    rng = np.random.default_rng(0)
    tested = 0
    for file in sorted((shared_data / "camelyon16_annotations" / "json").glob("Tumor_0*.json")):
        outlines = json.loads(file.read_text())
        positive = [o["vertices"] for o in outlines["positive"]]
        negative = [o["vertices"] for o in outlines["negative"]]
        found = slides[file.stem]
        corners = np.concatenate([np.asarray(r, float) for r in positive])
        x, y = (corners[rng.integers(len(corners), size=100)] + rng.normal(0, 300, (100, 2)) + 0.123).T
        expected = even_odd(positive, x, y) & ~even_odd(negative, x, y)
        assert (shapely.intersects_xy(found.tumour, x, y) == expected).all(), file.name
        tested += len(x)
    assert tested >= 1000


@pytest.mark.parametrize("group", ["_0", "_1", "Tumor", "metastases", "None", "TUMOR"])
@pytest.mark.parametrize("kind", ["Polygon", "Spline", "Rectangle"])
def test_tumour_groups_and_types(group: str, kind: str, tmp_path: Path) -> None:
    assert read(tmp_path, asap((group, kind, SQUARE))).tumour.equals(box(0, 0, 100, 100))


@pytest.mark.parametrize("group", ["_2", "Exclusion", "normal"])
def test_excluded_groups_are_cut_out_whatever_the_order(group: str, tmp_path: Path) -> None:
    hole = [(50, 50), (150, 50), (150, 150), (50, 150)]
    found = read(tmp_path, asap((group, "Polygon", hole), ("_0", "Polygon", SQUARE)))
    assert found.tumour.area == 100**2 - 50**2
    assert found.excluded.equals(box(50, 50, 150, 150))


def test_overlapping_outlines_count_once(tmp_path: Path) -> None:
    shifted = [(x + 50, y) for x, y in SQUARE]
    assert read(tmp_path, asap(("_0", "Polygon", SQUARE), ("_1", "Polygon", shifted))).tumour.area == 150 * 100


def test_crossing_ring_is_repaired_and_counted(tmp_path: Path) -> None:
    bow = [(0, 0), (100, 100), (100, 0), (0, 100)]
    found = read(tmp_path, asap(("_0", "Polygon", bow), ("_0", "Polygon", [(x + 500, y) for x, y in SQUARE])))
    assert found.repaired == 1
    assert found.tumour.is_valid
    assert found.tumour.area == 100**2 / 2 + 100**2


def test_dots_and_short_rings_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = asap(
        ("_0", "Dot", [(1, 1)]), ("nobody", "PointSet", [(1, 1), (2, 2)]), ("_0", "Polygon", [(1, 1), (5, 5)]),
        ("_0", "Polygon", SQUARE),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, text)
    assert (found.tumour.area, found.dropped, found.repaired) == (100**2, 1, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(("group", "kind"), [("Tumor", "PointSet"), ("None", "Dot"), ("_0", "Polygon")])
def test_tumour_that_is_marked_without_an_area_is_refused(group: str, kind: str, tmp_path: Path) -> None:
    marks = (group, kind, [(1, 1), (2, 2)]), ("Exclusion", "Polygon", SQUARE)
    with pytest.raises(AnnotationError, match=rf"slide\.xml: '{group}' is marked by nothing .*; draw it"):
        read(tmp_path, asap(*marks))


def test_dots_and_rulers_that_mark_no_tumour_leave_a_slide_without_it(tmp_path: Path) -> None:
    found = read(tmp_path, asap(("Normal", "Dot", [(1, 1)]), ("None", "Measurement", [(1, 1), (9, 9)])))
    assert found.tumour.is_empty and found.left_out == 2


def test_file_without_outlines_is_a_slide_without_tumour(tmp_path: Path) -> None:
    found = read(tmp_path, asap())
    assert found.tumour.is_empty and found.excluded.is_empty
    assert tumour_share(found, [0, 5], [0, 5], 10).tolist() == [0, 0]
    assert not rasterise(found, 4, 3, 1.0).any()


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<ASAP_Annotations>&b;</ASAP_Annotations>"
)
OUTSIDE = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    "<ASAP_Annotations>&a;</ASAP_Annotations>"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not plain XML"),
        ("<ASAP_Annotations>", "not plain XML"),
        (b"\xff\xfe\x00garbage", "not plain XML"),
        ('<?xml version="1.0" encoding="none-such"?><ASAP_Annotations/>', "not plain XML"),
        (BOMB, "not plain XML"),
        (OUTSIDE, "not plain XML"),
        ("<html/>", "'html'"),
        (asap(("_0", "Polygon", [])), "no coordinates"),
        (asap(("_0", "Polygon", [(0, 0), (float("nan"), 1), (2, 2)])), "off any slide"),
        (asap(("_0", "Polygon", [(0, 0), (float("inf"), 1), (2, 2)])), "off any slide"),
        (asap(("_0", "Polygon", [(0, 0), (1e300, 1), (2, 2)])), "off any slide"),
        (asap(("_0", "Polygon", SQUARE)).replace('X="100"', ""), "without numbers"),
        (asap(("_0", "Polygon", SQUARE)).replace('X="100"', 'X="1O0"'), "without numbers"),
        (asap(("_0", "Poligon", SQUARE)), "did you mean 'Polygon'"),
        (asap(("Tumr", "Polygon", SQUARE)), "did you mean 'Tumor'"),
    ],
)
def test_bad_files_are_named_in_one_line(content: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert words in message and "slide.xml" in message and "\n" not in message


def test_unknown_group_lists_the_known_ones(tmp_path: Path) -> None:
    known = "_0, _1, Tumor, .*Metastases, None .*_2, Exclusion, .*Normal"
    with pytest.raises(AnnotationError, match=r"'lymph\\nnode'.*" + known):
        read(tmp_path, asap(("lymph&#10;node", "Polygon", SQUARE)))


@pytest.mark.parametrize("name", ["missing.xml", "."])
def test_missing_file_and_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotations(tmp_path / name)


HOLE = [(20, 20), (40, 20), (40, 40)]
VALID = asap(("_0", "Polygon", SQUARE), ("_2", "Spline", HOLE), ("_1", "Dot", [(1, 1)])).encode()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 40), st.binary(max_size=6) | st.sampled_from(
            [b"9", b"-", b".", b"e9", b"nan", b'"', b"<", b"&a;", b"_2", b"999999999999"])),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_mutated_files_parse_or_raise_annotation_error(edits: list[tuple[int, int, bytes]], tmp_path: Path) -> None:
    content = VALID
    for place, length, replacement in edits:
        content = content[:place] + replacement + content[place + length :]
    try:
        found = read(tmp_path, content)
    except AnnotationError as error:
        assert "\n" not in str(error)
    else:
        assert found.tumour.is_valid


def test_share_by_hand() -> None:
    found = of(Polygon(SQUARE, [[(40, 40), (60, 40), (60, 60), (40, 60)]]))
    #         inside, half out to the left, corner, a quarter lost to the hole, in the hole, touching, far away
    x = [5, -10, 90, 30, 45, 100, 500]
    y = [5, 5, 90, 30, 45, 0, 500]
    side = [20, 20, 20, 20, 10, 20, 20]
    expected = [1, 0.5, 0.25, 0.75, 0, 0, 0]
    for left, top, side_px, share in zip(x, y, side, expected, strict=True):
        assert tumour_share(found, [left], [top], side_px).tolist() == [share]


def test_share_of_no_tiles() -> None:
    assert tumour_share(of(Polygon(SQUARE)), [], [], 10).shape == (0,)


def wavy(corners: int, seed: int) -> Polygon:
    """A star-shaped polygon with many corners and a hole."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = 20_000 * (1 + 0.2 * np.sin(7 * angle) + 0.02 * np.random.default_rng(seed).standard_normal(corners))
    ring = np.column_stack([30_000 + radius * np.cos(angle), 30_000 + radius * np.sin(angle)])
    return Polygon(ring, [30_000 + (ring - 30_000) * 0.3])


def test_share_equals_plain_intersection() -> None:
    polygon = wavy(2000, 1)
    x, y = np.random.default_rng(0).uniform(0, 60_000, (2, 300))
    expected = [polygon.intersection(box(a, b, a + 2048, b + 2048)).area / 2048**2 for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(tumour_share(of(polygon), x, y, 2048), expected, atol=1e-9)
    assert {0.0, 1.0} < set(np.round(expected, 9))


def test_share_along_pixel_edges_equals_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts run along edges and through corners here; every tile's share is a count of mask pixels."""
    monkeypatch.setattr(areas, "_PIECE_VERTICES", 8)
    for seed in range(6):
        mask = np.random.default_rng(seed).random((32, 32)) < 0.3 + seed / 15
        found = of(*mask_polygons(mask))
        y, x = np.mgrid[0:32:4, 0:32:4].reshape(2, -1)
        expected = mask.reshape(8, 4, 8, 4).mean(axis=(1, 3)).ravel()
        np.testing.assert_allclose(tumour_share(found, x, y, 4), expected, atol=1e-12)


def test_shares_of_25_600_tiles_add_up() -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(160) * 380, np.arange(160) * 380))
    found = of(wavy(8000, 2))
    share = tumour_share(found, x, y, 448)
    # Tiles of 380 px would add up to the area; these overlap, each place being covered (448 / 380)^2 times on average.
    assert share.sum() * 380**2 == pytest.approx(found.tumour.area, rel=1e-3)


def test_raster_by_hand() -> None:
    found = of(Polygon([(10, 10), (40, 10), (40, 30), (10, 30)], [[(20, 15), (30, 15), (30, 25), (20, 25)]]))
    expected = np.array([[letter == "#" for letter in row] for row in ["......", ".#.#..", ".###..", "......"]])
    # Centres are at 5, 15, 25 ...; the hole's upper edge at 15 takes the centre (25, 15) out, its lower edge at 25 not.
    assert (rasterise(found, 6, 4, 10.0) == expected).all()


@settings(max_examples=60, deadline=None)
@given(
    corners=st.lists(st.tuples(st.integers(-20, 60), st.integers(-20, 60)), min_size=3, max_size=9),
    level0_px=st.sampled_from([1.0, 2.5, 3.7]),
)
def test_raster_equals_centres_inside(corners: list[tuple[int, int]], level0_px: float) -> None:
    # Corners at thirds of a pixel: no centre lies on an edge by chance of whole numbers alone.
    polygon = shapely.make_valid(Polygon([(x + 1 / 3, y + 1 / 7) for x, y in corners]))
    parts = [p for p in shapely.get_parts(shapely.get_parts(polygon)) if isinstance(p, Polygon)]
    width, height = 13, 17
    x, y = np.meshgrid((np.arange(width) + 0.5) * level0_px, (np.arange(height) + 0.5) * level0_px)
    area = MultiPolygon(parts)
    near_edge = shapely.distance(area.boundary, shapely.points(x, y)) < 1e-6 if parts else np.zeros(x.shape, bool)
    same = rasterise(of(*parts), width, height, level0_px) == shapely.contains_xy(area, x, y)
    assert (same | near_edge).all()


def test_raster_area_approaches_the_polygon() -> None:
    found = of(wavy(3000, 3))
    mask = rasterise(found, 1500, 1500, 40.0)
    assert mask.sum() * 40.0**2 == pytest.approx(found.tumour.area, rel=2e-3)


def test_outlines_that_would_take_minutes_are_refused(tmp_path: Path) -> None:
    corners = [tuple(corner) for corner in np.random.default_rng(0).uniform(0, 1e4, (300, 2)).tolist()]
    with pytest.raises(AnnotationError, match=r"slide.xml: outline 'A 0' crosses itself over 500 times; redraw"):
        read(tmp_path, asap(("Tumor", "Polygon", corners)))
    with pytest.raises(AnnotationError, match=r"slide.xml: 1500 outlines lie over each other over 1,000,000 times"):
        read(tmp_path, asap(*[("Tumor", "Polygon", SQUARE)] * 1500))
