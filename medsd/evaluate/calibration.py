"""Threshold and colour scale, fixed once on validation data and kept with the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from medsd.annotations import rasterise, read_annotations
from medsd.cohort.dataset import Sample
from medsd.cohort.entry import SlideEntry
from medsd.errors import DatasetError
from medsd.evaluate.scores import youden_threshold
from medsd.heatmap.engine import Engine
from medsd.heatmap.value_map import ValueMap
from medsd.networks.weights import Calibration
from medsd.progress import Progress, no_progress
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue

SCALE_PERCENTILE = 99.5
_HIGHEST_THRESHOLD = 0.99
_SCALE_FROM = 256  # patches


def calibrate_on_slides(
    engine: Engine,
    slides: Sequence[SlideEntry],
    progress: Progress = no_progress,
    normaliser: StainNormaliser | None = None,
) -> Calibration:
    """Threshold and scale from the maps of validation slides, their stain normalised if the classifier's tiles were.

    The threshold is Youden's on map pixels against the annotation (normal slides count as all normal); the scale
    ends at the 99.5th percentile of |saliency| in their tissue (both our choice), that of masks at 1.
    The engine's temperature is kept with the threshold, which holds for tempered probabilities.

    Raises:
        DatasetError: the slides show one class only.
    """
    labels, probabilities, saliencies = [], [], []
    for entry in progress(slides, len(slides), "slide"):
        with IsolatedSlide(entry.path, entry.mpp) as slide:
            tissue = find_tissue(slide)
            seen = slide if normaliser is None or not tissue.mask.any() else normaliser.slide(slide, tissue)
            maps = engine.map(seen, tissue, progress)
            slide_size_px = slide.dimensions
        probability = maps.probability
        tumour = tumour_on(probability, entry, slide_size_px)
        # Outside the outlines of a slide that is partly annotated nobody knows what the tissue is.
        known = probability.seen if entry.exhaustive else probability.seen & tumour
        labels.append(tumour[known])
        probabilities.append(probability.values[known])
        saliencies.append(np.abs(maps.saliency.values[maps.saliency.seen]))
    pixels, scores, saliency = np.concatenate(labels), np.concatenate(probabilities), np.concatenate(saliencies)
    return _calibration(engine, pixels, scores, saliency, f"{len(slides)} validation slides")


def tumour_on(values: ValueMap, entry: SlideEntry, slide_size_px: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The annotated tumour (height, width) on the grid of a map of the slide; none where there is no annotation."""
    height, width = values.values.shape
    if entry.annotation is None:
        return np.zeros((height, width), bool)
    return rasterise(read_annotations(entry.annotation, slide_size_px), width, height, values.level0_px)


def calibrate_on_patches(
    engine: Engine,
    dataset: Dataset[Sample],
    labels: npt.NDArray[np.int8],
    probabilities: npt.NDArray[np.float32],
) -> Calibration:
    """Threshold from the probabilities of validation patches, scale from the saliency of up to 256 of them.

    Args:
        engine: makes the saliency; its temperature is kept with the threshold.
        dataset: the patches, of the engine's `tile_px`.
        labels, probabilities: (n,) 0 or 1, and made with the engine's temperature.

    Raises:
        DatasetError: the patches show one class only.
    """
    chosen = np.linspace(0, len(labels) - 1, min(_SCALE_FROM, len(labels))).astype(int)
    saliencies = [np.abs(engine.patch_saliency(dataset[i]["image"][None])).ravel() for i in chosen.tolist()]
    return _calibration(engine, labels, probabilities, np.concatenate(saliencies), f"{len(labels)} validation patches")


def _calibration(
    engine: Engine,
    labels: npt.NDArray[np.bool_ | np.int8],
    probabilities: npt.NDArray[np.float32],
    saliencies: npt.NDArray[np.float32],
    source: str,
) -> Calibration:
    if len(np.unique(labels)) < 2:
        raise DatasetError(f"{source} hold one class only; the threshold needs both, change validation_share or seed")
    settings = engine.settings
    mask = settings.attribution == "mask"
    return Calibration(
        # A network that is sure of everything would give 1.0, which no map exceeds.
        threshold=min(youden_threshold(labels.astype(np.int8), probabilities), _HIGHEST_THRESHOLD),
        # The share of masks open has limits of its own.
        saliency_limit=1.0 if mask else float(np.percentile(saliencies, SCALE_PERCENTILE)),
        layer=settings.layer,
        attribution=settings.attribution,
        smoothing=settings.smoothing,
        source=source,
        temperature=engine.temperature,
    )
