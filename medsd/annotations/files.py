"""Annotations of any format: what is in a file is found out by its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medsd.annotations.asap import parse_asap_xml
from medsd.annotations.geojson import parse_json
from medsd.annotations.mask import read_mask
from medsd.annotations.shapes import (
    Annotations,
    Roles,
    read_bounded,
)
from medsd.errors import AnnotationError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_annotations(
    path: str | Path,
    slide_size_px: tuple[int, int] | None = None,
    tumour_groups: Sequence[str] = (),
    excluded_groups: Sequence[str] = (),
    tumour_values: Sequence[int] = (),
) -> Annotations:
    """Read the annotations of one slide from a file of any known format, chosen by its content.

    ASAP XML (CAMELYON), GeoJSON of QuPath, JSON of NCRF, each also packed by gzip, and masks in TIFF files.

    Args:
        path: the file.
        slide_size_px: width and height of the slide at level 0, which masks need.
        tumour_groups, excluded_groups: names of groups (ASAP) or classes (QuPath) that are tumour or not, besides
            `TUMOUR_GROUPS` and `EXCLUDED_GROUPS`; the empty name stands for annotations without a class.
        tumour_values: values of a mask that are tumour; without them 1, or 255.

    Raises:
        AnnotationError: the file cannot be read as annotations; see `read_asap_xml`, `parse_json` and `read_mask`.
    """
    path = Path(path)
    roles = Roles(tumour_groups, excluded_groups)
    if _start(path) in _TIFF:
        if slide_size_px is None:
            raise AnnotationError(f"{path}: a mask can have any resolution; give slide_size_px, the slide's size")
        return read_mask(path, slide_size_px, tumour_values)
    data = read_bounded(path)
    first = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if first == b"<" or ".xml" in suffixes:
        return parse_asap_xml(data, path, roles)
    if first in (b"{", b"[") or ".json" in suffixes or ".geojson" in suffixes:
        return parse_json(data, path, roles)
    raise AnnotationError(f"{path}: no annotations known here; give ASAP XML, GeoJSON of QuPath or a mask as TIFF")


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read(4)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); check the path") from error
