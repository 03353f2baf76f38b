"""What a slide's maps come to, for the eye: regions, score, colour scales, where all of it comes from, caveats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.cohort.entry import SlideEntry, file_words
from medsd.cohort.learnt import learnt_words
from medsd.heatmap.appearance import AppearanceCheck
from medsd.heatmap.faithfulness import Faithfulness, Randomised, judge_map
from medsd.heatmap.legend import ADDITIVE, MASK, evidence_word
from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.model import MapModel
from medsd.heatmap.numbers import percent, score_texts
from medsd.heatmap.overlay import Findings, MappedSlide, ShownMap, shown_explanation
from medsd.heatmap.regions import Region, find_regions
from medsd.heatmap.sample import LEAST_TILES, sample_tiles
from medsd.heatmap.value_map import ValueMap
from medsd.networks.calibrated import Calibration, SlideCutOff
from medsd.networks.weights import ModelCard
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide, hatched

_PERCENTILE = 99.5
_TOP_SHARE = 0.01
_TOP_REGIONS = 8
_REGION_PICTURE_PX = 192
# Of the network's scale: what a finer slide has is averaged, what a coarser one lacks is gone (our choice).
_COARSER = 1.1


@dataclass(frozen=True)
class Checks:
    """What was measured on tiles drawn from a slide; None each where it was not.

    Attributes:
        faithful: how far the answer follows the map.
        appearance: whether the tiles look like those of validation.
        learnt: what is to be said of a slide that the network learnt from; empty of others.
    """

    faithful: Faithfulness | None = None
    appearance: AppearanceCheck | None = None
    learnt: str = ""

    @property
    def warnings(self) -> list[str]:
        """What a reader has to be warned of."""
        measured = [found.warning for found in (self.appearance, self.faithful) if found is not None]
        return [words for words in (self.learnt, *measured) if words]


_UNCHECKED = Checks()


def check_slide(model: MapModel, entry: SlideEntry, slide: Slide, saliency: ValueMap, faithful_tiles: int) -> Checks:
    """Draw tiles of a slide, as the network sees it, and judge map and looks by them; was it learnt from?

    Args:
        model: a classifier; of an encoder alone nothing is measured.
        entry, slide, saliency: what was mapped, as the network sees it, and its map.
        faithful_tiles: see `MapRequest`.
    """
    if model.card is None:
        return Checks()
    sample = sample_tiles(model.engine, slide, saliency, faithful_tiles or LEAST_TILES)
    faithful = judge_map(model.engine, sample) if faithful_tiles else None
    appearance = None if model.appearance is None else model.appearance.compare(sample.images)
    return Checks(faithful, appearance, learnt_words(entry, model.card.learnt_from))


def mapped_slide(
    name: str,
    slide: Slide,
    maps: SlideMaps,
    model: MapModel,
    picture: RGB,
    level0_px: float,
    checks: Checks = _UNCHECKED,
) -> MappedSlide:
    """What is shown of a slide with tissue, by the `name` of its outputs, which no other slide has; a pixel of its
    thumbnail `picture` is `level0_px` wide."""
    card, calibration = model.card, model.calibration
    return MappedSlide(
        name=name,
        model=model_words(model),
        misfits=misfits(slide, model, checks),
        dimensions=slide.dimensions,
        mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        thumbnail=striped(picture, level0_px, maps),
        thumbnail_level0_px=level0_px,
        damaged=maps.lost is not None,
        explanations=[shown_map(name, shown, calibration) for name, shown in maps.explanations.items()],
        findings=None if card is None or calibration is None else _findings(slide, maps, card, calibration),
        provenance=_provenance(slide, maps, model),
        caveats=list(_caveats(slide, maps, model, checks)),
    )


def striped(picture: RGB, level0_px: float, maps: SlideMaps) -> RGB:
    """A slide's thumbnail, whose pixels are `level0_px` wide, with grey stripes where something was not decoded."""
    if maps.lost is None:
        return picture
    scale = level0_px / maps.saliency.level0_px
    rows, columns = (((np.arange(size) + 0.5) * scale).astype(np.int64) for size in picture.shape[:2])
    inside = rows.clip(max=maps.lost.shape[0] - 1), columns.clip(max=maps.lost.shape[1] - 1)
    return hatched(picture, maps.lost[np.ix_(*inside)])


