"""How tests of cohorts tile slides, and what they read in the folder."""

from __future__ import annotations

import csv
from pathlib import Path

from medsd.cohort.index import TileGrid, TileIndex
from medsd.cohort.tiling import Tiling

GRID = TileGrid(tile_px=64, stride_px=64, mpp=1.0)
TILING = Tiling(GRID)


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "slides.csv", newline="", encoding="utf-8") as handle:
        return {row["slide"]: row for row in csv.DictReader(handle)}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def of(index: TileIndex, name: str) -> TileIndex:
    return index.rows(index.slide == index.names.index(name))
