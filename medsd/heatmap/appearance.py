"""Does a slide look like what the network was validated on? The stain and sharpness of its tiles beside those of
validation tiles.

A network's answers were checked on the looks of its validation tiles; on paler, bluer or more blurred tissue nobody
knows what they are worth. That needs no labels and no network, so it can be said of every slide. It does not see what
is drawn in the same colours: another organ passes. Statistics and limits: our choice, measured in docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medsd.cohort.dataset import Sample, evenly
from medsd.files import as_json
from medsd.slides.stain.augment import RUIFROK

STATISTICS = ("haematoxylin", "eosin", "yellow", "contrast", "sharpness")
"""Mean amounts of both stains and, across them, of yellow (below 0: blue), where there is stain; deviation of the
optical density; and how much of what differs between neighbouring pixels is finer than an edge."""
_WORDS = {
    "haematoxylin": ("less haematoxylin", "more haematoxylin"),
    "eosin": ("less eosin", "more eosin"),
    "yellow": ("a bluer stain", "a yellower stain"),
    "contrast": ("less contrast", "more contrast"),
    "sharpness": ("less sharpness", "more sharpness"),
}
# Optical density, as Macenko et al. 2009 have it, and the share of a tile above it.
_STAINED, _LEAST_STAINED = 0.15, 0.1
_TAIL = 1.0  # per cent of validation tiles on either side
_ASKED = 512  # validation tiles
# More tiles outside on one side than half are odd; a tenth, where one in a hundred would be, is worth no word.
_LEAST_TILES, _ODD, _SOME = 8, 0.5, 0.1
_EPSILON = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Appearance:
    """Between what values of `STATISTICS` validation tiles lie, but for 1 % of them on either side.

    Attributes:
        low, high: a value a statistic.
        tiles: that were measured.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    tiles: int

    def compare(self, images: Tensor) -> AppearanceCheck | None:
        """How many of a slide's tiles lie outside.

        Args:
            images: (B, 3, H, W) uint8, at the scale of the validation tiles, their stain normalised if theirs was.

        Returns:
            None where fewer than 8 tiles are stained.
        """
        values = statistics(images)
        if len(values) < _LEAST_TILES:
            return None
        below, above = ((values < self.low).sum(axis=0), (values > self.high).sum(axis=0))
        return AppearanceCheck(
            len(values),
            dict(zip(STATISTICS, below.tolist(), strict=True)),
            dict(zip(STATISTICS, above.tolist(), strict=True)),
        )


@dataclass(frozen=True)
class AppearanceCheck:
    """A slide's tiles beside an `Appearance`.

    Attributes:
        tiles: that were measured.
        below, above: how many lie outside on either side, by statistic.
    """

    tiles: int
    below: dict[str, int]
    above: dict[str, int]

    @property
    def odd(self) -> list[str]:
        """In words, where more than half of the tiles lie outside on one side."""
        return self._outside(_ODD)

    def _outside(self, share: float) -> list[str]:
        """What more than a share of the tiles lie outside in, on one side, the most frequent first."""
        counts = [(side[name], name, word) for word, side in enumerate((self.below, self.above)) for name in side]
        return [
            f"{count} of {self.tiles} tiles have {_WORDS[name][word]}"
            for count, name, word in sorted(counts, reverse=True)
            if count > share * self.tiles
        ]

    @property
    def warning(self) -> str:
        """What a reader has to be warned of; empty where there is nothing."""
        if not self.odd:
            return ""
        return (
            f"Looks unlike the tiles that the network was validated on: {', '.join(self.odd)} than 99 % of those. "
            "What its answers are worth on such tissue was not measured."
        )

    @property
    def words(self) -> str:
        """What was found, in a sentence."""
        if self.odd:
            return self.warning
        if outside := self._outside(_SOME):
            return (
                f"{', '.join(outside)} than 99 % of the validation tiles. A warning is given where that is so of more "
                "than half of a slide's tiles."
            )
        return (
            f"Stain, contrast and sharpness of {self.tiles} tiles are within the range of the validation tiles; that "
            "does not tell whether it is tissue of the same kind."
        )


def usual_appearance(images: Iterable[Tensor]) -> Appearance | None:
    """The range of validation tiles (3, H, W) uint8; None where fewer than 8 of them are stained."""
    values = np.concatenate([statistics(image[None]) for image in images])
    if len(values) < _LEAST_TILES:
        return None
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL], axis=0).tolist()
    return Appearance(tuple(low), tuple(high), len(values))


def appearance_card(dataset: Dataset[Sample], length: int) -> dict[str, Any] | None:
    """Fields of `usual_appearance` of up to 512 tiles of the dataset, evenly, as a card keeps them."""
    found = usual_appearance(dataset[row]["image"] for row in evenly(length, _ASKED).tolist())
    # Through JSON, as the card goes: tuples are lists there.
    return None if found is None else as_json(found)


def statistics(images: Tensor) -> Floats:
    """`STATISTICS` of those images (B, 3, H, W) uint8 that are stained in a tenth of their pixels or more: (n, 5).

    Example:
        >>> statistics(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)).shape
        (0, 5)
    """
    density = -(images.double().clamp(min=1) / 255).log()
    grey = density.mean(dim=1)
    stained = grey > _STAINED
    kept = stained.double().mean(dim=(1, 2)) >= _LEAST_STAINED
    density, grey, stained = density[kept], grey[kept], stained[kept].double()
    haematoxylin, eosin = torch.tensor(RUIFROK, dtype=torch.float64)
    across = torch.linalg.cross(haematoxylin, eosin)
    stains = torch.stack([haematoxylin, eosin, across / across.norm()])
    amounts = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(stains))
    pixels = stained.sum(dim=(1, 2))

    def mean(values: Tensor) -> Tensor:
        return (values * stained).sum(dim=(1, 2)) / pixels

    deviation = (mean(grey**2) - mean(grey) ** 2).clamp(min=0).sqrt()
    columns = [mean(amounts[:, number]) for number in range(3)]
    return torch.stack([*columns, deviation, _sharpness(grey)], dim=1).numpy()


def _sharpness(grey: Tensor) -> Tensor:
    """Logarithm of the Laplacian's power over that of the gradient: blur takes the finest detail first."""
    inner = grey[:, 1:-1, 1:-1]
    up, down, left, right = grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]
    finest = (4 * inner - up - down - left - right).square().mean(dim=(1, 2))
    edges = ((right - left).square() + (down - up).square()).mean(dim=(1, 2))
    return ((finest + _EPSILON) / (edges + _EPSILON)).log()
