"""QuPath's GeoJSON: its conventions, what comes back, and files that are damaged on purpose."""

from __future__ import annotations

import gzip
import json
import logging
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon, box

from medsd.annotations import Annotations, Outline, annotations_of, files, read_annotations, write_geojson
from medsd.errors import AnnotationError

SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
HOLE = [[40, 40], [60, 40], [60, 60], [40, 60], [40, 40]]
TUMOUR = {"name": "Tumor", "color": [200, 0, 0]}


def feature(coordinates: Any, kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    described = {"objectType": "annotation", "classification": TUMOUR} | properties
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": described}


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def read(tmp_path: Path, content: Any, **arguments: Any) -> Annotations:
    path = tmp_path / "slide.geojson"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path, **arguments)


def test_polygon_with_hole_class_colours_and_name(tmp_path: Path) -> None:
    drawn = feature([SQUARE, HOLE], name="left node", color=[1, 2, 3], isLocked=True, measurements={"Area": 1.5})
    found = read(tmp_path, collection(drawn))
    assert found.tumour.equals(box(0, 0, 100, 100).difference(box(40, 40, 60, 60)))
    expected = Outline("left node", "Tumor", False, Polygon(SQUARE, [HOLE]), (1, 2, 3), (200, 0, 0))
    assert found.outlines == (expected,)


@pytest.mark.parametrize("wrap", [lambda f: collection(f), lambda f: [f], lambda f: f])
def test_collection_list_and_single_feature(wrap: Any, tmp_path: Path) -> None:
    assert read(tmp_path, wrap(feature([SQUARE]))).tumour.area == 100**2


@pytest.mark.parametrize(
    ("classification", "group", "colour"),
    [
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor", (200, 0, 0)),  # QuPath 0.2 and 0.3
        ({"names": ["Tumor", "Positive"], "color": [250, 62, 62]}, "Tumor: Positive", (250, 62, 62)),
        ({"name": "Metastasis", "color": [1, 2, 3, 128]}, "Metastasis", (1, 2, 3)),
        ({"name": "tumour"}, "tumour", None),
        ("TUMOR", "TUMOR", None),
        ({"name": "Tumor", "color": "red"}, "Tumor", None),
    ],
)
def test_ways_to_write_a_class(classification: Any, group: str, colour: Any, tmp_path: Path) -> None:
    (outline,) = read(tmp_path, collection(feature([SQUARE], classification=classification))).outlines
    assert (outline.group, outline.group_colour, outline.excluded) == (group, colour, False)


@pytest.mark.parametrize("name", ["Ignore*", "Exclude", "normal", "Exclusion"])
def test_excluded_classes_are_cut_out(name: str, tmp_path: Path) -> None:
    cut = feature([HOLE], classification={"name": name, "color": [0, 0, 0]})
    found = read(tmp_path, collection(cut, feature([SQUARE])))
    assert (found.tumour.area, found.excluded.area) == (100**2 - 20**2, 20**2)


def test_unknown_class_names_the_nearest_and_the_way_out(tmp_path: Path) -> None:
    content = collection(feature([SQUARE], classification="Tumr"), feature([HOLE], classification="Stroma"))
    with pytest.raises(AnnotationError, match=r"'Tumr' is unknown; did you mean 'Tumor'.*in ASAP or QuPath"):
        read(tmp_path, content)
    found = read(tmp_path, content, tumour_groups=["tumr"], excluded_groups=["Stroma"])
    assert found.tumour.area == 100**2 - 20**2
    assert read(tmp_path, collection(feature([SQUARE])), excluded_groups=["Tumor"]).tumour.is_empty
    with pytest.raises(AnnotationError, match="both"):
        read(tmp_path, content, tumour_groups=["Stroma"], excluded_groups=["stroma*"])


@pytest.mark.parametrize("classification", [None, ""])
def test_annotation_without_a_class_needs_a_word(classification: Any, tmp_path: Path) -> None:
    content = collection(feature([SQUARE], classification=classification))
    with pytest.raises(AnnotationError, match="an annotation has no group or class; give it one of"):
        read(tmp_path, content)
    assert read(tmp_path, content, tumour_groups=[""]).tumour.area == 100**2


