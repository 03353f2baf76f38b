"""Maps over a slide for a notebook: the picture of `overlay.png`, of what is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsd.cohort.entry import named_slides
from medsd.cohort.learnt import learnt_words
from medsd.drawing import Canvas
from medsd.errors import ConfigError, DatasetError
from medsd.heatmap.findings import Checks, mapped_slide, misfits, model_words, shown_map, striped
from medsd.heatmap.folder import THUMBNAIL_PX
from medsd.heatmap.legend import NO_CLASS
from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.model import MapModel
from medsd.heatmap.overlay import MappedSlide, ShownMap, overlay_picture
from medsd.heatmap.scale import probability_scale
from medsd.heatmap.value_map import ValueMap
from medsd.heatmap.zoom import as_jpeg
from medsd.slides.slide import Slide, open_slide, thumbnail

PROBABILITY = "probability"
_ROUNDING = 1e-6  # map pixels
_UNKNOWN = "Nobody says what the network was trained on, nor for which tissue and scale."


@dataclass(frozen=True)
class SlideView:
    """A picture of a slide and its maps, which a notebook shows where it is the last value of a cell.

    Attributes:
        picture: as drawn, 1,800 px wide.
        name: of the slide.
        words: what it shows, for where no picture can be seen.
    """

    picture: Canvas
    name: str
    words: str

    def __repr__(self) -> str:
        return self.words

    def save(self, path: str | Path) -> None:
        """Write it as PNG.

        Raises:
            OutputError: the file cannot be written.
        """
        self.picture.save(path, self.name)

    def _repr_jpeg_(self) -> bytes:
        """What Jupyter shows; a PNG of stained tissue would make notebooks ten times as large."""
        return as_jpeg(np.asarray(self.picture.image))


def view_slide(
    slide: Slide | str | Path,
    maps: SlideMaps | Mapping[str, ValueMap],
    model: MapModel | None = None,
) -> SlideView:
    """`medsd.view`, see there."""
    if isinstance(slide, str | Path):
        with open_slide(slide) as opened:
            return view_slide(opened, maps, model)
    named = _by_name(maps)
    for name, one in named.items():
        _check_fits(slide, name, one)
    picture = thumbnail(slide, THUMBNAIL_PX)
    known = () if model is None or model.card is None else model.card.learnt_from
    checks = Checks(learnt=learnt_words(named_slides([slide.path])[0], known))
    if isinstance(maps, SlideMaps) and model is not None:
        mapped = mapped_slide(slide.path.stem, slide, maps, model, *picture, checks)
    else:
        mapped = MappedSlide(
            name=slide.path.stem,
            model=_UNKNOWN if model is None else model_words(model),
            misfits=[] if model is None else misfits(slide, model, checks),
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            thumbnail=striped(*picture, maps) if isinstance(maps, SlideMaps) else picture[0],
            thumbnail_level0_px=picture[1],
            damaged=isinstance(maps, SlideMaps) and maps.lost is not None,
            explanations=[_on_its_scale(name, one, model) for name, one in named.items()],
            findings=None,
            provenance={},
            caveats=[],
        )
    words = [f"slide       {slide.path.stem}", *(one.in_words() for one in named.values())]
    return SlideView(overlay_picture(mapped), slide.path.stem, "\n\n".join(words))


def _by_name(maps: SlideMaps | Mapping[str, ValueMap]) -> Mapping[str, ValueMap]:
    if isinstance(maps, SlideMaps):
        alone = maps.probability.target == NO_CLASS  # of an encoder without classes it is 1 everywhere
        return dict(maps.explanations) if alone else {PROBABILITY: maps.probability, **maps.explanations}
    if not isinstance(maps, Mapping) or not maps:
        raise ConfigError("maps: give those of an engine, or a dictionary, such as {'deeplift': saliency}")
    return maps


def _check_fits(slide: Slide, name: str, one: ValueMap) -> None:
    """A map starts at the slide's corner, and its last pixels hold the other one; else it is of another slide."""
    covered = [size * one.level0_px for size in reversed(one.values.shape)]
    over = [(end - side) / one.level0_px for end, side in zip(covered, slide.dimensions, strict=True)]
    if not all(-_ROUNDING <= part <= 1 - _ROUNDING for part in over):
        width, height = slide.dimensions
        raise DatasetError(
            f"maps['{name}']: covers {covered[0]:g} x {covered[1]:g} level-0 px, but {slide.path.name} has "
            f"{width} x {height}; give the maps of this very slide"
        )


def _on_its_scale(name: str, one: ValueMap, model: MapModel | None) -> ShownMap:
    if name == PROBABILITY:
        scale = probability_scale()
        return ShownMap(name, scale.label, one, scale, "From 0 to 1.")
    if not one.seen.any():
        raise ConfigError(f"maps['{name}']: has no values, for no tissue was found; there is nothing to show")
    return shown_map(name, one, None if model is None else model.calibration)
