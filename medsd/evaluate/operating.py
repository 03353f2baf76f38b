"""Operating points, fixed on validation slides: where a region begins, and which slides are raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import shapely
from scipy import stats

from medsd.errors import DatasetError
from medsd.evaluate.lesions import lesion_labels
from medsd.evaluate.scores import check_scores, dice
from medsd.heatmap.regions import Region, find_regions
from medsd.heatmap.value_map import ValueMap
from medsd.intervals import LEVEL
from medsd.networks.calibrated import LesionPoint, SlideCutOff

# Slides with the target that a cut-off may miss, as a share: one odd slide of twenty moves it no more (our choice).
_MISSED = 0.05
_STEPS = 128  # thresholds that are tried at most


@dataclass(frozen=True)
class JudgedMap:
    """A validation slide's probability map with what is known of the slide.

    Attributes:
        probability: the map.
        inside: (height, width) on its grid, where the target is outlined.
        exhaustive: whether that is all of it on the slide.
        slide_mpp: micrometres per level-0 pixel.
        dimensions: (width, height) at level 0.
        outlined: where any class is outlined, as `inside`; None where only the target is.
    """

    probability: ValueMap
    inside: npt.NDArray[np.bool_]
    exhaustive: bool
    slide_mpp: float
    dimensions: tuple[int, int]
    outlined: npt.NDArray[np.bool_] | None = None

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(height, width): what is seen and has a label."""
        outlined = self.inside if self.outlined is None else self.outlined
        return self.probability.seen if self.exhaustive else self.probability.seen & outlined

    @cached_property
    def _lesions(self) -> tuple[npt.NDArray[np.int32], shapely.STRtree]:
        """The lesion of each map pixel that lies in one, and their centres in level-0 pixels."""
        labels = lesion_labels(self.inside, self.probability.mpp)
        rows, columns = np.nonzero(labels)
        side = self.probability.level0_px
        return labels[rows, columns], shapely.STRtree(shapely.points((columns + 0.5) * side, (rows + 0.5) * side))

    @property
    def lesions(self) -> int:
        """How many lesions there are."""
        return len(np.unique(self._lesions[0]))

    def judge(self, regions: Sequence[Region]) -> tuple[int, int]:
        """How many regions lie off all lesions, and how many lesions a region touches."""
        labels, places = self._lesions
        polygons = np.array([region.polygon for region in regions], dtype=object)
        region, place = places.query(polygons, predicate="covers")
        return len(regions) - len(np.unique(region)), len(np.unique(labels[place]))


def lesion_threshold(
    maps: Sequence[JudgedMap], budget: float, smallest_um2: float, target: str = "tumour"
) -> tuple[float, LesionPoint]:
    """The threshold of regions: as many lesions as can be found with `budget` false regions a slide, drawn best.

    From the highest probability down, as long as the regions off the target (`lesion_labels`, on the map's grid) are
    within the budget on average: the lowest of these finds the most lesions. Of all that find as many the one is taken
    whose pixels overlap it best (Dice), for the lowest may spread far beyond it where nothing else is near
    (our choice). Where no region keeps within the budget it is the highest probability, above which there is none.

    Args:
        maps: validation slides, some of them outlined in full.
        budget: false regions a slide; counted on slides that are outlined in full.
        smallest_um2: smaller regions are left out, as they are of slides that are mapped.
        target: the class, for messages.

    Raises:
        DatasetError: no slide is outlined in full, or the target is on none.
    """
    slides = sum(one.exhaustive for one in maps)
    if not slides:
        raise DatasetError("no validation slide is outlined in full: nobody knows which regions are false")
    truth = np.concatenate([one.inside[one.known] for one in maps])
    if not truth.any():
        raise DatasetError(f"no {target} on any validation slide; change validation_share or seed")
    values = np.concatenate([one.probability.values[one.known] for one in maps])
    tried: list[tuple[int, float, int, float]] = []
    for threshold in _thresholds(values):
        false_regions = found = 0
        for one in maps:
            regions = find_regions(one.probability, threshold, one.slide_mpp, one.dimensions, min_area_um2=smallest_um2)
            wrong, hit = one.judge(regions)
            false_regions, found = false_regions + wrong * one.exhaustive, found + hit
        if false_regions > budget * slides:
            break
        tried.append((found, dice(values > threshold, truth), false_regions, threshold))
    found, _, false_regions, threshold = max(tried, key=lambda one: (*one[:2], -one[2], -one[3]))
    return threshold, LesionPoint(budget, slides, false_regions, sum(one.lesions for one in maps), found)


def slide_cut_off(labels: npt.ArrayLike, scores: npt.ArrayLike) -> SlideCutOff | None:
    """The highest cut-off that finds at least 95 % of the slides with the target, all of fewer than 20 (our choice).

    It lies midway between the lowest score that is found and the next one below it, of any slide.

    Args:
        labels: (n,) 1 with the target, 0 without.
        scores: (n,) slide scores.

    Returns:
        None without a slide of the target.

    Raises:
        DatasetError: as `medsd.evaluate.scores.auc`.

    Example:
        >>> found = slide_cut_off([1, 1, 0, 0], [0.9, 0.7, 0.5, 0.8])
        >>> round(found.score, 3), found.found, found.raised, found.sensitivity
        (0.6, 2, 1, (1.0, 0.158..., 1.0))
    """
    tumour, values = check_scores(labels, scores)
    if not tumour.any():
        return None
    lowest = float(np.sort(values[tumour])[int(_MISSED * np.count_nonzero(tumour))])
    below = values[values < lowest]
    middle = (lowest + float(below.max())) / 2 if below.size else lowest
    score = middle if middle > below.max(initial=-np.inf) else lowest  # between neighbours lies no number
    raised = values >= score
    found, alarms = (int(np.count_nonzero(part & raised)) for part in (tumour, ~tumour))
    positives, negatives = int(np.count_nonzero(tumour)), int(np.count_nonzero(~tumour))
    specificity = _share(negatives - alarms, negatives) if negatives else None
    return SlideCutOff(score, positives, found, negatives, alarms, _share(found, positives), specificity)


def _thresholds(values: npt.NDArray[np.float32]) -> list[float]:
    """Falling: of each the share of the values (n,) above it is at most about a tenth more than of the one before."""
    falling = np.sort(values)[::-1]
    places = np.unique(np.geomspace(1, len(falling), _STEPS).astype(np.int64)) - 1
    return np.unique(falling[places])[::-1].tolist()  # type: ignore[no-any-return]


def _share(part: int, whole: int) -> tuple[float, float, float]:
    bounds = stats.binomtest(part, whole).proportion_ci(LEVEL, "exact")
    return part / whole, float(bounds.low), float(bounds.high)
