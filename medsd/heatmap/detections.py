"""A slide's maps as a grid of detections, which QuPath's measurement maps colour and its tables list."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from medsd.annotations.geojson import feature, write_features
from medsd.heatmap.legend import ADDITIVE
from medsd.heatmap.overlay import MappedSlide, ShownMap

MOST_TILES = 40_000
"""Of a file: about 20 MB, which QuPath imports in seconds (our choice)."""
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "medsd.detections")


def write_tiles(
    path: str | Path, mapped: MappedSlide, tile_level0_px: float, qupath_origin_px: tuple[int, int] = (0, 0)
) -> int:
    """Write squares of tissue with their values as QuPath detections, atomically, one by one.

    A grid from the slide's origin; squares double their side until there are no more than `MOST_TILES`. Of each, as
    measurements: the share of it that was seen, the mean of every map, and of the additive one the sum, which over a
    whole tile of the network is the tile's log-odds. Squares end where the slide does.

    Args:
        path: the file, `tiles.geojson`.
        mapped: the slide's maps.
        tile_level0_px: side of a tile of the network, a whole number of map pixels of every map.
        qupath_origin_px: the level-0 place that QuPath counts from: the corner of `Slide.bounds`.

    Returns:
        the number of squares.

    Raises:
        OutputError: the file cannot be written.
    """
    side = tile_level0_px
    grids = [_Squares.of(shown, side) for shown in mapped.maps]
    while np.count_nonzero(grids[0].seen) > MOST_TILES:
        side *= 2
        grids = [_Squares.of(shown, side) for shown in mapped.maps]
    write_features(path, _features(mapped, grids, side, qupath_origin_px))
    return int(np.count_nonzero(grids[0].seen))


@dataclass(frozen=True)
class _Squares:
    """A map's values in squares: name to (rows, columns), NaN where nothing is seen, and the share that is seen."""

    values: dict[str, npt.NDArray[np.float64]]
    seen: npt.NDArray[np.float32]

    @classmethod
    def of(cls, shown: ShownMap, side: float) -> _Squares:
        values = shown.value_map.values
        count = max(1, round(side / shown.value_map.level0_px))
        height, width = values.shape
        padded = np.pad(values, ((0, -height % count), (0, -width % count)), constant_values=np.nan)
        blocks = padded.reshape(padded.shape[0] // count, count, padded.shape[1] // count, count)
        known = (~np.isnan(blocks)).sum(axis=(1, 3), dtype=np.float32)
        total = np.nansum(blocks, axis=(1, 3), dtype=np.float64)
        found = {shown.heading: total / np.where(known > 0, known, np.nan)}
        if shown.key == ADDITIVE:
            found[f"{shown.heading}, sum"] = np.where(known > 0, total, np.nan)
        return cls(found, known / count**2)


def _features(
    mapped: MappedSlide, grids: list[_Squares], side: float, origin_px: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    width, height = mapped.dimensions
    for row, column in np.argwhere(grids[0].seen > 0):
        # One rounding of each line of the grid: neighbours share it.
        left, right = (min(width, round(index * side)) for index in (column, column + 1))
        top, bottom = (min(height, round(index * side)) for index in (row, row + 1))
        if left == right or top == bottom:
            continue
        measurements = {"Seen share": _short(grids[0].seen[row, column])}
        for grid in grids:
            for name, values in grid.values.items():
                if np.isfinite(values[row, column]):
                    measurements[name] = _short(values[row, column])
        square = shapely.box(left - origin_px[0], top - origin_px[1], right - origin_px[0], bottom - origin_px[1])
        object_id = uuid.uuid5(_UUID_NAMESPACE, f"{mapped.name!a} {left} {top} {right} {bottom}")
        properties = {"objectType": "detection", "measurements": measurements}
        yield feature(square, object_id, "", "", properties=properties)


def _short(value: float) -> float:
    """Six digits, a quarter of the file's size less."""
    return float(f"{value:.6g}")
