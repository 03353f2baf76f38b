"""FROC as CAMELYON16 scored it: a map's candidates against a slide's lesions, sensitivity against false positives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.evaluate.lesions import Labels
from medsd.evaluate.scores import Floats
from medsd.files import write_text
from medsd.heatmap.regions import Region
from medsd.heatmap.value_map import ValueMap

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a slide, at which the challenge averages sensitivity."""
NMS_UM = 190.0
"""Half the side of the square that a candidate has to itself: 12 pixels of level 6, as in NCRF (Li and Ping 2018)."""


@dataclass(frozen=True)
class Candidates:
    """Places of a slide that may be lesions.

    Attributes:
        confidence: (n,) above 0.
        x, y: (n,) level-0 pixels.
    """

    confidence: Floats
    x: Floats
    y: Floats

    def within(self, size_px: tuple[int, int]) -> Candidates:
        """Moved onto the slide (width, height): a map's last pixels may be centred off it. Level-0 pixels."""
        width, height = size_px
        return Candidates(self.confidence, self.x.clip(max=width - 1), self.y.clip(max=height - 1))


@dataclass(frozen=True)
class SlideHits:
    """What became of a slide's candidates.

    Attributes:
        false_positives: (n,) confidences off all lesions.
        lesions: (m,) the highest confidence in each lesion that counts; 0 where it was missed.
    """

    false_positives: Floats
    lesions: Floats


@dataclass(frozen=True)
class FrocCurve:
    """Sensitivity against false positives, from nothing called a lesion to every candidate.

    Attributes:
        false_per_slide: (n,) rising from 0.
        sensitivity: (n,) share of the lesions found, 0 to 1.
        thresholds: (n,) falling from infinity: candidates of this confidence or a higher one count.
    """

    false_per_slide: Floats
    sensitivity: Floats
    thresholds: Floats

    def at(self, rates: Sequence[float] = RATES) -> Floats:
        """Sensitivity at so many false positives a slide: linear between points, the last one's beyond it."""
        return np.interp(rates, self.false_per_slide, self.sensitivity)


def map_candidates(probability: ValueMap, distance_um: float = NMS_UM) -> Candidates:
    """The map's maxima, each alone in its square (non-maximum suppression, MONAI's `ProbNMS`), highest first.

    Args:
        probability: above 0 where a lesion may be.
        distance_um: half the square's side.

    Raises:
        ConfigError: a distance that is not above 0.

    Example:
        >>> values = np.array([[0.9, 0.0, 0.0, 0.7], [0.8, 0.0, np.nan, 0.0]], np.float32)
        >>> found = map_candidates(ValueMap(values, 100.0, 25.0, "probability", "tumour", "drawn", ""), 25.0)
        >>> found.confidence.round(1).tolist(), found.x.tolist(), found.y.tolist()
        ([0.9, 0.7], [50.0, 350.0], [50.0, 50.0])
    """
    from monai.transforms.post.array import ProbNMS

    check_number("distance_um", distance_um, "(0, inf)")
    side = 2 * max(1, round(distance_um / probability.mpp)) + 1  # odd: as far to either side
    values = np.nan_to_num(probability.values, copy=True)  # which is altered
    found = np.array(ProbNMS(prob_threshold=0.0, box_size=side)(values), np.float64).reshape(-1, 3)
    confidence, row, column = found.T
    return Candidates(confidence, (column + 0.5) * probability.level0_px, (row + 0.5) * probability.level0_px)


def region_candidates(regions: Sequence[Region]) -> Candidates:
    """The regions that outputs show, each by its peak."""
    places = np.array([region.peak for region in regions], np.float64).reshape(-1, 2)
    return Candidates(np.array([region.max_probability for region in regions], np.float64), *places.T)