def test_children_count_detections_points_and_lines_do_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = feature([[[x + 200, y] for x, y in SQUARE]], name="child")
    cell = feature([[[x + 400, y] for x, y in SQUARE]], objectType="cell", classification="Positive")
    parent = feature([SQUARE], name="parent", childObjects=[inner, cell])
    legacy = feature([SQUARE]) | {"id": "PathDetectionObject"}
    legacy["properties"].pop("objectType")
    line, dots = feature([[0, 0], [9, 9]], "LineString"), feature([[1, 1]], "MultiPoint", classification="Dots")
    nothing = {"type": "Feature", "geometry": None, "properties": None}
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, collection(parent, legacy, line, dots, nothing, feature([[[0, 0], [1, 1]]])))
    assert [outline.name for outline in found.outlines] == ["parent", "child"]
    assert (found.left_out, found.dropped, found.tumour.area) == (5, 1, 2 * 100**2)
    assert len(caplog.records) == 2


def test_rings_are_repaired_one_by_one_and_outlines_counted(tmp_path: Path) -> None:
    bow = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
    beyond = [[50, 50], [150, 50], [150, 90], [50, 90], [50, 50]]
    overlapping = [
        [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]],
        [[20, 10], [40, 10], [40, 30], [20, 30], [20, 10]],
    ]
    shifted = [[[x + 1000, y] for x, y in ring] for ring in (SQUARE, beyond)]
    twice = [[[x, y + 1000] for x, y in ring] for ring in (SQUARE, *overlapping)]
    found = read(tmp_path, collection(feature([bow]), feature(shifted), feature(twice), feature([HOLE])))
    assert found.repaired == 3
    # Two triangles; a hole that reaches out takes only what lies inside; what two holes share is a hole. HOLE lies
    # in the bow's triangles and, for half of it, outside of them.
    expected = 100**2 / 2 + (100**2 - 50 * 40) + (100**2 - 30 * 20)
    bow_area = found.tumour.intersection(box(0, 0, 100, 100)).area
    assert found.tumour.area - bow_area == expected - 100**2 / 2
    assert bow_area == 100**2 / 2 + 20**2 / 2


def test_islands_in_a_multipolygon(tmp_path: Path) -> None:
    island = [[45, 45], [55, 45], [55, 55], [45, 55], [45, 45]]
    found = read(tmp_path, collection(feature([[SQUARE, HOLE], [island]], "MultiPolygon")))
    assert found.tumour.area == 100**2 - 20**2 + 10**2
    assert isinstance(found.outlines[0].shape, MultiPolygon)
    (single,) = read(tmp_path, collection(feature([[SQUARE, HOLE]], "MultiPolygon"))).outlines
    assert isinstance(single.shape, Polygon)


def test_written_file_follows_qupath(tmp_path: Path) -> None:
    shape = Polygon([(0, 0), (10.5, 0), (10.5, 20)], [[(5, 2), (9, 2), (9, 5)]])
    outlines = [
        Outline("a", "Tumor", False, shape, (9, 8, 7), (200, 0, 0)),
        Outline("", "Ignore*", True, box(0, 0, 4, 4)),
        Outline("", "Ignore*", True, box(0, 0, 4, 4)),
        Outline("c", "Tumor: Positive", False, MultiPolygon([box(30, 30, 31, 31), shape]), None, (1, 1, 1)),
    ]
    write_geojson(tmp_path / "a.geojson", annotations_of(outlines))
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first, second, _, last = content["features"]
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[0, 0], [10.5, 0], [10.5, 20], [0, 0]], [[5, 2], [9, 2], [9, 5], [5, 2]]],
    }
    assert first["properties"] == {
        "objectType": "annotation",
        "name": "a",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "color": [9, 8, 7],
    }
    # QuPath's reader refuses a class as an object without a colour, and takes a bare name.
    assert second["properties"] == {"objectType": "annotation", "classification": "Ignore*"}
    assert last["properties"]["classification"] == {"names": ["Tumor", "Positive"], "color": [1, 1, 1]}
    assert last["geometry"]["type"] == "MultiPolygon"
    ids = [uuid.UUID(feature["id"]) for feature in content["features"]]
    assert len(set(ids)) == 4
    before = (tmp_path / "a.geojson").read_bytes()
    write_geojson(tmp_path / "a.geojson", read_annotations(tmp_path / "a.geojson"))
    assert (tmp_path / "a.geojson").read_bytes() == before


