"""Whole slides' probability maps against their lesions: FROC, slide AUC and Dice, beside maps that know nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.cohort.entry import SlideEntry
from medsd.cohort.outlines import Outlines, holds, known_in_full, raster, read_outlines
from medsd.evaluate.froc import (
    RATES,
    Candidates,
    FrocCurve,
    SlideHits,
    froc_curve,
    judge_candidates,
    map_candidates,
    region_candidates,
    weighted_froc,
    write_candidates,
)
from medsd.evaluate.lesions import Labels, isolated_cells, lesion_labels
from medsd.evaluate.scores import bootstrap_auc, dice, roc_curve
from medsd.files import make_folder
from medsd.heatmap.cohort import read_slide_record
from medsd.heatmap.findings import smallest_region_um2, top_mean
from medsd.heatmap.regions import find_regions
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.intervals import Interval, bootstrap_groups, bootstrap_mean
from medsd.networks.weights import ModelCard
from medsd.tables import write_table

_MASK_UM = 8.0  # about level 5 of the challenge's slides, which it scored at
MODEL, PEAKS, RANDOM, CONSTANT = "model", "model, peaks of regions", "random", "constant"


@dataclass(frozen=True)
class JudgedSlide:
    """What became of a slide's map of one kind.

    Attributes:
        label: 1 with the target, 0 without.
        score: the slide score, see `top_mean`.
        hits: of the map's candidates.
        dice: overlap of pixels above the threshold with the target, 0 to 1; nan without it.
        isolated: lesions that are isolated tumour cells and do not count.
    """

    label: int
    score: float
    hits: SlideHits
    dice: float
    isolated: int


@dataclass(frozen=True)
class MapScores:
    """Scores of one kind of map, with 95 % bootstrap intervals over slides; nan where they have no value.

    Attributes:
        froc: mean sensitivity to lesions at 1/4, 1/2, 1, 2, 4 and 8 false positives a slide.
        sensitivity: at each of these.
        slide_auc: of the slide scores.
        dice: mean over slides with the target.
    """

    froc: Interval
    sensitivity: tuple[float, ...]
    slide_auc: Interval
    dice: Interval


@dataclass(frozen=True)
class LesionScores:
    """Scores of a model's maps, and of controls that are scored in the same way.

    Attributes:
        maps: by kind: the model's, by its maxima and by the peaks of its regions; values drawn evenly from 0 to 1; 1
            everywhere.
        slides, target_slides: how many were scored, and how many of them hold the target.
        lesions, isolated: how many lesions count, and how many are isolated tumour cells, which do not.
    """

    maps: Mapping[str, MapScores]
    slides: int
    target_slides: int
    lesions: int
    isolated: int


def judge_slides(
    entries: Sequence[SlideEntry],
    folder: str | Path,
    card: ModelCard,
    candidates: str | Path,
    seed: int = 0,
    target: str | None = None,
) -> dict[str, list[JudgedSlide]]:
    """Judge the maps of slides, and controls on the same tissue, against the slides' outlines.

    The rules are the challenge's: `lesion_labels`, `isolated_cells` and `judge_candidates`. Slides without a label, and
    such of another class than the first that are not `known_in_full`, are left out.

    Args:
        entries: mapped slides.
        folder: holds a folder a slide with its maps, all by the card's weights.
        card: of calibrated weights.
        candidates: folder that gets a CSV a slide of the model's, see `write_candidates`.
        seed: of the random map.
        target: the class that is mapped; its outlines are the lesions.

    Returns:
        By kind of map, the slides in their order.
    """
    number_of, calibration = card.asked(target)
    assert calibration is not None
    threshold, smallest_um2 = calibration.threshold, smallest_region_um2(card.tile_px, card.mpp)
    judged: dict[str, list[JudgedSlide]] = {name: [] for name in (MODEL, PEAKS, RANDOM, CONSTANT)}
    place = make_folder(candidates)
    for number, entry in enumerate(entries):
        if entry.label is None:
            continue
        scale = read_slide_record(Path(folder) / entry.name)["scale"]
        size = scale["dimensions"][0], scale["dimensions"][1]
        outlines = read_outlines(entry, size, (scale["bounds"][0], scale["bounds"][1]), card.classes)
        if entry.label and not known_in_full(entry, outlines):
            continue
        probability = read_ome_tiff(Path(folder) / entry.name / "probability.ome.tif")
        truth = _truth(entry, outlines, probability, scale, number_of)
        for name, values in _controls(probability, np.random.default_rng((seed, number))).items():
            shown = replace(probability, values=values)
            found = map_candidates(shown).within(size)
            seen = shown.seen
            score, overlap = top_mean(values[seen]), dice(values[seen] > threshold, truth.inside[seen])
            judged[name].append(JudgedSlide(truth.label, score, truth.hits(found), overlap, len(truth.isolated)))
            if name == MODEL:
                write_candidates(place / f"{entry.name}.csv", found)
                regions = find_regions(shown, threshold, scale["mpp"], size, min_area_um2=smallest_um2)
                hits = truth.hits(region_candidates(regions).within(size))
                judged[PEAKS].append(replace(judged[MODEL][-1], hits=hits))
    return judged


def score_lesions(judged: Mapping[str, Sequence[JudgedSlide]]) -> LesionScores:
    """Scores of what `judge_slides` gives."""
    model = judged[MODEL]
    return LesionScores(
        {name: _scores(slides) for name, slides in judged.items()},
        len(model),
        sum(one.label for one in model),
        sum(len(one.hits.lesions) for one in model),
        sum(one.isolated for one in model),
    )


def write_lesion_scores(folder: str | Path, judged: Mapping[str, Sequence[JudgedSlide]], scores: LesionScores) -> None:
    """Leave `lesions.csv` (a row a kind of map), `froc.csv` and `roc.csv` (the points of the curves).

    Raises:
        OutputError: `folder` cannot be written to.
    """
    folder = Path(folder)
    rows = []
    for name, found in scores.maps.items():
        row: dict[str, Any] = {"map": name}
        for key in ("froc", "slide_auc", "dice"):
            interval: Interval = getattr(found, key)
            row |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
        at = {f"sensitivity_at_{rate:g}": one for rate, one in zip(RATES, found.sensitivity, strict=True)}
        rows.append({**row, **at, "slides": scores.slides, "lesions": scores.lesions, "isolated": scores.isolated})
    write_table(folder / "lesions.csv", rows)
    frocs: list[dict[str, Any]] = []
    rocs: list[dict[str, Any]] = []
    for name, slides in judged.items():
        if (curve := curve_of(slides)) is not None:
            frocs += _points(name, asdict(curve))
        if name != PEAKS and len({one.label for one in slides}) == 2:
            rates = roc_curve([one.label for one in slides], [one.score for one in slides])
            rocs += _points(name, dict(zip(("false_positive_rate", "sensitivity", "thresholds"), rates, strict=True)))
    write_table(folder / "froc.csv", frocs, ("map", "false_per_slide", "sensitivity", "thresholds"))
    write_table(folder / "roc.csv", rocs, ("map", "false_positive_rate", "sensitivity", "thresholds"))


def curve_of(slides: Sequence[JudgedSlide]) -> FrocCurve | None:
    """The FROC curve; None without lesions."""
    return froc_curve([one.hits for one in slides]) if any(len(one.hits.lesions) for one in slides) else None


@dataclass(frozen=True)
class _Truth:
    """Whether a slide has the target, where on the map's grid, and its lesions on a finer one."""

    label: int
    inside: npt.NDArray[np.bool_]
    lesions: Labels
    isolated: npt.NDArray[np.int64]
    level0_px: float

    def hits(self, candidates: Candidates) -> SlideHits:
        return judge_candidates(candidates, self.lesions, self.isolated, self.level0_px)


