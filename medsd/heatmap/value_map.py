"""A slide-level map: values with a place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ValueMap:
    """Values on a grid that starts at the slide's level-0 origin.

    Map pixel (row j, column i) covers the level-0 square from (i * level0_px, j * level0_px) to
    ((i + 1) * level0_px, (j + 1) * level0_px).

    Attributes:
        values: (height, width) float32, signed, not normalised; NaN is not seen.
        level0_px: side of a map pixel in level-0 pixels.
        mpp: side of a map pixel in micrometres.
        quantity: what the values are, "saliency", "mask" or "probability".
        target: the class the values speak of.
        method: how they were made, for legends and records.
        unit: unit of the values, for colour bars.
        meaning: what a reader may take the values for, a sentence: what their sign says, and whether they add up.
    """

    values: Floats
    level0_px: float
    mpp: float
    quantity: str
    target: str
    method: str
    unit: str
    meaning: str = ""

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """(height, width) bool: where the map has values."""
        return np.isfinite(self.values)

    def in_words(self) -> str:
        """Its size, scale and values, a line each."""
        height, width = self.values.shape
        seen, mm = self.values[self.seen], self.mpp / 1000
        values = f"{seen.min():.4g} to {seen.max():.4g} {self.unit}".rstrip() if seen.size else "none"
        return (
            f"map         {self.quantity} of {self.target}: {self.method}\n"
            f"dimensions  {width} x {height} px, {width * mm:.2f} x {height * mm:.2f} mm\n"
            f"mpp         {self.mpp:g} um per pixel, which is {self.level0_px:g} px of the slide's level 0\n"
            f"values      {values}, on {seen.size / self.values.size:.1%} of the map"
        )
