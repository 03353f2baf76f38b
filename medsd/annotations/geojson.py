"""QuPath's GeoJSON, read and written, and the JSON of NCRF (Baidu's outlines of CAMELYON16), read.

Keys as QuPath's documentation of exported annotations and its class `QuPathTypeAdapters` have them.
"""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from shapely.affinity import translate
from shapely.geometry import MultiPolygon, Polygon, mapping

from medsd.annotations.shapes import (
    OUTLINE_TYPES,
    Annotations,
    Colour,
    Outline,
    Roles,
    annotations_in,
    checked_corner,
    one_line,
    polygon_of,
    quoted,
)
from medsd.errors import AnnotationError
from medsd.files import atomic_path, json_of

Shape = TypeVar("Shape", bound=Polygon | MultiPolygon)

_POINTS_AND_LINES = ("Point", "MultiPoint", "LineString", "MultiLineString")
_NCRF_GROUPS = {"positive": "_0", "negative": "_2"}
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "medsd.annotations")
# Where QuPath keeps what it does not know: text by name, shown with the annotation.
_KIND_KEY = "ASAP type"


def parse_json(data: bytes, path: Path, roles: Roles, qupath_origin_px: tuple[int, int] = (0, 0)) -> Annotations:
    """The annotations in the content of a JSON file; messages name `path`.

    QuPath: a FeatureCollection, a list of features (QuPath 0.2) or one feature, children among them. Annotations are
    kept; detections, cells and tiles, which QuPath computes, points and lines are left out with a warning; where tumour
    is marked by nothing else the file is refused. NCRF: `{"positive": [...], "negative": [...]}`, which get
    CAMELYON16's groups `_0` and `_2`.
    """
    try:
        content = json_of(data)
    except ValueError as error:
        raise AnnotationError(f"{path}: is not JSON ({one_line(error)}); export the annotations again") from error
    if isinstance(content, dict) and content.keys() & _NCRF_GROUPS.keys():
        return _ncrf(content, path, roles)
    outlines: list[Outline] = []
    dropped, left_out = 0, []
    for feature, where in _features(content, path):
        properties = _typed(feature, "properties", dict, where) or {}
        geometry = _typed(feature, "geometry", dict, where) or {"type": "Point"}
        if _object_type(feature, properties) != "annotation" or geometry.get("type") in _POINTS_AND_LINES:
            left_out.append(_classification(properties, where)[0])
            continue
        shape, rings_dropped = _shape(geometry, where)
        shape = moved(shape, *qupath_origin_px)
        dropped += rings_dropped
        group, group_colour = _classification(properties, where)
        excluded = roles.is_excluded(group, path)
        name = _typed(properties, "name", str, where) or ""
        metadata = properties.get("metadata")
        kind = metadata.get(_KIND_KEY) if isinstance(metadata, dict) else None
        kind = kind if kind in OUTLINE_TYPES else "Polygon"
        outlines.append(Outline(name, group, excluded, shape, _colour(properties.get("color")), group_colour, kind))
    return annotations_in(path, roles, outlines, left_out, dropped)


def write_geojson(path: str | Path, annotations: Annotations, qupath_origin_px: tuple[int, int] = (0, 0)) -> None:
    """Write outlines for QuPath (`File > Import objects from file`), atomically: level-0 pixels, closed rings.

    What was read from ASAP XML or GeoJSON comes back as it was: corners to the last digit, holes, order, names,
    classes, colours; ASAP's type of annotation is kept as metadata. An id is made from the outline and its number, so
    that writing again gives the same file. QuPath's own ids, measurements and locks are not kept.

    Args:
        path: the file; packed by gzip if its name ends in `.gz`.
        annotations: what to write.
        qupath_origin_px: the level-0 place that QuPath counts from, see `read_annotations`.

    Raises:
        OutputError: the file cannot be written.

    Example:
        >>> from medsd.annotations import read_annotations
        >>> drawn = read_annotations("slide.xml")
        >>> write_geojson("case.geojson", drawn)
        >>> read_annotations("case.geojson").tumour == drawn.tumour
        True
    """
    features = []
    for number, outline in enumerate(annotations.outlines, 1):
        identity = f"{number} {outline.name!a} {outline.group!a} {outline.shape.wkb_hex}"
        properties: dict[str, Any] = {}
        if outline.colour is not None:
            properties["color"] = list(outline.colour)
        if outline.kind != "Polygon":
            properties["metadata"] = {_KIND_KEY: outline.kind}
        object_id = uuid.uuid5(_NAMESPACE, identity)
        shape = moved(outline.shape, -qupath_origin_px[0], -qupath_origin_px[1])
        features.append(feature(shape, object_id, outline.name, outline.group, outline.group_colour, properties))
    write_features(path, features)


