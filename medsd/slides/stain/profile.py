"""Stain normalisation: what is fitted to a picture, kept as plain numbers, and the transform between two fits.

tiatoolbox does the fitting (Macenko 2009, Vahadane 2016, Reinhard 2001). Applying needs neither tiatoolbox nor the
target's picture: a `StainProfile` is a few numbers that a configuration or a model card holds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medsd.checks import check_choice
from medsd.errors import ConfigError, NoTissueError, nearest
from medsd.files import read_json
from medsd.slides.readers.base import RGB
from medsd.slides.stain.transform import LabTransform, StainTransform, TwoStainTransform
from medsd.slides.tiatoolbox_import import logging_untouched

Method = Literal["macenko", "vahadane", "reinhard"]
Pair = tuple[float, float]
Triple = tuple[float, float, float]

METHODS: tuple[Method, ...] = get_args(Method)

# Stain vectors closer than this are one stain: to tell their concentrations apart would multiply noise by 10 or more.
_LEAST_ANGLE_DEGREES = 6.0
# What counts as stained, how much of it there must be, and in how many greys (our choice): clean and dusty glass, ink,
# black and one-colour pictures have less, tiles at the edge of tissue have more.
_LEAST_SATURATION = 0.07
_LEAST_STAINED = 0.05
_LEAST_STAINED_PX = 100
_LEAST_RANGE = 16
# A picture of one colour has no spread that a transform could scale.
_LEAST_STD = 0.1


@dataclass(frozen=True)
class TwoStains:
    """Haematoxylin and eosin of a picture, as Macenko and Vahadane fit them.

    Attributes:
        method: "macenko" or "vahadane".
        haematoxylin, eosin: optical densities (natural logarithm) of red, green and blue of one unit of each stain.
        strongest: 99th percentile of the concentration of haematoxylin and of eosin.

    Raises:
        ConfigError: numbers that no fit gives.
    """

    method: Literal["macenko", "vahadane"]
    haematoxylin: Triple
    eosin: Triple
    strongest: Pair

    def __post_init__(self) -> None:
        for name, size in (("haematoxylin", 3), ("eosin", 3), ("strongest", 2)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), size))
        if self.method not in ("macenko", "vahadane"):
            raise ConfigError(f"method='{self.method}': two stains are fitted by 'macenko' or 'vahadane'")
        if min(self.strongest) <= 0 or not _angle_degrees(self.haematoxylin, self.eosin) >= _LEAST_ANGLE_DEGREES:
            raise ConfigError(f"stain {asdict(self)}: the two stains cannot be told apart; fit it to another picture")


@dataclass(frozen=True)
class LabColours:
    """Mean and spread of a picture's colours, as Reinhard's method fits them.

    Attributes:
        mean, std: of L (0 to 100), a and b (about -127 to 127) in CIE L*a*b* with D65 white.
        method: "reinhard".

    Raises:
        ConfigError: numbers that no fit gives.
    """

    mean: Triple
    std: Triple
    method: Literal["reinhard"] = "reinhard"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), 3))
        if self.method != "reinhard":
            raise ConfigError(f"method='{self.method}': L, a and b are fitted by 'reinhard'")
        if min(self.std) < _LEAST_STD:
            raise ConfigError(f"std={self.std}: a picture of one colour; fit it to another picture")


StainProfile = TwoStains | LabColours
"""What is fitted to a slide or picture; `dataclasses.asdict` makes it JSON, `profile_from_dict` reads it."""


def profile_from_dict(values: Mapping[str, Any]) -> StainProfile:
    """The profile that `dataclasses.asdict` wrote, also after a round trip through JSON.

    Raises:
        ConfigError: no mapping, a key is missing or not known, or a value is not what a fit gives.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"stain target {values!r}: give the numbers of a fit (medsd stain SLIDE writes them)")
    method = values.get("method")
    check_choice("stain method", method, METHODS)
    kind = LabColours if method == "reinhard" else TwoStains
    known = tuple(kind.__dataclass_fields__)
    for key in values:
        if key not in known:
            raise ConfigError(f"stain '{method}': key '{key}' unknown{nearest(key, known) or '; delete it'}")
    for key in known:
        if key not in values:
            raise ConfigError(f"stain '{method}': key '{key}' missing; write the target anew")
    return kind(**values)


