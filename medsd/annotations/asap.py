"""ASAP's XML files (CAMELYON16, CAMELYON17), read and written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, ParseError

import shapely
from defusedxml.ElementTree import fromstring
from shapely.geometry import Polygon

from medsd.annotations.areas import halves
from medsd.annotations.shapes import (
    OUTLINE_TYPES,
    Annotations,
    Colour,
    Outline,
    Roles,
    annotations_in,
    area_of,
    checked_corner,
    one_line,
    polygon_of,
    quoted,
)
from medsd.errors import AnnotationError, nearest
from medsd.files import write_text

POINT_TYPES = ("Dot", "PointSet", "Measurement")
HOLE_GROUP = "Exclusion"

# Rounding leaves such slivers where tumour fills a hole to its edge.
_NO_AREA_PX2 = 1e-6
_COLOUR = re.compile(r"#([0-9a-fA-F]{6})")
# What XML 1.0 cannot hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse_asap_xml(data: bytes, path: Path, roles: Roles) -> Annotations:
    """The outlines in the content of an ASAP XML file; messages name `path`.

    Groups are those of CAMELYON16 and CAMELYON17, and `None`, ASAP's word for an outline without a group. Splines are
    taken as the polygon through their points. Dots, point sets and measurements have no area and are left out with a
    warning; where tumour is marked by nothing else the file is refused. A file without any mark is valid: the slide has
    no tumour. Groups without an outline, and groups of groups, are not kept.
    """
    try:
        root = fromstring(data)
    # ValueError: entities (defusedxml) and broken encodings; LookupError: encodings Python does not know.
    except (ParseError, ValueError, LookupError) as error:
        raise AnnotationError(
            f"{path}: is not plain XML ({one_line(error)}); save the annotations again from ASAP"
        ) from error
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(
            f"{path}: root is {quoted(root.tag)}, not 'ASAP_Annotations'; give an XML file saved by ASAP"
        )
    colours = {group.get("Name"): _colour(group) for group in root.iterfind("AnnotationGroups/Group")}
    outlines: list[Outline] = []
    points: list[str] = []
    for annotation in root.iter("Annotation"):
        kind, name, group = (annotation.get(key, "") for key in ("Type", "Name", "PartOfGroup"))
        if kind in POINT_TYPES:
            # A ruler that nobody gave a group marks no tumour.
            points.append("" if (kind, group) == ("Measurement", "None") else group)
            continue
        excluded = roles.is_excluded(group, path)
        if kind not in OUTLINE_TYPES:
            known = OUTLINE_TYPES + POINT_TYPES
            raise AnnotationError(
                f"{path}: annotation type {quoted(kind)} is unknown{nearest(kind, known)}; redraw it in ASAP as one of "
                f"{', '.join(known)}"
            )
        shape = polygon_of(_ring(annotation, f"{path}: annotation {quoted(name)}"))
        outlines.append(Outline(name, group, excluded, shape, _colour(annotation), colours.get(group), kind))
    return annotations_in(path, roles, outlines, points)


def write_asap_xml(path: str | Path, annotations: Annotations) -> None:
    """Write outlines as ASAP XML, atomically; reading them back gives the same tumour area.

    What was read from ASAP XML comes back as it was: corners to the last digit, order, names, groups, types, colours.
    ASAP has neither holes nor shapes of several parts. Parts become outlines of one name. A hole becomes an outline of
    the group `Exclusion`; where other tumour lies in the hole, which that would take out, and in excluded
    outlines, the outline is cut into parts without holes instead. Groups of no common name need the
    arguments `tumour_groups` or `excluded_groups` again when the file is read.

    Args:
        path: the XML file.
        annotations: what to write.

    Raises:
        AnnotationError: a name has a character that XML cannot hold.
        OutputError: the file cannot be written.
    """
    root = Element("ASAP_Annotations")
    drawn = ElementTree.SubElement(root, "Annotations")
    groups: dict[str, Colour | None] = {}
    for outline in annotations.outlines:
        for part in _without_holes(outline, annotations):
            _add(drawn, part, Path(path))
            # ASAP refuses files with groups that are not listed; `None` is not one.
            if part.group != "None":
                groups[part.group] = groups.get(part.group) or part.group_colour
    listed = ElementTree.SubElement(root, "AnnotationGroups")
    for name, colour in groups.items():
        attributes = {"Name": name, "PartOfGroup": "None"} | _colour_attribute(colour)
        ElementTree.SubElement(ElementTree.SubElement(listed, "Group", attributes), "Attributes")
    ElementTree.indent(root, "\t")
    write_text(path, '<?xml version="1.0"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n")


def _ring(annotation: Element, where: str) -> list[tuple[float, float]]:
    """The corners of one outline, in the order that ASAP draws them."""
    corners: list[tuple[int, tuple[float, float]]] = []
    for coordinate in annotation.iter("Coordinate"):
        try:
            x, y = float(coordinate.get("X", "")), float(coordinate.get("Y", ""))
            order = int(coordinate.get("Order", len(corners)))
        except ValueError as error:
            raise AnnotationError(f"{where} has a corner without numbers; redraw it") from error
        corners.append((order, checked_corner(x, y, where)))
    if not corners:
        raise AnnotationError(f"{where} has no coordinates; delete or redraw it in ASAP")
    return [corner for _, corner in sorted(corners, key=lambda item: item[0])]


def _colour(element: Element) -> Colour | None:
    match = _COLOUR.fullmatch(element.get("Color", ""))
    if match is None:
        return None
    red, green, blue = bytes.fromhex(match[1])
    return red, green, blue


def _colour_attribute(colour: Colour | None) -> dict[str, str]:
    return {} if colour is None else {"Color": "#" + bytes(colour).hex().upper()}


def _without_holes(outline: Outline, annotations: Annotations) -> Iterator[Outline]:
    """Outlines of one ring each that make the same tumour area together with all others."""
    for polygon in shapely.get_parts(outline.shape):
        holes = [Polygon(ring) for ring in polygon.interiors]
        filled = [shapely.intersection(area_of(hole), annotations.tumour).area > _NO_AREA_PX2 for hole in holes]
        if holes and (outline.excluded or any(filled)):
            whole = replace(outline, kind="Polygon")
            yield from (replace(whole, shape=part) for area in area_of(polygon).geoms for part in _cut(area))
            continue
        yield replace(outline, shape=Polygon(polygon.exterior))
        for number, hole in enumerate(holes, 1):
            yield Outline(f"{outline.name} hole {number}", HOLE_GROUP, True, hole, outline.colour)


def _cut(polygon: Polygon) -> Iterator[Polygon]:
    """Parts without holes: cut through the middle hole until there is none."""
    left = [polygon]
    while left:
        part = left.pop()
        if not part.interiors:
            yield part
            continue
        hole = part.interiors[len(part.interiors) // 2].bounds
        left += [piece for half in halves(part, (hole[0] + hole[2]) / 2, along_x=True) for piece in half.geoms]


def _add(parent: Element, outline: Outline, path: Path) -> None:
    for text in (outline.name, outline.group):
        if _NOT_XML.search(text):
            raise AnnotationError(f"{path}: XML cannot hold the name {quoted(text)}; rename it before writing")
    attributes = {"Name": outline.name, "Type": outline.kind, "PartOfGroup": outline.group}
    annotation = ElementTree.SubElement(parent, "Annotation", attributes | _colour_attribute(outline.colour))
    coordinates = ElementTree.SubElement(annotation, "Coordinates")
    for order, (x, y, *_) in enumerate(outline.shape.exterior.coords[:-1]):
        # The shortest digits that are read as the same number; whole ones as ASAP writes them.
        digits = [str(int(value)) if value.is_integer() else repr(value) for value in (x, y)]
        ElementTree.SubElement(coordinates, "Coordinate", {"Order": str(order), "X": digits[0], "Y": digits[1]})