def looked_at_mm2(maps: SlideMaps) -> float:
    """The area of the map pixels that have a value."""
    shown = maps.saliency
    return float(shown.seen.sum()) * shown.mpp**2 / 1e6


def top_mean(probabilities: npt.NDArray[np.float32]) -> float:
    """Slide score: the mean of the highest 1 % of the tissue's probabilities, at least one (our choice).

    The single highest would follow one odd place; the mean of all would lose a small metastasis.
    """
    count = max(1, round(_TOP_SHARE * len(probabilities)))
    return float(np.partition(probabilities, -count)[-count:].mean(dtype=np.float64))


def smallest_region_um2(tile_px: int, mpp: float) -> float:
    """A tile's area: a region below it cannot be told from noise, for a probability speaks of a tile (our choice)."""
    return (tile_px * mpp) ** 2


def verdict(score: float, cut_off: SlideCutOff | None, target: str) -> tuple[str, ...]:
    """What a slide score means, by what its cut-off did on validation slides; then how sure that is."""
    if cut_off is None:
        return ("No cut-off is known for these weights: the slide score has no verdict.",)
    side = "At or above" if score >= cut_off.score else "Below"
    normal = f"raised {cut_off.raised} of {cut_off.without} without it" if cut_off.without else "met none without it"
    said = (
        f"{side} the cut-off {score_texts(score, cut_off.score)[1]}, which found {cut_off.found} of {cut_off.having} "
        f"validation slides with {target} and {normal}."
    )
    shares = [("Sensitivity", cut_off.sensitivity), ("specificity", cut_off.specificity)]
    known = [
        f"{word} {percent(one[0])} (95 % interval {percent(one[1])} to {percent(one[2])})"
        for word, one in shares
        if one
    ]
    return said, f"{', '.join(known)}, on the slides that the cut-off was fixed on."


def _findings(slide: Slide, maps: SlideMaps, card: ModelCard, calibration: Calibration) -> Findings:
    probability, threshold = maps.probability, calibration.threshold
    smallest_um2 = smallest_region_um2(card.tile_px, card.mpp)
    regions = find_regions(probability, threshold, slide.mpp, slide.dimensions, maps.saliency, smallest_um2)
    score = top_mean(probability.values[probability.seen])
    return Findings(
        probability=probability,
        threshold=threshold,
        threshold_source=_threshold_source(calibration),
        regions=regions,
        region_pictures=[_region_picture(slide, region) for region in regions[:_TOP_REGIONS]],
        score=score,
        cut_off=None if calibration.cut_off is None else calibration.cut_off.score,
        verdict=verdict(score, calibration.cut_off, probability.target),
    )


def _threshold_source(calibration: Calibration) -> str:
    source, point = f"fixed on {calibration.source}", calibration.lesions
    if point is None:
        return source
    return (
        f"{source}, where it leaves {point.false_regions} false region(s) on {point.slides} slide(s) (allowed: "
        f"{point.budget:g} a slide) and touches {point.found} of {point.lesions} lesion(s)"
    )


def shown_map(name: str, shown: ValueMap, calibration: Calibration | None) -> ShownMap:
    """A method's map on the scale of the weights, or, of a method that they do not know, on one of its own."""
    if name == MASK:
        return shown_explanation(name, shown, 1.0, "From all masks closed to all open.")
    known = calibration.limits.get(name) if calibration else None
    if known and calibration:
        where, compared = calibration.source, "the same colours on every slide of this model"
    else:
        known = float(np.percentile(np.abs(shown.values[shown.seen]), _PERCENTILE)) or 1.0
        where, compared = "this slide", "compare no colours between slides"
    limits = f"The scale ends at the {_PERCENTILE:g}th percentile of absolute values in {where}: {compared}."
    return shown_explanation(name, shown, known, limits)


def _caveats(slide: Slide, maps: SlideMaps, model: MapModel, checks: Checks) -> Iterator[str]:
    if maps.unseen:
        yield (
            f"The slide file is damaged: {percent(maps.unseen, 1)} of the tissue (grey stripes) could not be decoded "
            "and was not judged."
        )
    if model.card is None:
        yield "The encoder has learned no classes: its maps show what its features hold, not where any class is."
    else:
        yield f"The classifier was trained on {model.card.trained_on}; on other material its scores mean little."
        yield (
            "Whether the answer follows the map was not measured on this slide."
            if checks.faithful is None
            else checks.faithful.words
        )
        # What is out of range stands above, in red.
        if checks.appearance is None:
            yield "Whether this slide looks like those of validation was not measured."
        elif not checks.appearance.warning:
            yield checks.appearance.words


