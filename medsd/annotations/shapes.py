"""Outlines as they were drawn, and the tumour area that they make.

Everything is in level-0 pixels of the slide, x to the right, y down, origin at the top left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon

from medsd.classes import CLASSES, class_number
from medsd.errors import AnnotationError, nearest

_log = logging.getLogger(__name__)

Colour: TypeAlias = tuple[int, int, int]
Ring: TypeAlias = Sequence[tuple[float, float]]

# What CAMELYON16 (`_0`, `_1`, `Tumor`; `_2`, `Exclusion`), CAMELYON17 (`metastases`; `normal`) and users of QuPath
# write.
# `None` is ASAP's word for an outline without a group; in CAMELYON16 such outlines are tumour.
TUMOUR_GROUPS = ("_0", "_1", "Tumor", "Tumour", "Metastasis", "Metastases", "None")
EXCLUDED_GROUPS = ("_2", "Exclusion", "Exclude", "Ignore", "Normal")
OUTLINE_TYPES = ("Polygon", "Spline", "Rectangle")

# Merging takes seconds up to here, and far more than in proportion beyond; nobody draws so.
MOST_CROSSINGS = 500
MOST_OVERLAPS = 1_000_000
_AT_ONCE = 64

# No slide is 2^31 pixels wide; numbers beyond it overflow areas without a word.
LARGEST_PX = 2.0**31


@dataclass(frozen=True)
class Outline:
    """One drawn shape, as the file has it.

    Attributes:
        name: the shape's own name.
        group: ASAP's group or QuPath's class, as written (`Tumor`, `_0`); empty for none.
        excluded: whether its area is taken out of the tumour.
        shape: polygon with its holes, or several, in level-0 pixels: the corners of the file in its order, not
            repaired. A ring is closed, whether the file repeats its first corner or not.
        colour: the shape's red, green and blue, 0 to 255; None where the file names none that can be read.
        group_colour: the same of its group.
        kind: ASAP's type of annotation. Splines are taken as the polygon through their points.
    """

    name: str
    group: str
    excluded: bool
    shape: Polygon | MultiPolygon
    colour: Colour | None = None
    group_colour: Colour | None = None
    kind: str = "Polygon"


@dataclass(frozen=True)
class Annotations:
    """The annotations of one slide, in level-0 pixels.

    Attributes:
        tumour: tumour area; overlapping outlines are merged and the excluded area is cut out.
        repaired: number of outlines with rings that cross themselves or each other. A ring counts by the even-odd
            rule, and what lies in a hole's ring is not part of its outline.
        excluded: area drawn as not tumour (it may reach beyond the tumour outlines).
        dropped: number of rings without an area (fewer than three corners, or all on a line) that were left out.
        outlines: what was drawn, in the file's order. The areas above are made of them (`annotations_of`).
        left_out: number of points, lines and objects that no one drew (QuPath's detections and cells), not kept.
    """

    tumour: MultiPolygon
    repaired: int = 0
    excluded: MultiPolygon = MultiPolygon()  # noqa: RUF009 - shapely's geometries do not change
    dropped: int = 0
    outlines: tuple[Outline, ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Roles:
    """Which groups are tumour (or, of more classes, any but the first) and which are not.

    Names are compared in any case, without QuPath's `*`; a class derived from another (`Tumor: Positive`) has the role
    of its base unless it is named itself.

    Attributes:
        tumour, excluded: names of groups, before those in `TUMOUR_GROUPS` and `EXCLUDED_GROUPS`. The empty name
            stands for shapes without a class.
        classes: names of groups, too; the first is not tumour.
    """

    tumour: Sequence[str] = ()
    excluded: Sequence[str] = ()
    classes: Sequence[str] = CLASSES

    def class_of(self, group: str) -> int | None:
        """The number of the class that `group` names; None where it names none."""
        for word in (group, group.split(":")[0]):
            number = class_number(self.classes, word.strip().rstrip("*"))
            if number is not None:
                return number
        return None

    def find(self, group: str) -> bool | None:
        """Whether `group` is not tumour; None where it is unknown."""
        twice = {_folded(name) for name in self.tumour} & {_folded(name) for name in self.excluded}
        if twice:
            raise AnnotationError(f"group {min(twice)!r} is both in tumour_groups and in excluded_groups; choose one")
        own = ((self.tumour, False), (self.excluded, True))
        named = _role_of(group, own)
        if named is None and (number := self.class_of(group)) is not None:
            named = number == 0
        return _role_of(group, ((TUMOUR_GROUPS, False), (EXCLUDED_GROUPS, True))) if named is None else named

    def is_excluded(self, group: str, path: Path) -> bool:
        """Whether `group` is not tumour; AnnotationError where it is unknown, or has both roles."""
        role = self.find(group)
        if role is not None:
            return role
        tumour, excluded = (*self.tumour, *TUMOUR_GROUPS), (*self.excluded, *EXCLUDED_GROUPS)
        what = f"annotation group {quoted(group)} is unknown" if group else "an annotation has no group or class"
        if tuple(self.classes) != CLASSES:
            first, *others = self.classes
            raise AnnotationError(
                f"{path}: {what}{nearest(group, self.classes)}; give it one of {', '.join(others)}, or of {first}, "
                f"{', '.join(EXCLUDED_GROUPS)} (cut out of the others) in ASAP or QuPath"
            )
        raise AnnotationError(
            f"{path}: {what}{nearest(group, tumour + excluded)}; give it one of {', '.join(tumour)} (tumour) or "
            f"{', '.join(excluded)} (not tumour) in ASAP or QuPath"
        )


def annotations_of(
    outlines: Iterable[Outline], source: str | Path = "outlines", dropped: int = 0, left_out: int = 0
) -> Annotations:
    """The areas that outlines make; what is left out is counted and logged as a warning.

    Args:
        outlines: what was drawn.
        source: what messages name.
        dropped, left_out: how many rings and others were left out before, see `Annotations`.

    Raises:
        AnnotationError: the outlines cannot be merged; a ring crosses itself more than `MOST_CROSSINGS` times, or
            parts of outlines lie over each other's bounds more than `MOST_OVERLAPS` times.

    Example:
        >>> from shapely import box
        >>> drawn = [Outline("", "Tumor", False, box(0, 0, 20, 10)), Outline("", "Exclusion", True, box(5, 5, 9, 9))]
        >>> annotations_of(drawn).tumour.area
        184.0
    """
    kept: list[Outline] = []
    areas: dict[bool, list[MultiPolygon]] = {True: [], False: []}
    repaired = 0
    try:
        for outline in outlines:
            polygons = shapely.get_parts(outline.shape)
            _check_crossings(outline, polygons, source)
            parts = [area_of(polygon) for polygon in polygons]
            if all(part.is_empty for part in parts):
                dropped += 1
                continue
            kept.append(outline)
            areas[outline.excluded] += parts
            repaired += not all(polygon.is_valid for polygon in polygons)
        _check_overlaps([*areas[True], *areas[False]], source)
        excluded = only_polygons(shapely.union_all(areas[True]))
        tumour = only_polygons(shapely.difference(shapely.union_all(areas[False]), excluded))
    except shapely.errors.GEOSException as error:
        raise AnnotationError(f"{source}: outlines cannot be merged ({one_line(error)}); redraw them") from error
    if left_out:
        _log.warning("%s: %d points, lines and computed objects are no outlines and are left out", source, left_out)
    if dropped:
        _log.warning("%s: %d rings have no area (fewer than three corners or a line), left out", source, dropped)
    return Annotations(tumour, repaired, excluded, dropped, tuple(kept), left_out)


def annotations_in(
    path: Path, roles: Roles, outlines: Sequence[Outline], left_out: Sequence[str], dropped: int = 0
) -> Annotations:
    """`annotations_of` a file; `left_out` are the groups of what is no outline there, empty for none.

    Raises:
        AnnotationError: tumour is marked, but by nothing that has an area: the slide would count as one without it.
    """
    found = annotations_of(outlines, path, dropped, len(left_out))
    marked = [group for group in left_out if group and roles.find(group) is False]
    marked += [outline.group for outline in outlines if not outline.excluded]
    if marked and all(outline.excluded for outline in found.outlines):
        raise AnnotationError(
            f"{path}: {quoted(marked[0])} is marked by nothing that has an area (points, lines, rings of fewer than "
            "three corners, computed objects); draw it as annotations with an area in ASAP or QuPath, or delete the "
            "marks"
        )
    return found


def area_of(polygon: Polygon) -> MultiPolygon:
    """The valid area of a drawn polygon: its outer ring less its holes, each ring by the even-odd rule."""
    if polygon.is_valid:
        return only_polygons(polygon)
    # Ring by ring: shapely's repair of the whole would fill what two holes share, and add what a hole has outside.
    shell, *holes = (only_polygons(shapely.make_valid(Polygon(ring))) for ring in shapely.get_rings(polygon))
    return only_polygons(shapely.difference(shell, shapely.union_all(holes)))


def _check_crossings(outline: Outline, polygons: npt.NDArray[np.object_], source: str | Path) -> None:
    for ring in shapely.get_rings(polygons[~shapely.is_valid(polygons)]):
        corners = shapely.get_coordinates(ring)
        sides = shapely.linestrings(np.stack([corners[:-1], corners[1:]], axis=1))
        tree, found = shapely.STRtree(sides), 0
        for some in np.array_split(sides, -(-len(sides) // _AT_ONCE)):
            found += len(tree.query(some, predicate="crosses")[0])
            if found > 2 * MOST_CROSSINGS:  # each is found from both sides
                raise AnnotationError(
                    f"{source}: outline {quoted(outline.name)} crosses itself over {MOST_CROSSINGS} times; redraw it"
                )


def _check_overlaps(areas: list[MultiPolygon], source: str | Path) -> None:
    tree, found = shapely.STRtree(areas), 0
    for some in np.array_split(np.array(areas, object), -(-len(areas) // _AT_ONCE) or 1):
        found += len(tree.query(some)[0]) - len(some)
        if found > 2 * MOST_OVERLAPS:
            raise AnnotationError(
                f"{source}: {len(areas)} outlines lie over each other over {MOST_OVERLAPS:,} times; merge them"
            )


def only_polygons(geometry: Any) -> MultiPolygon:
    """The polygons of any geometry: repairs and cuts leave lines and points behind, which have no area."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return MultiPolygon([part for part in parts if isinstance(part, Polygon) and part.area > 0])


def polygon_of(shell: Ring, holes: Sequence[Ring] = ()) -> Polygon:
    """The polygon of a ring with holes; an empty one where the ring has fewer than three corners."""
    return Polygon(shell, holes) if len(shell) >= 3 else Polygon()


def checked_corner(x: float, y: float, where: str) -> tuple[float, float]:
    """A corner from a file; `where` begins the message if it lies off any slide."""
    if not (abs(x) < LARGEST_PX and abs(y) < LARGEST_PX):  # nor is NaN
        raise AnnotationError(f"{where} has a corner off any slide, {quoted(f'{x}, {y}')}; redraw it")
    return float(x), float(y)


def one_line(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split())[:200]


def quoted(text: str) -> str:
    """A name from a file, fit for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _role_of(group: str, sides: Iterable[tuple[Sequence[str], bool]]) -> bool | None:
    roles = {_folded(name): excluded for names, excluded in sides for name in names}
    return roles.get(_folded(group), roles.get(_folded(group.split(":")[0])))


def _folded(group: str) -> str:
    return group.strip().rstrip("*").casefold()