def feature(
    shape: Polygon | MultiPolygon,
    object_id: uuid.UUID,
    name: str,
    group: str,
    group_colour: Colour | None = None,
    properties: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One annotation as QuPath's GeoJSON has it.

    Args:
        shape: in level-0 pixels; corners stay as they are, whole ones written as integers.
        object_id: unique among the annotations of a slide.
        name: of the annotation; empty for none.
        group: QuPath's class; empty for none.
        group_colour: its red, green and blue, 0 to 255.
        properties: further ones, such as `measurements`.
    """
    described: dict[str, Any] = {"objectType": "annotation"} | ({"name": name} if name else {})
    if group and group_colour is None:
        described["classification"] = group  # QuPath reads a class without a colour as a bare name only
    elif group:
        names = group.split(": ")
        key = {"name": group} if len(names) == 1 else {"names": names}
        described["classification"] = key | {"color": list(group_colour or ())}
    properties = described | dict(properties or {})
    geometry = {"type": shape.geom_type, "coordinates": _whole(mapping(shape)["coordinates"])}
    return {"type": "Feature", "id": str(object_id), "geometry": geometry, "properties": properties}


def moved(shape: Shape, right_px: int, down_px: int) -> Shape:
    """A shape at another place; as it is where that is none."""
    if right_px == down_px == 0:
        return shape
    return cast(Shape, translate(shape, right_px, down_px))


def _whole(place: Any) -> Any:
    """Coordinates, however nested, whole ones as integers, which is shorter."""
    if isinstance(place, float):
        return int(place) if place.is_integer() else place
    return [_whole(part) for part in place]


def write_features(path: str | Path, features: Iterable[dict[str, Any]]) -> None:
    """Write a FeatureCollection atomically, one by one, packed by gzip if the file's name ends in `.gz`.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary, ExitStack() as opened:
        file: BinaryIO | gzip.GzipFile = opened.enter_context(open(temporary, "wb"))
        if Path(path).suffix == ".gz":  # no name and no time in the header: the same annotations give the same file
            file = opened.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        file.write(b'{"type":"FeatureCollection","features":[')
        for number, one in enumerate(features):
            text = json.dumps(one, allow_nan=False, separators=(",", ":"))
            file.write(f"{',' if number else ''}{text}".encode())
        file.write(b"]}\n")


def _features(content: Any, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The features of any of QuPath's exports, children after their parents, each with its place for messages."""
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list):
        raise AnnotationError(
            f"{path}: is neither a GeoJSON FeatureCollection (QuPath) nor an object with 'positive' and 'negative' "
            "(NCRF); export the annotations from QuPath as GeoJSON"
        )
    waiting = content[::-1]
    number = 0
    while waiting:
        found = waiting.pop()
        number += 1
        where = f"{path}: feature {number}"
        if not (isinstance(found, dict) and found.get("type") == "Feature"):
            raise AnnotationError(f"{where} is no GeoJSON feature; export the annotations again")
        yield found, where
        properties = _typed(found, "properties", dict, where) or {}
        waiting += (_typed(properties, "childObjects", list, where) or [])[::-1]


def _typed(holder: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, of the type it should have or None."""
    value = holder.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise AnnotationError(
        f"{where} has {key!r} of the type {type(value).__name__}, not {kind.__name__}; export the annotations again"
    )


def _object_type(feature: dict[str, Any], properties: dict[str, Any]) -> Any:
    """QuPath's type of object: annotation, detection, cell, tile; other programs name none for an annotation."""
    legacy = feature.get("id")  # QuPath 0.2 has the type there
    if isinstance(legacy, str) and legacy.startswith("Path") and legacy.endswith("Object"):
        return legacy.removeprefix("Path").removesuffix("Object").casefold()
    return properties.get("objectType") or properties.get("object_type") or "annotation"


def _classification(properties: dict[str, Any], where: str) -> tuple[str, Colour | None]:
    """A feature's class, empty for none, and the class's colour."""
    found = properties.get("classification")
    if found is None or isinstance(found, str):
        return found or "", None
    if isinstance(found, dict):
        names = found.get("names", [found.get("name", "")])
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return ": ".join(names), _colour(found.get("color", found.get("colorRGB")))
    raise AnnotationError(f"{where} has a class without a name; classify it again in QuPath")


def _colour(value: Any) -> Colour | None:
    """A colour as a list (and opacity, not kept) or, in old files, as one number; None for anything else."""
    if type(value) is int and -(2**31) <= value < 2**32:
        return (value >> 16) & 255, (value >> 8) & 255, value & 255
    if isinstance(value, list) and len(value) in (3, 4) and all(type(v) is int and 0 <= v <= 255 for v in value):
        return value[0], value[1], value[2]
    return None


def _shape(geometry: dict[str, Any], where: str) -> tuple[Polygon | MultiPolygon, int]:
    """The polygons of a GeoJSON geometry, perhaps none, and how many other rings without an area were left out."""
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        named = quoted(kind) if isinstance(kind, str) else "?"
        raise AnnotationError(f"{where} has a geometry of the type {named}; redraw it as a polygon")
    parts = [coordinates] if kind == "Polygon" else coordinates
    if not (isinstance(parts, list) and all(isinstance(part, list) for part in parts)):
        raise AnnotationError(f"{where} has no list of coordinates; export the annotations again")
    polygons: list[Polygon] = []
    dropped = 0
    for part in parts:
        shell, *holes = [_ring(ring, where) for ring in part] or [[]]
        kept = [hole for hole in holes if len(hole) >= 3]
        polygons.append(polygon_of(shell, kept))
        dropped += 0 if polygons[-1].is_empty else len(holes) - len(kept)
    drawn = [polygon for polygon in polygons if not polygon.is_empty]
    if not drawn:
        return Polygon(), max(0, len(polygons) - 1)  # one is counted where areas are made
    return (drawn[0] if len(drawn) == 1 else MultiPolygon(drawn)), dropped + len(polygons) - len(drawn)


def _ring(corners: Any, where: str) -> list[tuple[float, float]]:
    """The corners of a ring, without the one that closes it."""
    ring: list[tuple[float, float]] = []
    for corner in corners if isinstance(corners, list) else [None]:
        if not (isinstance(corner, list) and len(corner) >= 2 and all(type(v) in (int, float) for v in corner)):
            raise AnnotationError(f"{where} has a corner without numbers; redraw it")
        ring.append(checked_corner(corner[0], corner[1], where))
    return ring[:-1] if len(ring) > 1 and ring[0] == ring[-1] else ring


def _ncrf(content: dict[str, Any], path: Path, roles: Roles) -> Annotations:
    outlines: list[Outline] = []
    for key, group in _NCRF_GROUPS.items():
        for number, found in enumerate(_typed(content, key, list, f"{path}: the object") or [], 1):
            where = f"{path}: {key!r} outline {number}"
            if not (isinstance(found, dict) and isinstance(found.get("name", ""), str)):
                raise AnnotationError(f"{where} is no object with a name and vertices; convert the file again")
            shape = polygon_of(_ring(found.get("vertices"), where))
            outlines.append(Outline(found.get("name", ""), group, roles.is_excluded(group, path), shape))
    return annotations_in(path, roles, outlines, [])
