"""Slide-level maps as pyramidal OME-TIFF: values, not colours.

Layout after the OME-TIFF 6 specification (levels in SubIFDs), as read by QuPath, Bio-Formats, OMERO, tifffile and
tiatoolbox. The frame is that of the slide's level 0 as OpenSlide counts it, the whole canvas also where QuPath shows a
part of it: what is empty is packed to nearly nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
import numpy.typing as npt
import tifffile
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from medsd import RESEARCH_USE_ONLY
from medsd.errors import DatasetError
from medsd.files import atomic_path, json_of, printable
from medsd.heatmap.value_map import ValueMap
from medsd.slides.readers.damage import DAMAGED

TILE_PX = 256
NAMESPACE = "medsd/value_map"
SEEN = "seen"
"""Name of the second channel."""
_TEXTS = ("quantity", "target", "method", "unit", "meaning")
_NUMBERS = ("level0_px", "mpp")
UNREADABLE = (ParseError, DefusedXmlException, StopIteration, KeyError, TypeError, ValueError)


def halve(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean of 2 x 2 blocks over the pixels that are seen: (ceil(h / 2), ceil(w / 2)) float32, NaN where none is seen.

    An odd last row or column makes blocks of what there is, so that nothing at the border is lost and map pixel
    (j, i) of the result covers exactly (2j..2j+1, 2i..2i+1).
    """
    height, width = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2)), constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2)
    total = np.nansum(blocks, axis=(1, 3), dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0 of 0 is the NaN that is wanted
        mean: npt.NDArray[np.float64] = total / (~np.isnan(blocks)).sum(axis=(1, 3))
    return mean.astype(np.float32)


def shrink(value_map: ValueMap, max_side_px: int) -> ValueMap:
    """`value_map` halved until no side is longer than `max_side_px` map pixels."""
    while max(value_map.values.shape) > max_side_px:
        value_map = replace(
            value_map,
            values=halve(value_map.values),
            level0_px=value_map.level0_px * 2,
            mpp=value_map.mpp * 2,
        )
    return value_map


def write_ome_tiff(path: str | Path, value_map: ValueMap) -> None:
    """Write a map as float32 OME-TIFF, atomically: axes CYX, channel 0 the values, channel 1 where there are any.

    Tiles of 256 px, deflate, levels halved by `halve` down to 256 px in SubIFDs, PhysicalSizeX/Y in micrometres,
    NaN kept. The second channel is 1 where the map has seen something and 0 elsewhere (coarser: the share): for
    programs that know no NaN, and because tiatoolbox takes an image without channels for none. No predictor:
    Bio-Formats (hence QuPath) refuses the floating-point one. The fields of the map that OME has no place for are kept
    as JSON in a MapAnnotation of the OME-XML.

    Raises:
        OutputError: the file cannot be written.
        DatasetError: the map is not a non-empty (height, width) array.
    """
    values = np.asarray(value_map.values, dtype=np.float32)
    if values.ndim != 2 or values.size == 0:
        raise DatasetError(f"{path}: a map has shape (height, width), not {values.shape}; nothing is written")
    levels = [(values, (~np.isnan(values)).astype(np.float32))]
    while max(levels[-1][0].shape) > TILE_PX:
        levels.append((halve(levels[-1][0]), halve(levels[-1][1])))
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, ome=True) as writer:
        for number, level in enumerate(levels):
            writer.write(
                np.stack(level),
                photometric="minisblack",
                tile=(TILE_PX, TILE_PX),
                compression="adobe_deflate",
                resolution=(1e4 / (value_map.mpp * 2**number),) * 2,
                resolutionunit="CENTIMETER",
                subifds=None if number else len(levels) - 1,
                subfiletype=1 if number else 0,
                metadata=None if number else _ome_metadata(value_map),
            )


def _ome_metadata(value_map: ValueMap) -> dict[str, Any]:
    fields = {name: getattr(value_map, name) for name in (*_NUMBERS, *_TEXTS)}
    title = f"{value_map.quantity} {value_map.target}"
    about = f"{title}; method: {value_map.method}; unit: {value_map.unit or 'none'}"
    values = np.ascontiguousarray(value_map.values, np.float32).tobytes()
    return ome_metadata(NAMESPACE, fields, title, about, [title, SEEN], values)


def ome_metadata(
    namespace: str, fields: Mapping[str, Any], title: str, about: str, channels: Sequence[str], values: bytes = b""
) -> dict[str, Any]:
    """What tifffile makes the OME-XML of a map of: title, words, scale (`fields["mpp"]`), channels, and the fields."""
    # ASCII JSON: XML has no place for control characters, and a slide's or a class's name may hold any.
    record = json.dumps(fields, allow_nan=False)
    return {
        "axes": "CYX",
        # A drawn one would hold the machine's address, and make two files of one map.
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, sha256(values + record.encode()).hexdigest())),
        "Name": printable(title),
        "Description": f"{printable(about)}. {RESEARCH_USE_ONLY}",
        "PhysicalSizeX": fields["mpp"],
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": fields["mpp"],
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [printable(name) for name in channels]},
        "MapAnnotation": {"Namespace": namespace, "record": record},
    }


def is_map(path: str | Path, namespace: str = NAMESPACE) -> bool:
    """Whether a file says that it holds medsd's map of that kind; its values are not looked at."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return namespace in (tiff.ome_metadata or "")
    except DAMAGED:
        return False


def record_of(xml: str) -> dict[str, Any]:
    """The fields that `ome_metadata` was given, of a file's OME-XML; raises what `UNREADABLE` names."""
    found: dict[str, Any] = json_of(next(node.text or "" for node in fromstring(xml).iter() if node.tag.endswith("}M")))
    return found


def read_ome_tiff(path: str | Path) -> ValueMap:
    """Read a map written by `write_ome_tiff`: the same values and fields, exactly.

    Raises:
        DatasetError: the file is missing, damaged, or was not written by `write_ome_tiff`.

    Example:
        >>> drawn = ValueMap(np.eye(3, dtype=np.float32), 64.0, 16.0, "saliency", "tumour", "drawn", "log-odds")
        >>> write_ome_tiff("saliency.ome.tif", drawn)
        >>> kept = read_ome_tiff("saliency.ome.tif")
        >>> kept.mpp, kept.values[1, 1]
        (16.0, np.float32(1.0))
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            xml = tiff.ome_metadata
            values = tiff.pages.first.asarray() if xml else None
    except DAMAGED as error:
        raise DatasetError(f"{path}: cannot be read as TIFF ({error}); make the map again") from error
    if xml is None or values is None or values.dtype != np.float32 or values.ndim != 2:
        raise DatasetError(f"{path}: is not a float32 OME-TIFF of one map; give a file written by medsd")
    try:
        record = record_of(xml)
        fields: dict[str, Any] = {name: float(record[name]) for name in _NUMBERS}
        fields |= {name: str(record.get(name, "") if name == "meaning" else record[name]) for name in _TEXTS}
    except UNREADABLE as error:
        raise DatasetError(f"{path}: lacks medsd's record of the map; give a file written by medsd") from error
    return ValueMap(values, **fields)