def write_candidates(path: str | Path, candidates: Candidates) -> None:
    """Write candidates as the challenge takes them, atomically: lines of confidence, x, y (level-0 pixels), no header.

    Raises:
        OutputError: the file cannot be written.
    """
    places = (np.floor(values).astype(int).tolist() for values in (candidates.x, candidates.y))
    rows = zip(candidates.confidence.tolist(), *places, strict=True)
    lines = [f"{confidence:.6g},{x},{y}\n" for confidence, x, y in rows]
    write_text(path, "".join(lines))


def judge_candidates(candidates: Candidates, labels: Labels, excluded: npt.ArrayLike, level0_px: float) -> SlideHits:
    """Which candidates lie in which lesions.

    A candidate in a lesion that is excluded is neither a hit nor a false positive.

    Args:
        candidates: of the slide.
        labels: the slide's `lesion_labels`.
        excluded: numbers of the lesions that do not count, those of `isolated_cells`.
        level0_px: side of a pixel of `labels` in level-0 pixels, whatever the pyramid's factor.

    Raises:
        DatasetError: a candidate lies off the slide.
    """
    rows, columns = (np.floor(values / level0_px).astype(np.int64) for values in (candidates.y, candidates.x))
    height, width = labels.shape
    if ((rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)).any():
        raise DatasetError("lesion candidates: some lie off the slide; give level-0 pixels of this slide")
    hit = labels[rows, columns]
    best = np.zeros(int(labels.max(initial=0)) + 1)
    np.maximum.at(best, hit, candidates.confidence)
    counted = np.setdiff1d(np.arange(1, len(best)), np.asarray(excluded))
    return SlideHits(candidates.confidence[hit == 0], best[counted])


def froc_curve(slides: Sequence[SlideHits]) -> FrocCurve:
    """The curve of all slides, those without tumour too.

    As the challenge's, but for its lowest confidence: there, and in MONAI's `compute_froc_curve_data`, the lowest of
    all values is no threshold, which is right while that is a missed lesion's 0. Where no lesion was missed it leaves
    the last candidate out.

    Raises:
        DatasetError: no slides, or none with a lesion that counts.
    """
    if not sum(len(one.lesions) for one in slides):
        raise DatasetError("FROC: no lesions; it needs slides with outlined tumour beside those without")
    return _weighted_curve(slides)(np.ones(len(slides)))


def weighted_froc(slides: Sequence[SlideHits]) -> Callable[[Floats], float]:
    """The FROC score, mean sensitivity at `RATES`, as a function of the slides' weights, for `bootstrap_groups`.

    It is nan where no lesion has weight.
    """
    curve, lesions = _weighted_curve(slides), np.array([len(one.lesions) for one in slides])
    return lambda weight: float(curve(weight).at().mean()) if weight @ lesions else math.nan


def _weighted_curve(slides: Sequence[SlideHits]) -> Callable[[Floats], FrocCurve]:
    """The curve as a function of the slides' weights; sorted once."""
    kinds = [one.false_positives for one in slides], [one.lesions for one in slides]
    wrong, lesions = (np.array([len(part) for part in parts]) for parts in kinds)
    confidence = np.concatenate([*kinds[0], *kinds[1]])
    numbers = np.arange(len(slides))
    order = np.argsort(-confidence, kind="stable")[: np.count_nonzero(confidence > 0)]
    falling, is_lesion = confidence[order], order >= wrong.sum()
    slide = np.concatenate([np.repeat(numbers, wrong), np.repeat(numbers, lesions)])[order]
    last = np.flatnonzero(np.diff(falling, append=-1.0))  # candidates of one confidence come together
    thresholds = np.concatenate([[math.inf], falling[last]])

    def curve(weight: Floats) -> FrocCurve:
        each = weight[slide]
        false_positives, hits = (
            np.concatenate([[0.0], np.cumsum(each * kind)[last]]) for kind in (~is_lesion, is_lesion)
        )
        return FrocCurve(false_positives / weight.sum(), hits / (weight @ lesions), thresholds)

    return curve
