"""What is written for ASAP: nothing lost that its files can hold, and the same area where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import shapely
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon, box

from medsd.annotations import (
    Annotations,
    Outline,
    annotations_of,
    read_annotations,
    write_asap_xml,
    write_geojson,
)
from medsd.errors import AnnotationError


def there_and_back(outlines: list[Outline], tmp_path: Path) -> tuple[Annotations, Annotations]:
    written = annotations_of(outlines)
    write_asap_xml(tmp_path / "a.xml", written)
    return written, read_annotations(tmp_path / "a.xml")


def difference_px2(a: Annotations, b: Annotations) -> float:
    return float(a.tumour.symmetric_difference(b.tumour).area)


def test_shared_files_come_back_through_both_formats(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "camelyon16_annotations" / "asap_xml").glob("*.xml"))
    assert len(files) >= 4
    for file in files:
        write_geojson(tmp_path / "a.geojson", read_annotations(file))
        write_asap_xml(tmp_path / "a.xml", read_annotations(tmp_path / "a.geojson"))
        real, written = (ElementTree.parse(path).getroot() for path in (file, tmp_path / "a.xml"))
        used = {annotation.get("PartOfGroup") for annotation in real.iter("Annotation")}
        groups = real.find("AnnotationGroups")
        assert groups is not None
        for group in [group for group in groups if group.get("Name") not in used]:
            groups.remove(group)  # groups without an outline are not kept
        assert [e.attrib for e in written.iter()] == [e.attrib for e in real.iter()]


def test_ncrf_and_its_xml_are_the_same(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "camelyon16_annotations"
    for file in sorted((folder / "asap_xml").glob("*.xml")):
        from_json = read_annotations(folder / "json" / f"{file.stem.capitalize()}.json")
        write_asap_xml(tmp_path / "a.xml", from_json)
        real, back = read_annotations(file), read_annotations(tmp_path / "a.xml")
        drawn = [(o.group, o.excluded, o.shape) for o in real.outlines]  # NCRF has names of its own
        assert [(o.group, o.excluded, o.shape) for o in back.outlines] == drawn
        assert difference_px2(real, back) == 0


NUMBERS = st.floats(-1e6, 1e6) | st.integers(0, 200_000)
RINGS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=7)
XML_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn", "Cc"], include_characters="\n\t\r"))
COLOURS = st.none() | st.tuples(*[st.integers(0, 255)] * 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(XML_TEXT, st.sampled_from(["_0", "Tumor", "None", "_2"]), RINGS, COLOURS,
                  st.sampled_from(["Polygon", "Spline", "Rectangle"])),
        max_size=5,
    ),
    colours=st.lists(COLOURS, min_size=4, max_size=4),
)  # fmt: skip
def test_outlines_without_holes_survive_xml_geojson_xml(drawn: list[Any], colours: list[Any], tmp_path: Path) -> None:
    group_colours = dict(zip(["_0", "Tumor", "_2"], colours, strict=False))
    outlines = [
        Outline(name, group, group == "_2", Polygon(ring), colour, group_colours.get(group), kind)
        for name, group, ring, colour, kind in drawn
    ]
    written, back = there_and_back(outlines, tmp_path)
    assert (back.outlines, back.tumour, back.repaired) == (written.outlines, written.tumour, written.repaired)
    write_geojson(tmp_path / "a.geojson", back)
    write_asap_xml(tmp_path / "b.xml", read_annotations(tmp_path / "a.geojson"))
    assert (tmp_path / "b.xml").read_bytes() == (tmp_path / "a.xml").read_bytes()


def test_a_hole_becomes_an_exclusion(tmp_path: Path) -> None:
    shape = Polygon(box(0, 0, 100, 100).exterior, [box(10, 10, 20, 20).exterior, box(40, 40, 60, 60).exterior])
    written, back = there_and_back([Outline("a", "Tumor", False, shape, (1, 2, 3))], tmp_path)
    assert back.tumour.equals(written.tumour)
    assert [(o.name, o.group, o.excluded) for o in back.outlines] == [
        ("a", "Tumor", False),
        ("a hole 1", "Exclusion", True),
        ("a hole 2", "Exclusion", True),
    ]
    listed = [group.get("Name") for group in ElementTree.parse(tmp_path / "a.xml").iter("Group")]
    assert listed == ["Tumor", "Exclusion"]


def test_tumour_in_a_hole_is_not_taken_out(tmp_path: Path) -> None:
    ring = Polygon(box(0, 0, 100, 100).exterior, [box(20, 20, 80, 80).exterior])
    island = Polygon(box(40, 40, 60, 60).exterior, [box(45, 45, 55, 55).exterior])
    for outlines in (
        [Outline("a", "Tumor", False, ring), Outline("b", "Tumor", False, island)],
        [Outline("both", "Tumor", False, MultiPolygon([ring, island]))],
    ):
        written, back = there_and_back(outlines, tmp_path)
        assert written.tumour.area == 100**2 - 60**2 + 20**2 - 10**2
        assert difference_px2(written, back) == 0


def test_excluded_outline_with_a_hole(tmp_path: Path) -> None:
    ring = Polygon(box(20, 20, 80, 80).exterior, [box(40, 40, 60, 60).exterior])
    written, back = there_and_back(
        [Outline("a", "Tumor", False, box(0, 0, 100, 100)), Outline("b", "Ignore*", True, ring)], tmp_path
    )
    assert written.tumour.area == 100**2 - 60**2 + 20**2
    assert difference_px2(written, back) == 0
    off_tumour = Polygon(box(200, 200, 280, 280).exterior, [box(240, 240, 260, 260).exterior])
    written, back = there_and_back([Outline("b", "Ignore*", True, off_tumour)], tmp_path)
    assert back.excluded.equals(written.excluded)


CORNERS = st.tuples(st.integers(0, 14), st.integers(0, 14))
ANY_RING = st.lists(CORNERS, min_size=3, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(st.booleans(), st.lists(st.lists(ANY_RING, min_size=1, max_size=3), min_size=1, max_size=2)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_area_stays_whatever_is_drawn(drawn: list[Any], tmp_path: Path) -> None:
    outlines = []
    for excluded, parts in drawn:
        shape = MultiPolygon([Polygon(shell, holes) for shell, *holes in parts])
        outlines.append(Outline("", "_2" if excluded else "_0", excluded, shape))
    written, back = there_and_back(outlines, tmp_path)
    assume(not written.tumour.is_empty)
    assert difference_px2(written, back) < 1e-6
    write_geojson(tmp_path / "a.geojson", back)
    again = read_annotations(tmp_path / "a.geojson")
    assert difference_px2(written, again) < 1e-6


def test_corners_are_taken_in_asaps_order(tmp_path: Path) -> None:
    corners = "".join(
        f'<Coordinate Order="{order}" X="{x}" Y="{y}"/>' for order, x, y in [(2, 9, 9), (0, 0, 0), (3, 0, 9), (1, 9, 0)]
    )
    annotation = (
        f'<Annotation Name="" Type="Polygon" PartOfGroup="_0"><Coordinates>{corners}</Coordinates></Annotation>'
    )
    (tmp_path / "a.xml").write_text(f"<ASAP_Annotations><Annotations>{annotation}</Annotations></ASAP_Annotations>")
    found = read_annotations(tmp_path / "a.xml")
    assert (found.tumour.area, found.repaired) == (81, 0)


def test_own_groups_need_their_role_again(tmp_path: Path) -> None:
    outlines = [Outline("", "Stroma", True, box(0, 0, 5, 5)), Outline("", "", False, box(0, 0, 10, 10))]
    write_asap_xml(tmp_path / "a.xml", annotations_of(outlines))
    with pytest.raises(AnnotationError, match="in ASAP or QuPath"):
        read_annotations(tmp_path / "a.xml")
    assert read_annotations(tmp_path / "a.xml", tumour_groups=[""], excluded_groups=["stroma"]).tumour.area == 75


@pytest.mark.parametrize("name", ["a\x00", "\ud800", "\x1b[0m", "\ufffe"])
def test_names_that_xml_cannot_hold(name: str, tmp_path: Path) -> None:
    for outline in (Outline(name, "_0", False, box(0, 0, 1, 1)), Outline("", name, False, box(0, 0, 1, 1))):
        with pytest.raises(AnnotationError, match="XML cannot hold the name"):
            write_asap_xml(tmp_path / "a.xml", annotations_of([outline]))
    assert list(tmp_path.iterdir()) == []


def test_huge_nesting_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<ASAP_Annotations>" + "<a>" * 200_000 + "</a>" * 200_000 + "</ASAP_Annotations>")
    assert read_annotations(tmp_path / "a.xml").tumour.is_empty


def test_many_holes_are_cut_quickly(tmp_path: Path) -> None:
    holes = [box(x, y, x + 4, y + 4).exterior for x in range(2, 300, 10) for y in range(2, 300, 10)]
    outlines = [
        Outline("a", "Tumor", False, Polygon(box(0, 0, 302, 302).exterior, holes)),
        Outline("b", "Tumor", False, box(12, 12, 13, 13)),
    ]
    written, back = there_and_back(outlines, tmp_path)
    assert difference_px2(written, back) < 1e-6
    assert shapely.area(back.tumour) == pytest.approx(302**2 - 900 * 16 + 1)
