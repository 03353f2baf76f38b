"""A table of tiles: numpy columns, no Python object per tile."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.annotations import tumour_share
from medsd.checks import check_number
from medsd.cohort.outlines import Outlines
from medsd.errors import DatasetError
from medsd.files import atomic_path, json_of
from medsd.slides.mpp import check_tile
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

NORMAL, MIXED = 0, -1


@dataclass(frozen=True)
class TileGrid:
    """The grid that tiles are cut on.

    Attributes:
        tile_px: side of a tile in pixels at `mpp`.
        stride_px: step between tiles in pixels at `mpp`.
        mpp: micrometres per pixel of a tile.
        min_tissue: least share of a tile's area that is tissue, 0 to 1.
        outlined_from: share of a tile's area inside the outlines of a class from which it is a tile of that class.
            Tiles that touch outlines but have no class by this rule, or two, are mixed and used neither for training
            nor for scores (our choice).

    Raises:
        ConfigError: a value is out of its range.
    """

    tile_px: int
    stride_px: int
    mpp: float
    min_tissue: float = 0.5
    outlined_from: float = 0.5

    def __post_init__(self) -> None:
        check_tile(self.tile_px, self.mpp)
        check_number("stride_px", self.stride_px, "[1, inf)", whole=True)
        check_number("min_tissue", self.min_tissue, "[0, 1]")
        check_number("outlined_from", self.outlined_from, "(0, 1]")


@dataclass(frozen=True)
class TileIndex:
    """Tiles of several slides, one row a tile in every column.

    Attributes:
        names: names of the slides.
        paths: the slides' files.
        slide_mpp: micrometres per level-0 pixel that each slide was indexed with; None where it could not be opened.
        slide: (n,) int32, number of the tile's slide in `names`.
        x, y: (n,) int32, top left corner in level-0 pixels.
        label: (n,) int8: number of the class, 0 normal, -1 mixed or not known.
        tissue: (n,) float32, share of the tile that is tissue.
        tile_px: side of a tile in pixels at `mpp`.
        mpp: micrometres per pixel of a tile.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    slide_mpp: tuple[float | None, ...]
    slide: npt.NDArray[np.int32]
    x: npt.NDArray[np.int32]
    y: npt.NDArray[np.int32]
    label: npt.NDArray[np.int8]
    tissue: npt.NDArray[np.float32]
    tile_px: int
    mpp: float

    def __len__(self) -> int:
        return len(self.slide)

    def rows(self, chosen: npt.NDArray[np.bool_]) -> TileIndex:
        """The index with the chosen rows only; the slides stay as they are."""
        columns = {name: getattr(self, name)[chosen] for name in _COLUMNS}
        return replace(self, **columns)

    def of_slides(self, names: Sequence[str]) -> TileIndex:
        """The labelled tiles of the named slides."""
        numbers = [self.names.index(name) for name in names]
        return self.rows(np.isin(self.slide, numbers) & (self.label != MIXED))

    def named(self, names: Sequence[str]) -> TileIndex:
        """The index of these slides alone, in this order.

        Raises:
            DatasetError: it lacks one of them.
        """
        place = {name: number for number, name in enumerate(self.names)}
        lacking = [name for name in names if name not in place]
        if lacking:
            raise DatasetError(f"no tiles of slide '{lacking[0]}'; {_FIX} again")
        numbers = [place[name] for name in names]
        new = np.full(len(self.names), len(names), np.int32)
        new[numbers] = np.arange(len(names))
        slide = new[self.slide]
        rows = np.argsort(slide, kind="stable")[: int((slide < len(names)).sum())]
        columns = {column: getattr(self, column)[rows] for column in _COLUMNS} | {"slide": slide[rows]}
        return replace(
            self,
            names=tuple(names),
            paths=tuple(self.paths[number] for number in numbers),
            slide_mpp=tuple(self.slide_mpp[number] for number in numbers),
            **columns,
        )

    def save(self, path: str | Path) -> None:
        """Write the index as a NumPy archive (no pickle)."""
        head = json.dumps({name: getattr(self, name) for name in _HEAD})
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez_compressed(handle, head=np.array(head), **{name: getattr(self, name) for name in _COLUMNS})

    @staticmethod
    def load(path: str | Path) -> TileIndex:
        """Read an index written by `save`.

        Raises:
            DatasetError: the file is missing, or is no tile index.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                head, columns = json_of(str(archive["head"])), {name: archive[name] for name in _COLUMNS}
                return _checked(head, columns)
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: no tile index; {_FIX} first") from error
        except (*DAMAGED, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path}: not a tile index ({error}); delete it, then {_FIX}") from error


_MOST_PLACES = 20_000_000  # about 2 GB while they are chosen from
_FIX = "run the stage 'prepare' (or medsd tiles)"
_HEAD = ("names", "paths", "slide_mpp", "tile_px", "mpp")
_COLUMNS = {"slide": np.int32, "x": np.int32, "y": np.int32, "label": np.int8, "tissue": np.float32}


def _checked(head: dict[str, Any], columns: dict[str, npt.NDArray[Any]]) -> TileIndex:
    """The index of a file's content; ValueError where the content contradicts itself."""
    names, rows = head["names"], len(columns["slide"])
    for name, dtype in _COLUMNS.items():
        if columns[name].shape != (rows,) or columns[name].dtype != dtype:
            raise ValueError(f"column '{name}' is not {rows} values of {np.dtype(dtype)}")
    scales = tuple(None if scale is None else float(scale) for scale in head["slide_mpp"])
    if not len(head["paths"]) == len(scales) == len(names) or (
        rows and not 0 <= columns["slide"].min() <= columns["slide"].max() < len(names)
    ):
        raise ValueError("tiles of slides that are not named")
    if any((scales[number] or 0.0) <= 0 for number in np.unique(columns["slide"])):
        raise ValueError("tiles of a slide without a scale")
    return TileIndex(
        tuple(names), tuple(head["paths"]), scales, tile_px=int(head["tile_px"]), mpp=float(head["mpp"]), **columns
    )


