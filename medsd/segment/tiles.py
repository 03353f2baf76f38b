"""Tiles of slides with masks that are made of outlines as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon
from torch.utils.data import Dataset

from medsd.annotations import Annotations, rasterise, tumour_share
from medsd.annotations.shapes import only_polygons
from medsd.cohort.dataset import TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileIndex
from medsd.cohort.outlines import Outlines, read_outlines
from medsd.segment.items import MaskedSample, Numbers
from medsd.slides.slide import open_slide


@dataclass(frozen=True)
class OutlinedClasses:
    """The area of each class on a slide but the background's, in level-0 pixels, by class name."""

    areas: Mapping[str, MultiPolygon]

    def mask(self, x: float, y: float, side_px: int, level0_px: float) -> Numbers:
        """Class numbers (side_px, side_px) of a square whose corner is at (x, y); pixels of `level0_px` level-0 pixels.

        Where areas of two classes overlap, a pixel is of the later class.
        """
        side = side_px * level0_px
        square, numbers = shapely.box(x, y, x + side, y + side), np.zeros((side_px, side_px), np.uint8)
        for number, area in enumerate(self.areas.values(), start=1):
            inside = [part for part in area.geoms if part.intersects(square)]
            if inside:
                cut = only_polygons(shapely.intersection(MultiPolygon(inside), square))
                moved = Annotations(shapely.transform(cut, lambda points: points - (x, y)))
                numbers[rasterise(moved, side_px, side_px, level0_px)] = number
        return numbers

    def share(self, x: npt.ArrayLike, y: npt.ArrayLike, side_px: float) -> npt.NDArray[np.float64]:
        """The share (n,) of squares with corners at (x, y) that is of any class; `side_px` in level-0 pixels."""
        whole = only_polygons(shapely.union_all(list(self.areas.values())))
        return tumour_share(Annotations(whole), x, y, side_px)


def outlined_classes(entry: SlideEntry, classes: Sequence[str]) -> OutlinedClasses:
    """The areas that a slide's outlines give each class; none of any class where the slide has no outlines.

    See `read_outlines`: groups of the outlines (ASAP's, QuPath's classes) are the names of the classes, and what is
    outlined as the background, or excluded, is cut out of the others.

    Args:
        entry: the slide, with its annotation.
        classes: names, the background's first.

    Raises:
        SlideError: the slide cannot be opened.
        AnnotationError: the outlines cannot be read, or one's group is no class; its name is in the message.
    """
    outlines: Outlines | None = None
    if entry.annotation is not None:
        with open_slide(entry.path, entry.mpp) as slide:
            outlines = read_outlines(entry, slide.dimensions, slide.bounds[:2], classes)
    found = outlines or {}
    return OutlinedClasses(
        {
            name: found[number].tumour if number in found else MultiPolygon()
            for number, name in enumerate(classes)
            if number
        }
    )


class MaskedTiles(Dataset[MaskedSample]):
    """Tiles as {"image": (3, S, S) uint8, "label": (1, S, S) uint8}, S being the index's `tile_px`.

    Draws are even over slides, and in each over tiles with anything outlined and without; a slide is scored as a whole.

    Args:
        index: the tiles.
        outlines: of each slide, by name.
        patients: of each slide, by name; the slide's own where nobody says.
        cache: keep decoded tiles in memory.
    """

    def __init__(
        self,
        index: TileIndex,
        outlines: Mapping[str, OutlinedClasses],
        patients: Mapping[str, str],
        cache: bool = False,
    ) -> None:
        self.index, self._outlines = index, outlines
        self._tiles = TileDataset(index, cache)
        self.units = self._tiles.groups
        self.patients: npt.NDArray[np.str_] = np.array([patients.get(name) or name for name in self.units], str)
        self.shares = self._shares()
        self.groups: npt.NDArray[np.str_] = np.array(
            [f"{name} {'outlined' if share else 'not'}" for name, share in zip(self.units, self.shares, strict=True)],
            str,
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> MaskedSample:
        import torch

        mask = self.mask(item)
        return {"image": self._tiles[item]["image"], "label": torch.from_numpy(mask[None])}

    def mask(self, item: int) -> Numbers:
        """Class numbers (S, S) of a tile."""
        index, slide = self.index, int(self.index.slide[item])
        level0_px = index.mpp / self._mpp(slide)
        outlines = self._outlines[index.names[slide]]
        return outlines.mask(float(index.x[item]), float(index.y[item]), index.tile_px, level0_px)

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        return self._tiles.place(item)

    def fingerprint(self) -> str:
        """A SHA-256 of which tiles these are, and of the outlines."""
        digest = hashlib.sha256(self._tiles.fingerprint().encode())
        for name in sorted(set(self.units.tolist())):
            for area in self._outlines[name].areas.values():
                digest.update(f"{name} ".encode() + shapely.to_wkb(area))
        return digest.hexdigest()

    def _mpp(self, slide: int) -> float:
        mpp = self.index.slide_mpp[slide]
        assert mpp is not None  # it has tiles
        return mpp

    def _shares(self) -> npt.NDArray[np.float64]:
        shares, index = np.zeros(len(self.index)), self.index
        for number in np.unique(index.slide):
            rows = index.slide == number
            side = index.tile_px * index.mpp / self._mpp(int(number))
            shares[rows] = self._outlines[index.names[number]].share(index.x[rows], index.y[rows], side)
        return shares
