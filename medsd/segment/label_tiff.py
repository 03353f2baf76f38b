"""Classes of a slide's pixels as pyramidal OME-TIFF: numbers, not colours; written tile by tile.

Layout as of `medsd.heatmap.tiff`: levels in SubIFDs, deflate, PhysicalSize, a second channel that says what was judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from medsd.errors import DatasetError
from medsd.files import atomic_path
from medsd.heatmap.tiff import SEEN, UNREADABLE, ome_metadata, record_of
from medsd.segment.items import Numbers
from medsd.segment.stitch import CHUNK_PX, SlideLabels
from medsd.slides.readers.damage import DAMAGED

NAMESPACE = "medsd/label_map"
_TILE_PX = CHUNK_PX
_COARSEST_PX = 512


def write_labels(path: str | Path, labels: SlideLabels) -> None:
    """Write `labels.ome.tif`, atomically: axes CYX, channel 0 the class numbers, channel 1 where there are any.

    uint8, tiles of 512 px, each level the middle pixel of squares of the first one (nearest neighbour: numbers have no
    mean), down to 512 px. What was not judged, glass above all, is 0 in both channels; 0 is also the background's
    number, which the second channel, 1 where judged, tells from it. Names of classes stand in the OME-XML: in the
    first channel's name, and as JSON in a MapAnnotation. Memory stays at a few tiles.

    Raises:
        OutputError: the file cannot be written.
    """
    names = ", ".join(f"{number} {name}" for number, name in enumerate(labels.classes))
    channels = [_Channel(labels.numbers, "class"), _Channel(labels.numbers, "seen")]
    _write(Path(path), labels, channels, [f"class: {names}", SEEN], "classes")


def write_probabilities(path: str | Path, labels: SlideLabels) -> None:
    """Write `probabilities.ome.tif` as `write_labels` does: a channel a class, 255 for 1, and last where there are any.

    Raises:
        OutputError: the file cannot be written.
    """
    channels = [_Channel(labels.probabilities, "plain", number) for number, _ in enumerate(labels.classes)]
    names = [f"probability of {name}, 255 is 1" for name in labels.classes]
    _write(Path(path), labels, [*channels, _Channel(labels.numbers, "seen")], [*names, SEEN], "probabilities")


def label_map_words(path: str | Path) -> str:
    """What a file of `write_labels` or `write_probabilities` holds, a line each; its first channel alone is read.

    Raises:
        DatasetError: the file is missing, damaged, or of another kind.
    """
    record, shape = _record(path)
    height, width = shape
    mm = float(record["mpp"]) / 1000
    areas = ", ".join(f"{name} {area:.4g}" for name, area in record["areas_mm2"].items())
    return (
        f"map         {record['quantity']}: {record['method']}\n"
        f"dimensions  {width} x {height} px, {width * mm:.2f} x {height * mm:.2f} mm\n"
        f"mpp         {record['mpp']:g} um per pixel, which is {record['level0_px']:g} px of the slide's level 0\n"
        f"areas       {areas} mm2"
    )


class _Channel:
    """A channel of a pyramid, by tiles."""

    def __init__(self, array: Any, kind: str, number: int | None = None) -> None:
        self._array, self._kind, self._number = array, kind, number

    def tiles(self, step: int) -> Iterator[Numbers]:
        """The tiles of the level whose pixels are `step` wide, from left to right and top to bottom."""
        rows, columns = (_middles(length, step) for length in self._array.shape[-2:])
        for top in range(0, len(rows), _TILE_PX):
            for left in range(0, len(columns), _TILE_PX):
                found = self._at(rows[top : top + _TILE_PX], columns[left : left + _TILE_PX])
                tile = np.zeros((_TILE_PX, _TILE_PX), np.uint8)
                tile[: found.shape[0], : found.shape[1]] = found
                yield tile

    def _at(self, rows: np.ndarray, columns: np.ndarray) -> Numbers:
        if len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1:
            place: Any = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            found = self._array[place] if self._number is None else self._array[(self._number, *place)]
        else:
            whole = (rows, columns) if self._number is None else ([self._number], rows, columns)
            found = self._array.oindex[whole].reshape(len(rows), len(columns))
        values = np.asarray(found)
        if self._kind == "plain":
            return values
        return (values > 0).astype(np.uint8) if self._kind == "seen" else np.maximum(values, 1) - 1


def _middles(length: int, step: int) -> np.ndarray:
    """The middle pixel of each square along an axis; the last of what there is."""
    return np.minimum(np.arange(-(-length // step)) * step + step // 2, length - 1)


def _write(path: Path, labels: SlideLabels, channels: list[_Channel], names: list[str], quantity: str) -> None:
    height, width = labels.numbers.shape
    steps = [1]
    while max(height, width) > _COARSEST_PX * steps[-1]:
        steps.append(2 * steps[-1])
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, ome=True, bigtiff=True) as writer:
        for step in steps:
            writer.write(
                (tile for channel in channels for tile in channel.tiles(step)),
                shape=(len(channels), -(-height // step), -(-width // step)),
                dtype=np.uint8,
                photometric="minisblack",
                tile=(_TILE_PX, _TILE_PX),
                compression="adobe_deflate",
                resolution=(1e4 / (labels.mpp * step),) * 2,
                resolutionunit="CENTIMETER",
                subifds=len(steps) - 1 if step == 1 else None,
                subfiletype=int(step > 1),
                metadata=_ome_metadata(labels, names, quantity) if step == 1 else None,
            )


def _ome_metadata(labels: SlideLabels, names: list[str], quantity: str) -> dict[str, Any]:
    fields = {
        "quantity": quantity,
        "classes": labels.classes,
        "method": labels.method,
        "level0_px": labels.level0_px,
        "mpp": labels.mpp,
        "areas_mm2": labels.areas_mm2,
    }
    about = f"{quantity} of {', '.join(labels.classes)}; {labels.method}"
    return ome_metadata(NAMESPACE, fields, quantity, about, names)


def _record(path: str | Path) -> tuple[dict[str, Any], tuple[int, int]]:
    try:
        with tifffile.TiffFile(path) as tiff:
            xml, (height, width) = tiff.ome_metadata or "", tiff.pages.first.shape
        record = record_of(xml)
        return {name: record[name] for name in ("quantity", "method", "mpp", "level0_px", "areas_mm2")}, (height, width)
    except (*DAMAGED, *UNREADABLE) as error:
        raise DatasetError(f"{path}: lacks medsd's record of a segmentation; give a file written by medsd") from error
