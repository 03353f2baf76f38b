"""The scale of a slide, resolved once and never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medsd.checks import check_number
from medsd.errors import MissingMppError

PLAUSIBLE_MPP = (0.05, 20.0)
"""Micrometres per level-0 pixel that a microscope can have; others are not believed, whoever says so (our choice)."""

LARGEST_TILE_PX = 2**14
"""Largest side of a tile that is read as one picture (our choice)."""

WANTED_MPP = f"give micrometres per level-0 pixel, from {PLAUSIBLE_MPP[0]:g} to {PLAUSIBLE_MPP[1]:g}"
"""The fix, for messages."""

_SOURCES = {
    "openslide.mpp-{}": "vendor property",
    "ome.mpp-{}": "OME-XML",
    "ngff.mpp-{}": "NGFF scale",
    "jp2.mpp-{}": "JPEG 2000 capture resolution",
}
_TAGS = "TIFF resolution tags"
# Scales that differ by less are one: pixels are square, a file says what the caller says (our choice).
_SAME = 0.02
# What is given and what the file says: beyond, one of them is another objective or a slip (our choice).
_DOUBTFUL = 0.1
UM_PER_UNIT = {
    **{"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25_400.0},
    **{"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "angstrom": 1e-4},
}
"""Micrometres per unit of length, as OME-XML, OME-NGFF and TIFF name them."""


@dataclass(frozen=True)
class Mpp:
    """Micrometres per level-0 pixel and where the number comes from (kept on every output).

    Attributes:
        doubt: where the caller's is far from the file's, a sentence for a reader; else empty.
    """

    value: float
    source: str
    doubt: str = ""


def is_plausible(mpp: float) -> bool:
    """Whether a microscope can have that scale; NaN, nanometres (250) and magnifications (40) are none."""
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def check_mpp(name: str, value: object) -> None:
    """Raises ConfigError: a scale that no microscope has; `name` is the key, as the user wrote it."""
    check_number(name, value, f"[{PLAUSIBLE_MPP[0]:g}, {PLAUSIBLE_MPP[1]:g}]", hint="micrometres per pixel")


def check_tile(tile_px: object, mpp: object) -> None:
    """Raises ConfigError: no tile has that side (pixels), or that scale (um per pixel)."""
    check_number("tile_px", tile_px, f"[1, {LARGEST_TILE_PX}]", whole=True)
    check_mpp("mpp", mpp)


def resolve_mpp(path: Path, properties: Mapping[str, str], override: float | None = None) -> Mpp:
    """The scale of the slide at `path`, from the first of these that states a plausible one.

    The caller's; the vendor's; PhysicalSize of OME-XML; the scale of OME-NGFF; the capture resolution of JPEG 2000;
    the TIFF resolution tags.

    Args:
        path: the slide's file, for the error message.
        properties: what the reader found in the file: OpenSlide's names, and `ome.mpp-x`, `ngff.mpp-x`, `jp2.mpp-x`
            (um) where such a file states them.
        override: micrometres per level-0 pixel, as the caller knows it.

    Raises:
        MissingMppError: no source gives a plausible scale, or the pixels are not square; the message names the fix.
    """
    candidates = _candidates(properties)
    pair, source = next((one for one in candidates if one[0] and all(map(is_plausible, one[0]))), (None, ""))
    if override is not None:
        if not is_plausible(override):
            raise MissingMppError(f"{path}: mpp={override:g} given; {WANTED_MPP}")
        return _given(float(override), pair)
    if pair is not None:
        if abs(pair[0] - pair[1]) > _SAME * pair[0]:
            raise MissingMppError(
                f"{path}: pixels are not square ({pair[0]:g} x {pair[1]:g} um); give one scale with mpp=..."
            )
        return Mpp((pair[0] + pair[1]) / 2, source)
    stated = next((pair for pair, _ in candidates[:-1] if pair is not None), None)
    raise MissingMppError(
        f"{path}: scale unknown{_hint(properties, stated)}; give it with mpp=... (--mpp), or in a manifest"
    )


def _candidates(properties: Mapping[str, str]) -> list[tuple[tuple[float, float] | None, str]]:
    """What the file says along x and y, and where, as it is to be believed: the tags last."""
    found = [(_pair(properties, key), source) for key, source in _SOURCES.items()]
    if properties.get("openslide.vendor") == "generic-tiff":
        # OpenSlide fills mpp-x of plain TIFFs from the resolution tags: that is the TIFF's word, not the vendor's.
        found = [*found[1:], (found[0][0], _TAGS)]
    return [*found, (_tiff_mpp(properties), _TAGS)]


def _given(mpp: float, stated: tuple[float, float] | None) -> Mpp:
    """The caller's scale, and how far it is from what the file says, if anything."""
    source = "given by the caller"
    apart = max((max(mpp, one) / min(mpp, one) - 1 for one in stated or ()), default=0.0)
    if stated is None or apart <= _SAME:
        return Mpp(mpp, source)
    said = " x ".join(dict.fromkeys(f"{one:g}" for one in stated))
    doubt = (
        f"Scale in doubt: {mpp:g} µm per pixel was given, the file says {said}. If the file is right, all sizes and "
        "answers here are wrong."
    )
    return Mpp(mpp, f"{source}; the file says {said}", doubt if apart > _DOUBTFUL else "")


def _tiff_mpp(properties: Mapping[str, str]) -> tuple[float, float] | None:
    unit = UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    resolution = _pair(properties, "tiff.{}Resolution", "XY")
    if unit is None or resolution is None or min(resolution) <= 0:
        return None
    return _rounded(unit / resolution[0]), _rounded(unit / resolution[1])


def _pair(properties: Mapping[str, str], key: str, axes: str = "xy") -> tuple[float, float] | None:
    """The numbers under a key for both axes; None unless both are finite."""
    try:
        x, y = (_rounded(float(properties.get(key.format(axis), "nan"))) for axis in axes)
    except ValueError:
        return None
    return (x, y) if math.isfinite(x) and math.isfinite(y) else None


def _rounded(value: float) -> float:
    """Tags are single precision (0.4990000128): beyond seven digits there is only noise."""
    return float(f"{value:.7g}")


def _hint(properties: Mapping[str, str], stated: tuple[float, float] | None) -> str:
    if stated is not None:
        return f" (the file says {stated[0]:g} um per pixel, which no microscope has)"
    power = properties.get("openslide.objective-power")
    # The objective alone does not fix the scale (camera and adapter differ), so it is only passed on.
    return f" (the file names only a {power}x objective)" if power else " (the file does not state it)"
