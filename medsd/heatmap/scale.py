"""The one place where a value becomes a colour.

Limits are given, never taken from the tile or slide at hand: the same value has the same colour on every slide of a
bundle (design, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt

from medsd.checks import check_choice
from medsd.errors import ConfigError
from medsd.heatmap.legend import MASK
from medsd.saliency.registry import method_card

# An odd count, so that the middle of a diverging scale has a colour of its own.
STEPS = 257

# Positive is orange to brown, negative is teal: neither hue is in H&E's pink-to-purple range, the pair is told apart
# with red-green and blue-yellow colour blindness (ColorBrewer's BrBG), and the near-white middle leaves the tissue
# legible where the model is indifferent. RdBu, coolwarm and PuOr each spend one half on a colour that the stain has.
SALIENCY_COLORMAP = "BrBG_r"
PROBABILITY_COLORMAP = "viridis"
# Closed masks veil the tissue in white, open ones are green, which H&E has not: another scale than the probability's.
MASK_COLORMAP = "Greens"
# What speaks of no class has other colours than what is for or against one, signed or not.
LABEL_FREE_COLORMAP = "cividis"


@dataclass(frozen=True)
class ColourScale:
    """A fixed mapping of values to colours.

    Attributes:
        vmin: value of the first colour; lower values take that colour too.
        vmax: value of the last colour; higher values take that colour too.
        colormap: name of a matplotlib colormap.
        label: what the values are, for colour bars.
        unit: unit of the values, for colour bars; empty for a pure number.

    Raises:
        ConfigError: the limits are not finite and increasing, or the colormap is not known.
    """

    vmin: float
    vmax: float
    colormap: str
    label: str
    unit: str

    def __post_init__(self) -> None:
        if not (np.isfinite(self.vmin) and np.isfinite(self.vmax) and self.vmin < self.vmax):
            raise ConfigError(
                f"colour scale '{self.label}': limits {self.vmin:g} to {self.vmax:g} are not finite and increasing; "
                "give the limits measured on the validation slides"
            )
        check_choice("colormap", self.colormap, matplotlib.colormaps)

    @property
    def title(self) -> str:
        """Label with its unit, as written beside a colour bar."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def colours(self) -> npt.NDArray[np.uint8]:
        """The (257, 3) uint8 RGB colours from vmin to vmax, evenly spaced."""
        table = matplotlib.colormaps[self.colormap](np.linspace(0.0, 1.0, STEPS), bytes=True)
        return np.ascontiguousarray(table[:, :3], dtype=np.uint8)

    def rgba(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Colour `values` (height, width): uint8 (height, width, 4), alpha 0 where NaN and 255 elsewhere."""
        seen = ~np.isnan(values)
        position = (np.clip(values, self.vmin, self.vmax) - self.vmin) / (self.vmax - self.vmin)
        index = np.rint(np.where(seen, position, 0.0) * (STEPS - 1)).astype(np.intp)
        rgba = np.zeros((*values.shape, 4), np.uint8)
        rgba[..., :3] = self.colours()[index]
        rgba[..., 3] = 255
        rgba[~seen] = 0
        return rgba


def saliency_scale(limit: float, unit: str) -> ColourScale:
    """A diverging scale from -limit to limit, its middle at 0.

    Args:
        limit: the 99.5th percentile of |saliency| in the tissue of the validation slides (kept with the weights).
        unit: unit of the saliency values.

    Raises:
        ConfigError: `limit` is not positive and finite.
    """
    return ColourScale(-limit, limit, SALIENCY_COLORMAP, "Saliency", unit)


def probability_scale() -> ColourScale:
    """Viridis from 0 to 1."""
    return ColourScale(0.0, 1.0, PROBABILITY_COLORMAP, "Probability", "")


def explanation_scale(method: str, limit: float, unit: str) -> ColourScale:
    """The scale of a method's map.

    Masks run from 0, all closed, to 1, all open; maps of a class as `saliency_scale`; label-free ones to the limit,
    from -limit where they are signed and else from 0.

    Args:
        method: a saliency method or "mask".
        limit: as of `saliency_scale`.
        unit: unit of the values.

    Raises:
        ConfigError: no such method; `limit` of a saliency is not positive and finite.
    """
    if method == MASK:
        return ColourScale(0.0, 1.0, MASK_COLORMAP, "Mask", unit)
    card = method_card(method)
    if card.needs_label:
        return saliency_scale(limit, unit)
    return ColourScale(-limit if card.signed else 0.0, limit, LABEL_FREE_COLORMAP, "Strength", unit)