def model_words(model: MapModel) -> str:
    """What the network was trained on, for which tissue, scale and prevalence: what every output says first."""
    card = model.card
    if card is None:
        return f"Encoder alone, taken at {model.engine.mpp:g} µm per pixel; it has learned no classes."
    return (
        f"Classifier trained on {card.trained_on}; tissue: {card.tissue or 'not stated'}; at {card.mpp:g} µm per "
        f"pixel. {prevalence_words(card, model.engine.target, model.calibration)}"
        f"{_others_words(card, model.engine.target)}"
    )


def _others_words(card: ModelCard, target: int) -> str:
    """Of three or more classes: that a map of one says nothing of which of the others is there; empty of two."""
    *others, last = (name for number, name in enumerate(card.classes) if number != target)
    if not others:
        return ""
    known = f"{', '.join(others)} and {last}"
    return (
        f" Mapped: {card.classes[target]} alone, against {known}, which are not told apart here: tissue in grey or "
        "blue may be any of these."
    )


def prevalence_words(card: ModelCard, target: int, calibration: Calibration | None) -> str:
    """The share of the target in tissue that calibrated probabilities assume, a sentence."""
    name = card.classes[target]
    if calibration is None or not calibration.offset:
        return f"Probabilities are not corrected for how rare {name} is."
    share = 100 * calibration.tissue_shares[target]
    return f"Probabilities assume that {share:.2g} % of the tissue is {name}, as in the {calibration.source}."


def misfits(slide: Slide, model: MapModel, checks: Checks = _UNCHECKED) -> list[str]:
    """Where a slide is not what the network was trained for, as far as its scale, looks and answers tell."""
    return scale_misfits(slide, model.engine.mpp) + checks.warnings


def scale_misfits(slide: Slide, mpp: float) -> list[str]:
    """Where a slide's scale is in doubt, or coarser than what a network takes, at `mpp`; none where it is not."""
    doubts = [slide.mpp_doubt] if slide.mpp_doubt else []
    if slide.mpp <= _COARSER * mpp:
        return doubts
    return [
        *doubts,
        f"Does not fit: the slide has {slide.mpp:g} µm per pixel, the network takes {mpp:g}. It was enlarged, and "
        "detail that the network looks for is missing.",
    ]


def _provenance(slide: Slide, maps: SlideMaps, model: MapModel) -> Mapping[str, str]:
    engine, card = model.engine, model.card
    found = {}
    if ADDITIVE in maps.explanations and maps.moved is not None:
        before = "before it was smoothed, " if engine.settings.smooth_um else ""
        word = evidence_word(len(engine.classifier.classes))
        found["Adds up"] = f"to the {word} of every tile, {before}by a correction of {percent(maps.moved, 1)}"
    if maps.seam is not None:
        found["Seams"] = f"{maps.seam:.2f} (jump across block borders over beside them)"
    found["Looked at"] = f"{looked_at_mm2(maps):.2f} mm² of tissue; not at pen marks with a rim, nor at specks"
    found |= slide_file(slide)
    if card is None:
        found["Encoder"] = f"{model.name} at {engine.mpp:g} µm per pixel"
    else:
        found["Classifier"] = f"{model.name}, tiles of {card.tile_px} px at {card.mpp:g} µm per pixel"
        if card.randomised is not None and engine.target == 1:
            found["Random weights"] = Randomised(**card.randomised).words
    return found | {"Weights SHA-256": model.sha256}


def slide_file(slide: Slide) -> dict[str, str]:
    """Where a slide's pixels come from: its file as of `file_words`, and its reader."""
    return {"Slide file": f"{file_words(slide.path)}, read by {slide.reader}"}


def _region_picture(slide: Slide, region: Region) -> RGB:
    """The region with a margin, as a small square picture."""
    left, top, right, bottom = region.polygon.bounds
    side = 1.2 * max(right - left, bottom - top, _REGION_PICTURE_PX)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    size = _REGION_PICTURE_PX, _REGION_PICTURE_PX
    pixels, seen = slide.read_seen(x, y, *size, mpp=slide.mpp * side / _REGION_PICTURE_PX)
    return pixels if seen is None else hatched(pixels, ~seen)
