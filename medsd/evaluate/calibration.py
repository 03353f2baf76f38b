"""Thresholds, neutral reference and colour scale, fixed once on validation data and kept with the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medsd.cohort.dataset import Sample, TileDataset, evenly, tiles_of_each_class
from medsd.cohort.entry import SlideEntry
from medsd.cohort.outlines import Outlines, holds, known_in_full, raster, read_outlines
from medsd.cohort.patches import PatchDataset
from medsd.errors import ChannelsCancelError, DatasetError, NetworkError
from medsd.evaluate.operating import JudgedMap, lesion_threshold, slide_cut_off
from medsd.evaluate.scores import youden_threshold
from medsd.heatmap.engine import Engine, engine_for_slides, make_engine
from medsd.heatmap.findings import smallest_region_um2, top_mean
from medsd.heatmap.label_free import LABEL_FREE
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.heatmap.value_map import ValueMap
from medsd.networks.calibrated import Calibration
from medsd.progress import Progress, no_progress
from medsd.saliency.neutral import NeutralReference
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue

logger = logging.getLogger(__name__)

SCALE_PERCENTILE = 99.5
_SCALE_FROM = 256  # patches
_REFERENCE_FROM, _BATCH = 256, 32  # tiles of a class
_WITHOUT_REFERENCE, _WHERE_CHANNELS_CANCEL = "gradient_x_activation", "gradcam"
# Tiles of a class that are asked for alone and among others.
_ASKED_OF_CLASS = 24


def calibrate_on_slides(
    engine: Engine,
    slides: Sequence[SlideEntry],
    progress: Progress = no_progress,
    normaliser: StainNormaliser | None = None,
) -> Calibration:
    """Threshold, cut-off and scale of the engine's target from the maps of validation slides.

    Their stain is normalised if the tiles' was. Whatever else is outlined or labelled counts as without the target.

    The threshold of regions is chosen for lesions (`lesion_threshold`), with the settings' budget of false regions;
    where no slide is known in full (`known_in_full`) it is Youden's on map pixels. Slides of the slide score
    (`top_mean`) of the cut-off (`slide_cut_off`) or a higher one are raised; slides of the target without outlines, or
    with none on tissue, take part in this alone. The scale ends at the 99.5th percentile of |saliency| in tissue (our
    choice), that of masks at 1. The engine's temperature is kept with the threshold, which holds for calibrated
    probabilities.

    Raises:
        DatasetError: the slides show the target nowhere, or everywhere.
    """
    classes, target = engine.classifier.classes, engine.target
    judged: list[JudgedMap] = []
    labels, scores = [], []
    values: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in engine.settings.methods}
    for entry in progress(slides, len(slides), "slide"):
        with IsolatedSlide(entry.path, entry.mpp) as slide:
            tissue = find_tissue(slide)
            seen = slide if normaliser is None or not tissue.mask.any() else normaliser.slide(slide, tissue)
            maps = engine.map(seen, tissue, progress)
            size_px, origin_px, mpp = slide.dimensions, slide.bounds[:2], slide.mpp
        probability = maps.probability
        outlines, shape = read_outlines(entry, size_px, origin_px, classes), probability.values.shape
        outlined = outlined_on(probability, outlines)
        if any(outlines or ()) and not (outlined & probability.seen).any():
            outlines = None  # they may be another slide's
        inside = raster(outlines, target, shape, probability.level0_px)
        judged.append(JudgedMap(probability, inside, known_in_full(entry, outlines), mpp, size_px, outlined))
        if entry.label is not None and probability.seen.any():
            labels.append(int(holds(entry, outlines, target)))
            scores.append(top_mean(probability.values[probability.seen]))
        for name, explanation in maps.explanations.items():
            values[name].append(np.abs(explanation.values[explanation.seen]))
    saliencies = {name: np.concatenate(parts) for name, parts in values.items() if name not in LABEL_FREE}
    # Outside the outlines of a slide that is not known in full nobody knows what the tissue is.
    pixels = np.concatenate([one.inside[one.known] for one in judged])
    probabilities = np.concatenate([one.probability.values[one.known] for one in judged])
    found = _calibration(engine, pixels, probabilities, saliencies, f"{len(slides)} validation slides")
    found = replace(found, cut_off=slide_cut_off(labels, scores))
    if any(one.exhaustive for one in judged):
        # As of the regions of slides that are mapped.
        smallest_um2 = smallest_region_um2(engine.tile_px, engine.mpp)
        name = classes[target]
        threshold, lesions = lesion_threshold(judged, engine.settings.false_lesions, smallest_um2, name)
        found = replace(found, threshold=threshold, lesions=lesions)
    return found


def with_reference(engine: Engine, validation: TileDataset | PatchDataset) -> Engine:
    """The engine that agrees with validation tiles, with their neutral reference where a method of it needs one.

    A network that has none has been trained for hours: this is told, and its maps are made by gradient x activation, or
    by Grad-CAM where its channels cancel.
    """
    engine = engine_for_slides(engine, tiles_of_each_class(validation, validation.labels, _ASKED_OF_CLASS))
    if ADDITIVE not in engine.settings.methods:
        return engine
    try:
        source = f"{len(validation.labels)} validation tiles"
        engine.reference = find_reference(engine, validation, validation.labels, source)
    except NetworkError as reason:
        instead, made = _without_reference(engine, validation[0]["image"][None])
        logger.warning(
            "%s; the weights are kept, with maps by %s, which do not add up: for maps that do, train longer or on more",
            reason,
            instead,
        )
        return made
    return engine


def _without_reference(engine: Engine, tile: Tensor) -> tuple[str, Engine]:
    """What takes the place of "deeplift", tried on a tile (1, 3, tile_px, tile_px) uint8, and the engine with it."""

    def made_by(method: str) -> Engine:
        methods = dict.fromkeys(method if name == ADDITIVE else name for name in engine.settings.methods)
        return make_engine(
            *(engine.classifier, engine.tile_px, engine.mpp, engine.target),
            replace(engine.settings, methods=tuple(methods)),
            engine.temperature,
            offset=engine.offset,
        )

    made = made_by(_WITHOUT_REFERENCE)
    try:
        made.patch_saliency(tile, _WITHOUT_REFERENCE)
    except ChannelsCancelError:
        return _WHERE_CHANNELS_CANCEL, made_by(_WHERE_CHANNELS_CANCEL)
    return _WITHOUT_REFERENCE, made


def find_reference(
    engine: Engine, dataset: Dataset[Sample], labels: npt.NDArray[np.int8], source: str
) -> NeutralReference:
    """The neutral reference of the engine's layer, between the mean activations of tiles without and with the target.

    Args:
        engine: its `neutral` finds it.
        dataset: tiles of the engine's `tile_px`; up to 256 with the target, and as many without it, are taken, evenly.
        labels: (n,) class numbers, those of the dataset.
        source: what the tiles are, in words.

    Raises:
        DatasetError: tiles with the target or without it are missing.
        NetworkError: no point between them has log-odds 0.
    """
    has = labels == engine.target
    if has.all() or not has.any():
        name = engine.classifier.classes[engine.target]
        raise DatasetError(
            f"{source} are {'all' if has.all() else 'none'} of class {name}; the neutral reference needs both, change "
            "validation_share"
        )

    def batches(wanted: npt.NDArray[np.bool_]) -> Iterator[Tensor]:
        rows = np.flatnonzero(wanted)
        rows = rows[evenly(len(rows), _REFERENCE_FROM)]
        for start in range(0, len(rows), _BATCH):
            yield torch.stack([dataset[row]["image"] for row in rows[start : start + _BATCH].tolist()])

    return engine.neutral(batches(~has), batches(has), source)


def class_shares(labels: npt.NDArray[np.int8], classes: int) -> tuple[float, ...]:
    """Each class's share of the labels (n,); none where a class has no item, for nothing follows from a share of 0."""
    counts = np.bincount(labels, minlength=classes)
    return tuple((counts / counts.sum()).tolist()) if counts.all() else ()