def profile_from_file(path: str | Path) -> StainProfile:
    """The profile in a file that `medsd stain` wrote, as plain values: nothing in it is run.

    Raises:
        ConfigError: there is none.
    """
    try:
        return profile_from_dict(read_json(path)["stain_target"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: no stain target ({error}); write one with medsd stain SLIDE") from error


def fit_picture(picture: RGB, method: Method) -> StainProfile:
    """Fit a picture with tiatoolbox, whose thresholds and percentiles are kept.

    Reinhard takes every pixel: give it a picture of tissue, or glass counts as a colour of the tissue. Macenko and
    Vahadane leave out what is pale. Two fits are comparable when their pictures are of one scale.

    Args:
        picture: RGB, shape (h, w, 3); not changed.
        method: "macenko", "vahadane" (slow, and unstable by tiatoolbox's own word) or "reinhard".

    Raises:
        NoTissueError: blank, of one colour, or of one stain.
        ConfigError: no such method.
    """
    check_choice("stain method", method, METHODS)
    _check_stained(picture, method)
    with logging_untouched():
        from tiatoolbox.tools.stainnorm import ReinhardNormalizer, get_normalizer

        normaliser = get_normalizer(method)
    try:
        # A copy, because tiatoolbox writes ones where the picture is zero.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            normaliser.fit(picture.copy())
        if isinstance(normaliser, ReinhardNormalizer):
            return LabColours(normaliser.target_means, normaliser.target_stds)
        haematoxylin, eosin = normaliser.stain_matrix_target
        assert method != "reinhard"
        return TwoStains(method, tuple(haematoxylin), tuple(eosin), tuple(normaliser.maxC_target[0]))
    except (ValueError, np.linalg.LinAlgError, ConfigError) as error:
        raise _no_stain(method, str(error)) from error


def transform_between(source: StainProfile, target: StainProfile) -> StainTransform:
    """The transform of pixels that gives a picture with the stain `source` the stain `target`.

    Raises:
        ConfigError: the two were fitted by different methods.
    """
    if isinstance(source, TwoStains) and isinstance(target, TwoStains) and source.method == target.method:
        stains = np.array([source.haematoxylin, source.eosin]), np.array([target.haematoxylin, target.eosin])
        return TwoStainTransform(*stains, np.divide(target.strongest, source.strongest))
    if isinstance(source, LabColours) and isinstance(target, LabColours):
        gain = np.divide(target.std, source.std)
        return LabTransform(gain, np.subtract(target.mean, gain * source.mean))
    raise ConfigError(
        f"the stain was fitted by '{source.method}', the target by '{target.method}'; fit both by one method"
    )


def _check_stained(picture: RGB, method: Method) -> None:
    """Raise NoTissueError where there is nothing to fit: the methods would fit the noise of glass."""
    red, green, blue = (picture[..., channel] for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    # Haematoxylin and eosin absorb green most of all.
    stained = picture[(red > green) & (chroma > _LEAST_SATURATION * value)]
    if len(stained) < max(_LEAST_STAINED * value.size, _LEAST_STAINED_PX):
        raise _no_stain(method, f"{len(stained)} of {value.size} pixels are stained")
    if np.ptp(stained, axis=0).max() < _LEAST_RANGE:
        raise _no_stain(method, "one colour only")


def _no_stain(method: Method, reason: str) -> NoTissueError:
    reason = " ".join(reason.split()).rstrip(".")
    return NoTissueError(f"stain '{method}' cannot be fitted ({reason}); use a picture with haematoxylin and eosin")


def _numbers(name: str, values: Any, size: int) -> tuple[float, ...]:
    """`values` as so many finite floats; JSON gives lists, and NumPy its own scalars."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={values!r}: must be {size} numbers") from error
    if len(numbers) != size or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{name}={values!r}: must be {size} finite numbers")
    return numbers


def _angle_degrees(first: Triple, second: Triple) -> float:
    lengths = math.hypot(*first) * math.hypot(*second)
    return math.degrees(math.acos(min(1.0, abs(np.dot(first, second)) / lengths))) if lengths else 0.0