def tiles_of_slide(
    slide: Slide, name: str, grid: TileGrid, tissue: TissueMask, outlines: Outlines | None = None
) -> TileIndex:
    """The tiles of one slide that hold enough tissue, in row-major order.

    Tiles start on multiples of the stride from the slide's origin and lie wholly inside the slide. Labels are those of
    a slide that is outlined in full, see `tile_labels`; without outlines every tile is normal.
    """
    level0_per_px = grid.mpp / slide.mpp
    side, stride = grid.tile_px * level0_per_px, grid.stride_px * level0_per_px
    columns, rows = (_places(length, side, stride) for length in slide.dimensions)
    if len(columns) * len(rows) > _MOST_PLACES:
        raise DatasetError(
            f"{slide.path}: {len(columns)} x {len(rows)} tiles, above {_MOST_PLACES:,} in all; raise stride_px "
            f"({grid.stride_px})"
        )
    x, y = (places.ravel() for places in np.meshgrid(columns, rows))
    share = tissue.share(x, y, side)
    kept = share >= grid.min_tissue
    x, y, share = x[kept], y[kept], share[kept]
    shares = {number: tumour_share(area, x, y, side) for number, area in (outlines or {}).items() if number}
    return TileIndex(
        names=(name,),
        paths=(str(slide.path),),
        slide_mpp=(slide.mpp,),
        slide=np.zeros(len(x), np.int32),
        x=x.astype(np.int32),
        y=y.astype(np.int32),
        label=tile_labels(shares, len(x), grid.outlined_from),
        tissue=share.astype(np.float32),
        tile_px=grid.tile_px,
        mpp=grid.mpp,
    )


def tile_labels(
    shares: Mapping[int, npt.NDArray[np.float64]], tiles: int, outlined_from: float
) -> npt.NDArray[np.int8]:
    """A tile is of the one class that covers `outlined_from` of it, normal where no outline touches it, else mixed.

    Mixed are tiles that outlines cover less, and where outlines overlap those that two classes cover so far.

    Args:
        shares: of each tile's area (n,) in the outlines of each class, by its number above 0.
        tiles: how many there are.
        outlined_from: see `TileGrid`.
    """
    label, covering, touched = np.zeros(tiles, np.int8), np.zeros(tiles, np.int8), np.zeros(tiles, np.bool_)
    for number, share in shares.items():
        covers = share >= outlined_from
        label[covers] = number
        covering += covers
        touched |= share > 0
    label[touched & (covering != 1)] = MIXED
    return label


def no_tiles(name: str, path: str, slide_mpp: float | None, grid: TileGrid) -> TileIndex:
    """The index of a slide that has no tile."""
    empty = {column: np.zeros(0, dtype) for column, dtype in _COLUMNS.items()}
    return TileIndex((name,), (path,), (slide_mpp,), tile_px=grid.tile_px, mpp=grid.mpp, **empty)


def _places(length: int, side: float, stride: float) -> npt.NDArray[np.float64]:
    """Whole starts of tiles of `side` on [0, length], in float64."""
    last = length - side + 1e-6
    # Rounding must not push the last tile over the slide's edge.
    starts = np.rint(np.arange(0, last, stride, dtype=np.float64))
    return np.minimum(starts, np.floor(last))


def join(parts: Sequence[TileIndex]) -> TileIndex:
    """One index of several slides; all parts share tile size and mpp, and slide names are unique.

    Raises:
        DatasetError: two slides of one name, no part, or parts of different grids.
    """
    names = tuple(name for part in parts for name in part.names)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DatasetError(f"two slides are named '{twice[0]}'; rename one (outputs are kept by slide name)")
    if len({(part.tile_px, part.mpp) for part in parts}) != 1:
        raise DatasetError(f"tile indexes of different tile sizes cannot be joined; {_FIX} again")
    offsets = np.cumsum([0] + [len(part.names) for part in parts])
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
    numbers = [part.slide + offset for part, offset in zip(parts, offsets, strict=False)]
    columns["slide"] = np.concatenate(numbers).astype(np.int32)
    paths = tuple(path for part in parts for path in part.paths)
    scales = tuple(scale for part in parts for scale in part.slide_mpp)
    return TileIndex(names, paths, scales, tile_px=parts[0].tile_px, mpp=parts[0].mpp, **columns)
