"""A slide whose stain is normalised: fitted once from its tissue, kept, and the same for every tile."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from medsd.errors import ConfigError, NoTissueError, SlideError
from medsd.record import read_record, write_record
from medsd.slides.parts import slide_identity
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.slide import Area, Slide
from medsd.slides.stain.profile import Method, StainProfile, fit_picture, profile_from_dict, transform_between
from medsd.slides.stain.transform import GLASS, distance_from_white
from medsd.slides.tissue import TissueMask, find_tissue

logger = logging.getLogger(__name__)

# At 1 um a pixel nuclei are still whole and a square holds a few hundred of them (our choice).
_SAMPLE_MPP = 1.0
_SQUARE_PX = 64
_SQUARES = 64
_SEED = 0
# Part of the cache's key: raise it when the sample or the fit changes.
_VERSION = 1


def fit_slide(slide: Slide, method: Method, tissue: TissueMask | None = None) -> StainProfile:
    """Fit the stain of a slide from up to 64 squares of 64 um of its tissue, spread at random but always the same.

    Args:
        slide: an open slide; areas that cannot be decoded are left out.
        method: "macenko", "vahadane" or "reinhard".
        tissue: its tissue, if known already.

    Raises:
        NoTissueError: no tissue, or too little stain to be fitted.
        SlideError: the slide cannot be read.
    """
    pixels = _sample(slide, find_tissue(slide) if tissue is None else tissue)
    # Outside the tissue and in vessels and fat: glass is not changed afterwards, so it has no say in how tissue is.
    pixels = pixels[distance_from_white(pixels) > GLASS]
    if len(pixels) == 0:
        raise NoTissueError(f"{slide.path}: no tissue to fit its stain to; leave the slide out")
    try:
        return fit_picture(pixels[:, None], method)
    except NoTissueError as error:
        raise NoTissueError(f"{slide.path}: {error}; or leave the slide out") from error


def _sample(slide: Slide, tissue: TissueMask) -> RGB:
    """Pixels of the sample, shape (n, 3)."""
    mpp = max(_SAMPLE_MPP, slide.mpp)
    side_px = _SQUARE_PX * mpp / slide.mpp
    x, y = (grid.ravel() for grid in np.meshgrid(*(np.arange(0, size, side_px) for size in slide.dimensions)))
    share = tissue.share(x, y, side_px)
    # Squares that are mostly tissue (without any, the fullest): clear of ink, 40 um before which the mask ends.
    candidates = np.flatnonzero(share >= min(0.5, share.max()) if share.max() > 0 else share > 0)
    chosen = np.random.default_rng(_SEED).permutation(candidates)[:_SQUARES]
    parts = [np.empty((0, 3), np.uint8)]
    for number in np.sort(chosen):
        pixels, seen = slide.read_seen(x[number], y[number], _SQUARE_PX, _SQUARE_PX, mpp)
        parts.append(pixels.reshape(-1, 3) if seen is None else pixels[seen])
    return np.concatenate(parts)


class NormalisedSlide(Slide):
    """A `Slide` that gives every pixel of another one the stain of a target.

    Args:
        slide: read from, and closed with this one.
        source: its stain, see `fit_slide`.
        target: the stain to be shown.

    Raises:
        ConfigError: source and target were fitted by different methods.
    """

    def __init__(self, slide: Slide, source: StainProfile, target: StainProfile) -> None:
        self.path, self.dimensions, self.bounds = slide.path, slide.dimensions, slide.bounds
        self.mpp, self.mpp_source, self.reader = slide.mpp, slide.mpp_source, slide.reader
        self.mpp_doubt = slide.mpp_doubt
        self.source, self.target = source, target
        self._slide = slide
        self._transform = transform_between(source, target)

    def close(self) -> None:
        self._slide.close()

    def _read(self, area: Area, strict: bool) -> tuple[RGB, Bools | None]:
        pixels, seen = (self._slide.read(*area), None) if strict else self._slide.read_seen(*area)
        return self._transform(pixels), seen


class StainNormaliser:
    """Normalises slides and single pictures to one target; remembers what it fitted.

    Safe to pickle and to share between threads.

    Args:
        target: the stain to be shown; its method is used throughout.
        folder: where fits are kept between runs, a JSON file a slide; None for in memory alone.
    """

    def __init__(self, target: StainProfile, folder: str | Path | None = None) -> None:
        self.target = target
        self.folder = None if folder is None else Path(folder)
        self._fits: dict[str, StainProfile] = {}

    def slide(self, slide: Slide, tissue: TissueMask | None = None) -> NormalisedSlide:
        """`slide` with the target's stain.

        Raises:
            NoTissueError: no tissue, or too little stain to be fitted.
            SlideError: the slide cannot be read.
            OutputError: the fit cannot be kept.
        """
        return NormalisedSlide(slide, self.fit(slide, tissue), self.target)

    def fit(self, slide: Slide, tissue: TissueMask | None = None) -> StainProfile:
        """The stain of `slide`, fitted by the target's method or remembered; raises as `slide` does."""
        recipe = _recipe(slide, self.target.method)
        name = sha256(json.dumps(recipe).encode()).hexdigest()
        if name not in self._fits:
            path = None if self.folder is None else self.folder / f"{slide.path.stem}-{name[:16]}.json"
            profile = None if path is None else _kept(path, recipe)
            if profile is None:
                profile = fit_slide(slide, self.target.method, tissue)
                if path is not None:
                    write_record(path, recipe, [], stain=asdict(profile))
            self._fits[name] = profile
        return self._fits[name]

    def picture(self, picture: RGB) -> RGB:
        """A picture without a slide, fitted on its own; one without stain (blank, one colour) is given back as it is.

        Args:
            picture: RGB, shape (h, w, 3). The fit of a small patch is poor: prefer slides.
        """
        try:
            source = fit_picture(picture, self.target.method)
        except NoTissueError:
            return picture
        return transform_between(source, self.target)(picture)


def _recipe(slide: Slide, method: Method) -> dict[str, Any]:
    """What a fit follows from: the same file at the same scale, sampled the same way."""
    try:
        file = [str(slide.path.resolve()), slide_identity(slide.path)]
    except OSError as error:
        raise SlideError(f"{slide.path}: cannot be read ({error.strerror}); check the path") from error
    return {"slide": file, "mpp": slide.mpp, "method": method, "version": _VERSION}


def _kept(path: Path, recipe: dict[str, Any]) -> StainProfile | None:
    """The fit in `path`; None where there is none for this slide, or it is damaged."""
    record = read_record(path, recipe)
    try:
        return None if record is None else profile_from_dict(record["stain"])
    except (LookupError, TypeError, AttributeError, ConfigError) as error:
        logger.warning("%s: damaged (%s); fitted again", path, error)
        return None