def outlined_on(values: ValueMap, outlines: Outlines | None) -> npt.NDArray[np.bool_]:
    """Where any class is outlined, (height, width) on the grid of a map of the slide."""
    shape = values.values.shape
    found = np.zeros(shape, np.bool_)
    for number in outlines or ():
        found |= raster(outlines, number, shape, values.level0_px)
    return found


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
    chosen = evenly(len(labels), _SCALE_FROM).tolist()
    values: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in engine.settings.methods}
    for start in range(0, len(chosen), _BATCH):
        images = torch.stack([dataset[row]["image"] for row in chosen[start : start + _BATCH]])
        for name in values.keys() - LABEL_FREE:
            values[name].append(np.abs(engine.patch_saliency(images, name)))
    saliencies = {name: np.concatenate(parts) for name, parts in values.items() if parts}
    return _calibration(engine, labels, probabilities, saliencies, f"{len(labels)} validation patches")


def _calibration(
    engine: Engine,
    labels: npt.NDArray[np.bool_ | np.int8],
    probabilities: npt.NDArray[np.float32],
    saliencies: Mapping[str, npt.NDArray[np.float32]],
    source: str,
) -> Calibration:
    if len(np.unique(labels)) < 2:
        name = engine.classifier.classes[engine.target]
        raise DatasetError(
            f"{source}: {name} is nowhere, or everywhere; the threshold needs both, change validation_share or seed"
        )
    settings = engine.settings
    # Of a network that is sure of everything it would be 1.0, which no map exceeds.
    below_highest = float(np.nextafter(probabilities.max(), np.float32(0)))
    return Calibration(
        threshold=min(youden_threshold(labels.astype(np.int8), probabilities), below_highest),
        limits={
            # The share of masks open has limits of its own.
            name: 1.0 if name == MASK else float(np.percentile(values, SCALE_PERCENTILE))
            for name, values in saliencies.items()
        }
        # Those of label-free maps grow with the slide: each has its own.
        | {name: 0.0 for name in settings.methods if name in LABEL_FREE},
        layer=settings.layer,
        smoothing=settings.smoothing,
        source=source,
        smooth_um=settings.smooth_um,
        temperature=engine.temperature,
        reference=None if engine.reference is None else asdict(engine.reference),
        way=settings.way,
    )