def _truth(
    entry: SlideEntry, outlines: Outlines | None, probability: ValueMap, scale: Mapping[str, Any], target: int
) -> _Truth:
    (width, height), level0_px = scale["dimensions"], _MASK_UM / scale["mpp"]
    inside = raster(outlines, target, probability.values.shape, probability.level0_px)
    fine = raster(outlines, target, (math.ceil(height / level0_px), math.ceil(width / level0_px)), level0_px)
    labels = lesion_labels(fine, _MASK_UM)
    return _Truth(int(holds(entry, outlines, target)), inside, labels, isolated_cells(labels, _MASK_UM), level0_px)


def _controls(probability: ValueMap, random: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """The map's values, and those of maps that know nothing but the tissue."""
    values, seen = probability.values, probability.seen
    drawn = random.random(values.shape, np.float32)
    return {MODEL: values, RANDOM: np.where(seen, drawn, np.nan), CONSTANT: np.where(seen, np.float32(1), np.nan)}


def _scores(slides: Sequence[JudgedSlide]) -> MapScores:
    curve, overlap = curve_of(slides), np.array([one.dice for one in slides])
    froc, sensitivity = Interval(math.nan), (math.nan,) * len(RATES)
    if curve is not None:
        froc = bootstrap_groups(weighted_froc([one.hits for one in slides]), np.arange(len(slides)))
        sensitivity = tuple(curve.at().tolist())
    area = bootstrap_auc([one.label for one in slides], [one.score for one in slides])
    return MapScores(froc, sensitivity, area, bootstrap_mean(overlap[~np.isnan(overlap)]))


def _points(name: str, columns: Mapping[str, npt.NDArray[np.float64]]) -> Iterator[dict[str, Any]]:
    """A row a point of a curve."""
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield {"map": name, **dict(zip(columns, values, strict=True))}
