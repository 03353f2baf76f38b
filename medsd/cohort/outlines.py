"""What was outlined on a slide, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from medsd.annotations import Annotations, Outline, annotations_of, rasterise, read_annotations
from medsd.annotations.shapes import Roles, quoted
from medsd.classes import CLASSES
from medsd.cohort.entry import SlideEntry
from medsd.errors import AnnotationError

Outlines = Mapping[int, Annotations]
"""Areas by the number of their class, of classes that are outlined; `Annotations.tumour` is the class's area."""


def read_outlines(
    entry: SlideEntry,
    slide_size_px: tuple[int, int],
    qupath_origin_px: tuple[int, int],
    classes: Sequence[str] = CLASSES,
) -> Outlines | None:
    """The outlines of a slide, whose groups (ASAP) or classes (QuPath) name classes; None where it has no file of them.

    What is outlined as the first class, or excluded, is cut out of the others. An outline that names none (CAMELYON's
    `_0`, ASAP's `None`, `Tumor` where no class is called so, a mask) is of the only other class, or, of several, of the
    slide's own label. Where areas of two classes overlap, the place is in both.

    Args:
        entry: the slide.
        slide_size_px, qupath_origin_px: see `read_annotations`.
        classes: their names, that of normal tissue first.

    Raises:
        AnnotationError: see `read_annotations`; an outline is of no class, or anything but the first class is outlined
            on a slide of that label.
    """
    if entry.annotation is None:
        return None
    roles = Roles(classes=classes)
    found = read_annotations(entry.annotation, slide_size_px, qupath_origin_px=qupath_origin_px, classes=classes)
    drawn: dict[int, list[Outline]] = {}
    for outline in found.outlines:
        number = roles.class_of(outline.group)
        if not outline.excluded or number == 0:
            drawn.setdefault(_number(number, outline, entry, classes), []).append(outline)
    excluded = [outline for outline in found.outlines if outline.excluded]
    areas: dict[int, Annotations] = {}
    for number, outlines in sorted(drawn.items()):
        if number == 0:
            areas[0] = annotations_of([replace(one, excluded=False) for one in outlines], entry.annotation)
        else:
            alone = len(drawn.keys() - {0}) == 1
            areas[number] = found if alone else annotations_of([*outlines, *excluded], entry.annotation)
    areas = {number: area for number, area in areas.items() if not area.tumour.is_empty}
    if entry.label == 0 and (others := areas.keys() - {0}):
        raise AnnotationError(
            f"{entry.annotation}: outlines {classes[min(others)]} on a slide that is labelled {classes[0]}; "
            "correct either"
        )
    return areas


def _number(named: int | None, outline: Outline, entry: SlideEntry, classes: Sequence[str]) -> int:
    if named is not None:
        return named
    if len(classes) == 2:
        return 1
    if entry.label:
        return entry.label
    what = f"outline {quoted(outline.name)} of group {quoted(outline.group)}"
    raise AnnotationError(
        f"{entry.annotation}: {what} names none of the classes {', '.join(classes[1:])}; name one there, or give the "
        "slide a label"
    )


def holds(entry: SlideEntry, outlines: Outlines | None, target: int) -> bool:
    """Whether a slide is one with the class: by its label, or because it is outlined there."""
    return entry.label == target or (outlines is not None and target in outlines)


def known_in_full(entry: SlideEntry, outlines: Outlines | None) -> bool:
    """Whether what is not outlined on a slide is of the first class: all else is outlined, or nothing else is there."""
    without = entry.label == 0 or (entry.label is None and outlines is not None)
    return entry.exhaustive and (without or any(outlines or ()))


def raster(outlines: Outlines | None, number: int, shape: tuple[int, int], level0_px: float) -> npt.NDArray[np.bool_]:
    """A class's area as a mask (height, width), see `rasterise`; nothing where it is not outlined."""
    if outlines is None or number not in outlines:
        return np.zeros(shape, np.bool_)
    return rasterise(outlines[number], shape[1], shape[0], level0_px)
