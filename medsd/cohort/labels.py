"""Which labels of a slide's tiles somebody gave: by outlines, or because the whole slide is normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from medsd.annotations import tumour_share
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import MIXED, NORMAL, TileIndex
from medsd.cohort.outlines import Outlines, known_in_full


def forget_unknown(
    tiles: TileIndex, entry: SlideEntry, outlines: Outlines | None, slide_mpp: float, outlined_from: float
) -> bool:
    """Take the labels of a slide that is outlined in full from tiles whose label nobody knows; whether any is known.

    Args:
        tiles: the slide's, whose labels are changed.
        entry, outlines, slide_mpp: of the slide.
        outlined_from: see `TileGrid`.
    """
    in_full = known_in_full(entry, outlines)
    if not (in_full or (outlines and not entry.exhaustive)) or _missed(tiles, outlines):
        tiles.label[:] = MIXED
        return False
    if not in_full:
        # Outside there may be what nobody outlined.
        drawn = _covered(tiles, outlines, 0, slide_mpp)
        tiles.label[(tiles.label == NORMAL) & (drawn < outlined_from)] = MIXED
    return True


def label_doubts(
    tiles: TileIndex, entry: SlideEntry, outlines: Outlines | None, classes: Sequence[str]
) -> Iterator[str]:
    """What must not pass without a word: labels that nobody gave, of tiles as if the slide were outlined in full."""
    name = classes[entry.label or 0]
    if _missed(tiles, outlines):
        yield "no outline lies on tissue, so no tile has a label; see whether they are this slide's"
    elif entry.label and not any(outlines or ()):
        yield f"a slide of the class {name} without outlines: no tile has a label"
    elif entry.label and entry.label not in (outlines or ()):
        yield f"labelled {name}, of which nothing is outlined, though other classes are"


def shared_tiles(tiles: TileIndex, outlines: Outlines | None, slide_mpp: float) -> int:
    """How many tiles outlines of two classes or more touch, whatever their label."""
    touching = np.zeros(len(tiles), np.int64)
    for number in filter(None, outlines or ()):
        touching += _covered(tiles, outlines, number, slide_mpp) > 0
    return int(np.count_nonzero(touching > 1))


def _covered(tiles: TileIndex, outlines: Outlines | None, number: int, slide_mpp: float) -> npt.NDArray[np.float64]:
    """The share of each tile (n,) in the outlines of a class."""
    if outlines is None or number not in outlines:
        return np.zeros(len(tiles))
    return tumour_share(outlines[number], tiles.x, tiles.y, tiles.tile_px * tiles.mpp / slide_mpp)


def _missed(tiles: TileIndex, outlines: Outlines | None) -> bool:
    """Whether a class is outlined, and none of it lies on a tile: the outlines may be another slide's."""
    return len(tiles) > 0 and any(outlines or ()) and bool((tiles.label == NORMAL).all())
