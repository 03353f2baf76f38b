"""Annotations of any format: what is in a file is found out by its content."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from shapely import box

from medsd.annotations.asap import parse_asap_xml
from medsd.annotations.geojson import parse_json
from medsd.annotations.mask import parse_mask
from medsd.annotations.shapes import Annotations, Roles, one_line
from medsd.classes import CLASSES
from medsd.errors import AnnotationError
from medsd.slides.readers.tiff_layout import is_tiff

# Parsing takes several times the file's size in memory; the largest annotation files of CAMELYON are below 20 MB.
LARGEST_BYTES = 2**30


def read_annotations(
    path: str | Path,
    slide_size_px: tuple[int, int] | None = None,
    tumour_groups: Sequence[str] = (),
    excluded_groups: Sequence[str] = (),
    tumour_values: Sequence[int] = (),
    qupath_origin_px: tuple[int, int] = (0, 0),
    classes: Sequence[str] = CLASSES,
) -> Annotations:
    """Read the annotations of one slide from a file of any known format, chosen by its content.

    ASAP XML (CAMELYON), GeoJSON of QuPath, JSON of NCRF, each also packed by gzip, and masks in TIFF files. What each
    format's outlines become, and what is left out: `parse_asap_xml`, `parse_json`, `parse_mask`.

    Args:
        path: the file.
        slide_size_px: width and height of the slide at level 0, which masks need; with it, outlines of another slide
            or scale, which lie off this one, are refused.
        tumour_groups, excluded_groups: names of groups (ASAP) or classes (QuPath) that are tumour or not, in any case,
            besides `TUMOUR_GROUPS` and `EXCLUDED_GROUPS`; the empty name stands for annotations without a class.
        tumour_values: values of a mask that are tumour; without them 1, or 255.
        qupath_origin_px: the level-0 place that QuPath counts from: the corner of `Slide.bounds`, which it crops to.
            The other formats count from the slide's.
        classes: names of groups, too: all but the first make up the tumour's area.

    Raises:
        AnnotationError: the file is missing, too large, damaged, of no known format, declares entities, has an unknown
            group or type, an outline without coordinates, coordinates that are no level-0 pixels, or tumour that is
            marked by nothing that has an area; a mask does not fit the slide, or has values that may mean anything.

    Example:
        >>> found = read_annotations("slide.xml")
        >>> {outline.group for outline in found.outlines}, found.tumour.area > 0
        ({'_0'}, True)
    """
    path = Path(path)
    roles = Roles(tumour_groups, excluded_groups, classes)
    start, data = _content(path)
    if is_tiff(start):
        if slide_size_px is None:
            raise AnnotationError(f"{path}: a mask can have any resolution; give slide_size_px, the slide's size")
        return parse_mask(path, slide_size_px, tumour_values)
    first = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if first == b"<" or ".xml" in suffixes:
        found = parse_asap_xml(data, path, roles)
    elif first in (b"{", b"[") or suffixes & {".json", ".geojson"}:
        found = parse_json(data, path, roles, qupath_origin_px)
    else:
        raise AnnotationError(f"{path}: no annotations known here; give ASAP XML, GeoJSON of QuPath or a mask as TIFF")
    if slide_size_px is not None and not found.tumour.is_empty:
        _check_on_slide(found, path, slide_size_px)
    return found


def _content(path: Path) -> tuple[bytes, bytes]:
    """The first four bytes of a file, and all of it, unpacked; of a TIFF nothing more."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(4)
            handle.seek(0)
            packed = start.startswith(b"\x1f\x8b")
            data = b""
            if not is_tiff(start):
                with gzip.GzipFile(fileobj=handle) if packed else handle as content:
                    data = content.read(LARGEST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AnnotationError(f"{path}: damaged gzip file ({one_line(error)}); save it again") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(data) > LARGEST_BYTES:
        raise AnnotationError(f"{path}: larger than {LARGEST_BYTES / 2**30:g} GiB, no slide's annotations; split it")
    return start, data


def _check_on_slide(found: Annotations, path: Path, size_px: tuple[int, int]) -> None:
    """Outlines of another slide or scale lie off this one."""
    on_slide = found.tumour.intersection(box(0, 0, *size_px)).area
    if on_slide < found.tumour.area / 2:
        left, top, right, bottom = (round(bound) for bound in found.tumour.bounds)
        raise AnnotationError(
            f"{path}: most of what is outlined, x {left} to {right} and y {top} to {bottom}, lies off the slide of "
            f"{size_px[0]} x {size_px[1]}; give this slide's outlines in level-0 pixels, y downwards"
        )