NUMBERS = st.floats(-1e6, 1e6) | st.integers(0, 200_000)
RINGS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=6)
COLOURS = st.none() | st.tuples(*[st.integers(0, 255)] * 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(st.text(max_size=8), st.sampled_from(["Tumor", "_1", "None", "Ignore*", "Tumor: a: b"]),
                  COLOURS, COLOURS, st.lists(st.lists(RINGS, min_size=1, max_size=3), min_size=1, max_size=3),
                  st.sampled_from(["Polygon", "Spline"])),
        max_size=4,
    ),
    suffix=st.sampled_from([".geojson", ".json", ".geojson.gz"]),
)  # fmt: skip
def test_every_outline_comes_back_to_the_last_digit(drawn: list[Any], suffix: str, tmp_path: Path) -> None:
    outlines = []
    for name, group, colour, group_colour, parts, kind in drawn:
        polygons = [Polygon(shell, holes) for shell, *holes in parts]
        shape = polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)
        outlines.append(Outline(name, group, group == "Ignore*", shape, colour, group_colour, kind))
    written = annotations_of(outlines)
    write_geojson(tmp_path / f"a{suffix}", written)
    assert read_annotations(tmp_path / f"a{suffix}").outlines == written.outlines


def test_shared_outlines_survive(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "camelyon16_annotations" / "asap_xml").glob("*.xml"))
    assert files
    for file in files:
        found = read_annotations(file)
        write_geojson(tmp_path / "a.geojson", found)
        assert read_annotations(tmp_path / "a.geojson") == found


def test_tumour_that_is_no_annotation_is_not_lost_without_a_word(tmp_path: Path) -> None:
    detection = feature([SQUARE], objectType="detection", classification="Tumor")
    with pytest.raises(AnnotationError, match=r"'Tumor' is marked by nothing that has an area .*; draw it"):
        read(tmp_path, collection(detection))
    with pytest.raises(AnnotationError, match="'Tumor' is marked by nothing"):
        read(tmp_path, collection(feature([[[0, 0], [1, 1]]], classification="Tumor")))
    assert read(tmp_path, collection(detection, feature([SQUARE], classification="Tumor"))).left_out == 1
    cell = feature([SQUARE], objectType="cell", classification="Immune cells")
    assert read(tmp_path, collection(cell)).tumour.is_empty


@pytest.mark.parametrize(
    "move",
    [lambda x, y: (x + 6000, y), lambda x, y: (4 * x, 4 * y), lambda x, y: (x, -y), lambda x, y: (y, x)],
    ids=["another slide", "another scale", "y upwards", "x and y swapped"],
)
def test_outlines_of_another_frame_are_refused(move: Any, tmp_path: Path) -> None:
    corners = [(600, 2400), (1100, 2400), (1100, 2900), (600, 2900)]
    (tmp_path / "a.geojson").write_text(json.dumps(collection(feature([corners], classification="Tumor"))))
    assert read_annotations(tmp_path / "a.geojson", (2200, 2900)).tumour.area == 500**2
    moved = collection(feature([[move(x, y) for x, y in corners]], classification="Tumor"))
    (tmp_path / "a.geojson").write_text(json.dumps(moved))
    with pytest.raises(AnnotationError, match=r"lies off the slide of 2200 x 2900; give this slide's outlines"):
        read_annotations(tmp_path / "a.geojson", (2200, 2900))


def test_ncrf(tmp_path: Path) -> None:
    content = {
        "positive": [{"name": "Annotation 0", "vertices": SQUARE[:4]}],
        "negative": [{"name": "Annotation 1", "vertices": HOLE[:4]}],
    }
    found = read(tmp_path, content)
    assert found.tumour.area == 100**2 - 20**2
    assert [(o.name, o.group, o.excluded) for o in found.outlines] == [
        ("Annotation 0", "_0", False),
        ("Annotation 1", "_2", True),
    ]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x00" * 100])
def test_other_files_are_no_annotations(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"a\.bin: no annotations known here"):
        read_annotations(tmp_path / "a.bin")


