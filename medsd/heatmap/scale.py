"""The one place where a value becomes a colour: hue says what it speaks for, opacity how strongly.

Limits are given, never taken from the tile or slide at hand: the same value has the same colour on every slide of a
bundle (design, section 3). A colour is laid over the slide in light grey (`medsd.drawing.pale`), so that hue belongs to
the map alone, and its opacity is the value's share of the limit: nothing is tinted where nothing is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.errors import ConfigError
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.saliency.registry import method_card

OPACITY = 0.6
"""Of the strongest colour over the slide, unless said otherwise (our choice): nuclei stay visible below it."""

# An odd count, so that the middle of a diverging scale has a place of its own.
STEPS = 257

Ink = tuple[int, int, int]

# Orange speaks for the class on every map, blue against it. Distances in CIELAB (1976) from grey 190 at an opacity of
# 0.75, to eyes with all cones and with deuteranopia, protanopia, tritanopia (Machado et al. 2009, severity 1):
# FOR 44, 40, 38, 43; AGAINST 39, 40, 32, 40; TUMOUR 66, 58, 55, 63. At half the opacity they are 47 to 66 % as far, so
# steps look even. Teal (0, 140, 140) is farther from haematoxylin (48, AGAINST 31), but 24 and 17 from grey to the
# red-green blind, who would not see it.
FOR: Ink = (200, 115, 50)
AGAINST: Ink = (0, 116, 165)
# Probability runs one way, and may be brighter.
TUMOUR: Ink = (230, 97, 0)
# Open masks are green, which H&E has not. What speaks of no class has hues of its own, signed or not.
OPEN: Ink = (40, 125, 40)
FEATURES: Ink = (140, 125, 0)
OTHER_FEATURES: Ink = (110, 90, 165)


@dataclass(frozen=True)
class ColourScale:
    """A fixed mapping of values to a hue by their sign and an opacity by their size.

    Attributes:
        vmin: value of the strongest colour below 0; lower values take it too. 0 where nothing is below.
        vmax: value of the strongest colour above 0; higher values take it too.
        above, below: sRGB colours of values above and below 0.
        label: what the values are, for colour bars.
        unit: unit of the values, for colour bars; empty for a pure number.
        hues: what the colours stand for, in words.

    Raises:
        ConfigError: the limits are not finite, vmax is not above 0, or vmin above it.
    """

    vmin: float
    vmax: float
    above: Ink
    below: Ink
    label: str
    unit: str
    hues: str = ""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.vmin) and np.isfinite(self.vmax) and self.vmin <= 0 < self.vmax):
            raise ConfigError(
                f"colour scale '{self.label}': limits {self.vmin:g} to {self.vmax:g} are not finite with 0 between; "
                "give the limits measured on the validation slides"
            )

    @property
    def title(self) -> str:
        """Label with its unit, as written beside a colour bar."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def ticks(self) -> list[str]:
        """Five values along a colour bar, evenly spaced, as written below it."""
        sign = "+" if self.vmin < 0 else ""
        values = np.linspace(self.vmin, self.vmax, 5)
        return [f"{value:{sign}.3g}" if abs(value) > 1e-9 * self.vmax else "0" for value in values]

    def rgba(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Colours of `values` (height, width): uint8 (height, width, 4), alpha their share of the limit; NaN is 0."""
        known = np.nan_to_num(values, posinf=self.vmax, neginf=self.vmin)
        share = np.where(known > 0, known / self.vmax, known / (self.vmin or -np.inf))
        inks = np.where(known[..., np.newaxis] < 0, self.below, self.above)
        alpha = np.rint(255 * share.clip(0, 1))[..., np.newaxis]
        return np.concatenate([inks, alpha], axis=-1).astype(np.uint8)

    def over(
        self, pixels: npt.NDArray[np.uint8], values: npt.NDArray[np.floating], opacity: float = OPACITY
    ) -> npt.NDArray[np.uint8]:
        """The colours of `values` (height, width) laid over pixels (height, width, 3) at up to `opacity` (0 to 1)."""
        colours = self.rgba(values).astype(np.float32)
        share = opacity / 255 * colours[..., 3:]
        return np.rint(share * colours[..., :3] + (1 - share) * pixels).astype(np.uint8)

    def bar(self, opacity: float = OPACITY) -> npt.NDArray[np.uint8]:
        """The (128, 257, 3) RGB colour bar: values from vmin to vmax over the greys of `pale`, from glass to nuclei.

        Every colour that `over` makes of the slide in light grey is on it.
        """
        greys = np.repeat(np.arange(255, 127, -1, dtype=np.uint8)[:, np.newaxis], STEPS, axis=1)
        values = np.broadcast_to(np.linspace(self.vmin, self.vmax, STEPS), greys.shape)
        return self.over(np.stack([greys] * 3, axis=2), values, opacity)


def saliency_scale(limit: float, unit: str, label: str = "Saliency", hues: str = "") -> ColourScale:
    """A diverging scale from -limit to limit.

    Args:
        limit: the 99.5th percentile of |saliency| in the tissue of the validation slides (kept with the weights).
        unit: unit of the saliency values.
        label, hues: see `ColourScale`; none for the words of a sign that is no evidence.

    Raises:
        ConfigError: `limit` is not positive and finite.
    """
    return ColourScale(
        -limit, limit, FOR, AGAINST, label, unit, hues or "orange: above 0; blue: below 0; uncoloured: 0"
    )


def probability_scale() -> ColourScale:
    """From 0, uncoloured, to 1."""
    return ColourScale(0.0, 1.0, TUMOUR, AGAINST, "Probability", "", "orange: probable; uncoloured: improbable")


def class_ink(number: int) -> Ink:
    """The colour of a class by its number from 1; after six they come again."""
    inks = (TUMOUR, AGAINST, OPEN, OTHER_FEATURES, FEATURES, (150, 30, 80))
    return inks[(number - 1) % len(inks)]


def share_scale(number: int) -> ColourScale:
    """Of the share of a segmented class in map pixels, from 0, uncoloured, to 1."""
    hues = "coloured: the class; uncoloured: another"
    return ColourScale(0.0, 1.0, class_ink(number), AGAINST, "Share of the area", "", hues)


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
        return ColourScale(0.0, 1.0, OPEN, AGAINST, "Mask", unit, "green: open; uncoloured: closed")
    if method == ADDITIVE:
        return saliency_scale(limit, unit, "Evidence", "orange: for; blue: against; uncoloured: neither")
    card = method_card(method)
    if card.needs_label:
        return saliency_scale(limit, unit)
    hues = "yellow: above 0; violet: below 0; uncoloured: 0" if card.signed else "yellow: strong; uncoloured: 0"
    return ColourScale(-limit if card.signed else 0.0, limit, FEATURES, OTHER_FEATURES, "Strength", unit, hues)
