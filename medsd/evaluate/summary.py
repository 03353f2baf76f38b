"""Scores of a trained classifier on held-out data: tiles, slides, and where its saliency lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.classes import CLASSES
from medsd.cohort.entry import SlideEntry
from medsd.cohort.outlines import holds, raster, read_outlines
from medsd.errors import DatasetError
from medsd.evaluate.scores import Interval, PointingShare, auc, bootstrap_auc, inside_share
from medsd.heatmap.cohort import read_slide_record
from medsd.heatmap.report import SlideResult
from medsd.heatmap.tiff import read_ome_tiff


@dataclass(frozen=True)
class TileScores:
    """Scores on tiles or patches.

    Attributes:
        patch_auc: AUC with a 95 % bootstrap interval over tiles.
        patch_auc_by_group: the same with whole slides (or stain clusters) resampled, which tiles of one slide ask for.
        items, target_items, groups: how many tiles, tiles of the target, and slides (or clusters).
    """

    patch_auc: Interval
    patch_auc_by_group: Interval
    items: int
    target_items: int
    groups: int


@dataclass(frozen=True)
class SlideScores:
    """Scores on whole slides, from their maps.

    Attributes:
        slide_auc: AUC of the slide scores; nan when one class only.
        slides: slide scores with their labels (1 with the target), by name.
        pointing: for each annotated slide, how much of its positive saliency lies in the target's outlines.
        mean_pointing_ratio: mean of the slides' ratios, those without one left out; nan without any.
        quantity: what the maps are that point, "saliency" or "mask"; empty without any.
    """

    slide_auc: float
    slides: dict[str, tuple[int, float]]
    pointing: dict[str, PointingShare]
    mean_pointing_ratio: float
    quantity: str


def score_tiles(
    labels: npt.NDArray[np.int8], scores: npt.NDArray[np.float32], groups: npt.NDArray[np.str_]
) -> TileScores:
    """Scores of tiles, (n,) each: labels 0 or 1, and a score that rises with the probability of 1."""
    by_tile, by_group = bootstrap_auc(labels, scores), bootstrap_auc(labels, scores, groups)
    return TileScores(by_tile, by_group, len(labels), int(labels.sum()), len(np.unique(groups)))


def score_slides(
    entries: Sequence[SlideEntry],
    results: Sequence[SlideResult],
    folder: str | Path,
    weights_sha256: str,
    classes: Sequence[str] = CLASSES,
    target: int = 1,
) -> SlideScores:
    """Scores of mapped slides against their labels and annotations.

    Args:
        entries: the slides with their labels.
        results: what became of them; those not "ok" are left out.
        folder: holds a folder a slide with its maps.
        weights_sha256: of the weights whose maps they must be.
        classes: names by the numbers of labels.
        target: the class that is mapped.

    Raises:
        DatasetError: maps of other weights, or of another class.
    """
    scored = {result.slide: float(result.score or 0.0) for result in results if result.status == "ok"}
    slides, pointing, quantity = {}, {}, ""
    for entry in entries:
        if entry.name not in scored:
            continue
        record = read_slide_record(Path(folder) / entry.name)
        if record["recipe"]["weights_sha256"] != weights_sha256:
            raise DatasetError(f"{Path(folder) / entry.name}: maps of other weights; run the stage 'heatmap' again")
        if (mapped := record.get("target") or classes[target]) != classes[target]:
            where = Path(folder) / entry.name
            raise DatasetError(f"{where}: maps of {mapped}, not of {classes[target]}; run the stage 'heatmap' again")
        scale = record["scale"]
        outlines = read_outlines(entry, tuple(scale["dimensions"]), tuple(scale["bounds"][:2]), classes)
        if entry.label is not None:
            slides[entry.name] = int(holds(entry, outlines, target)), scored[entry.name]
        # Saliency on what nobody outlined would count as stray.
        outlined = entry.annotation is not None and entry.exhaustive
        if outlined or not quantity:
            saliency = read_ome_tiff(Path(folder) / entry.name / "saliency.ome.tif")
            quantity = quantity or saliency.quantity
        if outlined:
            inside = raster(outlines, target, saliency.values.shape, saliency.level0_px)
            pointing[entry.name] = inside_share(saliency.values, inside, saliency.seen)
    labels, scores = zip(*slides.values(), strict=True) if slides else ((), ())
    ratios = [share.ratio for share in pointing.values() if math.isfinite(share.ratio)]
    ratio = float(np.mean(ratios)) if ratios else math.nan
    return SlideScores(auc(labels, scores), slides, pointing, ratio, quantity)


def score_text(value: float | None, digits: int = 3) -> str:
    """A score of `as_json` in words; a dash where it has no value (one class only, no annotation)."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval_text(found: Mapping[str, Any]) -> str:
    """An `Interval` of `as_json` in words."""
    if found["low"] is None or found["high"] is None:
        return f"{score_text(found['value'])}, no interval"
    return f"{score_text(found['value'])}, 95 % interval {score_text(found['low'])} to {score_text(found['high'])}"