def test_content_beats_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeff" + json.dumps(collection(feature([SQUARE]))), encoding="utf-8")
    assert read_annotations(tmp_path / "a.txt").tumour.area == 100**2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b'{"type": "FeatureCollection", \xff', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
        (b'{"a":' * 50_000, "not JSON"),
        ({}, "neither a GeoJSON"),
        ({"type": "FeatureCollection"}, "neither a GeoJSON"),
        (collection(3), "feature 1 is no GeoJSON feature"),
        (collection(feature([SQUARE]), {"type": "Feature", "geometry": []}), "feature 2 has 'geometry'"),
        (collection(feature([SQUARE], "Circle")), "type 'Circle'"),
        (collection(feature([SQUARE], [[[["Polygon"]]]])), "a geometry of the type"),  # type: ignore[arg-type]
        (collection(feature(None)), "no list of coordinates"),
        (collection(feature([SQUARE], "MultiPolygon")), "without numbers"),
        (collection(feature([[[0, 0], [1, "1"], [2, 2]]])), "without numbers"),
        (collection(feature([[[0, 0], [1, True], [2, 2]]])), "without numbers"),
        (collection(feature([[[0, 0], [1, float("nan")], [2, 2]]])), "off any slide"),
        (collection(feature([[[0, 0], [1, float("inf")], [2, 2]]])), "off any slide"),
        (collection(feature([[[0, 0], [1, 10**400], [2, 2]]])), "off any slide"),
        (collection(feature([SQUARE], name=3)), "'name' of the type int"),
        (collection(feature([SQUARE], classification=3)), "feature 1 has a class without a name"),
        (collection(feature([SQUARE], classification={"name": None})), "feature 1 has a class without a name"),
        (collection(feature([SQUARE], childObjects={})), "'childObjects'"),
        ({"positive": 3}, "'positive' of the type int"),
        ({"positive": [3]}, "'positive' outline 1"),
        ({"negative": [{"name": "a"}]}, "'negative' outline 1 has a corner without numbers"),
    ],
)
def test_bad_files_are_named_in_one_line(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert words in message and "slide.geojson" in message and "\n" not in message and len(message) < 600


def test_packed_files(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps(collection(feature([SQUARE]))).encode())
    assert read(tmp_path, data).tumour.area == 100**2
    for damaged in (data[:-9], data[:40] + b"\xff" + data[41:], b"\x1f\x8b", b"\x1f\x8bxxxxxxxxxxxx"):
        with pytest.raises(AnnotationError, match="damaged gzip file"):
            read(tmp_path, damaged)


def test_large_files_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_BYTES", 2**20)
    for data in (b" " * (2**20 + 1), gzip.compress(b" " * 2**26)):
        (tmp_path / "a.geojson").write_bytes(data)
        tracemalloc.start()
        with pytest.raises(AnnotationError, match="larger than"):
            read_annotations(tmp_path / "a.geojson")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 2**23


@pytest.mark.parametrize("name", ["missing.geojson", "."])
def test_missing_file_and_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotations(tmp_path / name)


VALID = collection(
    feature([SQUARE, HOLE], name="a", color=[1, 2, 3], childObjects=[feature([HOLE], classification="Ignore*")]),
    feature([[SQUARE], [HOLE]], "MultiPolygon", classification={"names": ["Tumor", "x"], "color": [1, 2, 3]}),
    feature([1, 2], "Point", metadata={"ASAP type": "Spline"}) | {"id": "PathAnnotationObject"},
)
NCRF = {"positive": [{"name": "a", "vertices": SQUARE}], "negative": [{"name": "b", "vertices": HOLE}]}
JUNK: list[Any] = [
    None, True, 0, -1, 10**400, 1e300, float("nan"), float("-inf"), "", "Polygon", "\ud800\x00\n", [], {}, [[]], [[[]]],
    {"type": "Feature"}, [0, 0], SQUARE, json.loads("[" * 300 + "]" * 300), {"name": {}},
]  # fmt: skip


def replaced(node: Any, place: list[int], junk: Any) -> Any:
    """`node` with what lies at `place`, as far as it leads, replaced."""
    if not place or not isinstance(node, list | dict) or not node:
        return junk
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = keys[place[0] % len(keys)]
    copy = node.copy()
    copy[key] = replaced(node[key], place[1:], junk)
    return copy


def check(tmp_path: Path, content: bytes) -> None:
    try:
        found = read(tmp_path, content)
    except AnnotationError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert found.tumour.is_valid
        write_geojson(tmp_path / "b.geojson", found)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([VALID, NCRF]),
    edits=st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=9), st.sampled_from(JUNK)), min_size=1, max_size=3),
)
def test_wrong_types_parse_or_raise_annotation_error(base: Any, edits: list[Any], tmp_path: Path) -> None:
    for place, junk in edits:
        base = replaced(base, place, junk)
    check(tmp_path, json.dumps(base).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([json.dumps(VALID).encode(), json.dumps(NCRF).encode()]),
    edits=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 30), st.binary(max_size=5) | st.sampled_from(
        [b"[", b"]", b"{", b"}", b'"', b",", b"1e999", b"NaN", b"\\ud800", b"9" * 400])), min_size=1, max_size=4),
)  # fmt: skip
def test_mutated_files_parse_or_raise_annotation_error(base: bytes, edits: list[Any], tmp_path: Path) -> None:
    for place, length, replacement in edits:
        base = base[:place] + replacement + base[place + length :]
    check(tmp_path, base)
