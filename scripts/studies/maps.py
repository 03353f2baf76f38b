"""Slide maps judged on real tissue: do they lie in the tumour's mask, and do they say what the classifier says?

Fields with exact masks become small slides and are mapped as slides are (`medsd.heatmap`), by several methods, at
three layers, with and without gradient smoothing. Classifiers: the PatchCamelyon recipe's finished run, and two frozen
encoders with a head trained on the same patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, map_coordinates
from studies import fields
from studies.fields import GROUPS, SUBJECTS, Field
from studies.maps_tables import draw, tables
from torch import Tensor

from medsd.evaluate.scores import auc
from medsd.files import atomic_path, make_folder, sha256_of
from medsd.heatmap.additive import blurred
from medsd.heatmap.engine import Engine, engine_for_slides, make_engine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.value_map import ValueMap
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard
from medsd.saliency.method import evidence
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.pointing import energy_pointing
from medsd.saliency.metrics.scoring import Perturbation
from medsd.saliency.metrics.smoothness import normalised_variation
from medsd.slides.slide import Slide, open_slide
from medsd.slides.tissue import TissueMask

__all__ = ["PARTS", "add_arguments", "draw", "jobs_of", "key_of", "prepare", "recipe_of", "run_job", "tables"]

PARTS = tuple(GROUPS)
RUNS: tuple[tuple[Literal["none", "backward_hook"], tuple[str, ...]], ...] = (
    ("none", ("deeplift", "gradient_x_activation", "gradient")),
    ("backward_hook", ("deeplift", "gradient_x_activation")),
    ("none", ("gradcam",)),  # looks at a whole tile, so it goes tile by tile
)
"""Smoothings, and the methods that are mapped at once under each."""
AFTER_UM = 24.0  # deviation of the Gaussian; chosen among 8, 16, 24, 32 and 48 on the tiles that choose
PROBABILITY, OCCLUSION = "probability", "occlusion"
_SMOOTHED = "/after"  # ends the names of maps that this Gaussian has smoothed
_SCORED, _STEPS = 4, 8  # fields and steps of insertion and deletion
_PATCH_PX, _APART = 32, 4  # occlusion at the model's mpp: side of what is hidden, and patches from one to the next
_DRAWN = 3
_BATCH, _ASKED_OF_CLASS = 32, 24
# Raised whenever results mean something else.
VERSION = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One field of a group, and one network."""

    part: str
    network: str
    field: str
    data: str
    weights: str
    folder: str
    methods: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join((self.network, *self.methods, self.field))

    @property
    def layers(self) -> tuple[str, ...]:
        """Hidden layers that are mapped."""
        subject = SUBJECTS[self.network]
        return (subject.default,) if self.methods else subject.layers

    @property
    def runs(self) -> tuple[tuple[Literal["none", "backward_hook"], tuple[str, ...]], ...]:
        """Smoothings of gradients, and the methods of each."""
        if not self.methods:
            return RUNS
        plain = [methods for smoothing, methods in RUNS if smoothing == "none"]
        asked = [tuple(method for method in methods if method in self.methods) for methods in plain]
        return tuple(("none", methods) for methods in asked if methods)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Holds camelyon_tiles_tumour_masks, pcam_patches and the like.")
    parser.add_argument("--run", type=Path, default=Path("runs/pcam"), help="A finished run of configs/pcam.json.")
    parser.add_argument("--networks", choices=tuple(SUBJECTS), nargs="+", default=list(SUBJECTS))
    parser.add_argument(
        "--methods",
        choices=("deeplift", "gradient_x_activation", "gradient", "gradcam"),
        nargs="+",
        default=[],
        help="These alone, at the default layer, fields that judge first; no occlusion, insertion or deletion.",
    )


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """The groups asked for, for every network."""
    return [
        Job(
            part,
            name,
            field.name,
            str(arguments.data),
            str(_weights(arguments, folder, name)),
            str(folder),
            tuple(sorted(arguments.methods)),
        )
        for name in arguments.networks
        for part in arguments.part
        for field in sorted(GROUPS[part](arguments.data), key=lambda field: bool(arguments.methods) and field.chooses)
    ]


def _weights(arguments: argparse.Namespace, folder: Path, name: str) -> Path:
    path: Path = arguments.run / "model.safetensors"
    return path if name == "resnet18d" else folder / f"{name}.safetensors"


def key_of(job: Job) -> tuple[str, str, str]:
    """What the tables find a job's results by."""
    return job.part, job.network, job.field


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    weights = Path(job.weights)
    return {
        "version": VERSION,
        "methods": [[smoothing, *methods] for smoothing, methods in job.runs],
        "layers": job.layers,
        "after_um": AFTER_UM,
        "scored": [0 if job.methods else _SCORED, _STEPS],
        "weights": sha256_of(weights) if weights.is_file() else None,
    }


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Train the heads that are missing, and write the fields as slides."""
    for name in arguments.networks:
        path = _weights(arguments, folder, name)
        if name != "resnet18d" and not path.is_file():
            fields.with_head(arguments.data, name, path)
    make_folder(folder / "slides")
    for part in arguments.part:
        for field in GROUPS[part](arguments.data):
            path = slide_of(folder, part, field.name)
            if not path.is_file():
                field.write(path)


def slide_of(folder: Path, part: str, field: str) -> Path:
    """The file of a field."""
    return folder / "slides" / f"{part}-{field}.tif"


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """What every map of the field is worth."""
    torch.set_num_threads(1)
    chosen = list(GROUPS[job.part](Path(job.data)))
    names = [field.name for field in chosen]
    field = chosen[names.index(job.field)]
    classifier, card, engines = _engines(replace(job, part="", field=""))
    found: dict[str, Any] = {
        "chooses": field.chooses,
        "share": float(field.tumour.mean()),
        "map_um": {engine.settings.layer: engine.strides[1] * card.mpp for engine in engines},
        "maps": {},
    }
    scored, drawn = (not job.methods and names.index(job.field) < count for count in (_SCORED, _DRAWN))
    example: dict[str, Any] = {"image": field.image, "tumour": field.tumour}
    with open_slide(slide_of(Path(job.folder), job.part, field.name)) as slide:
        judged = Judged(slide, field, classifier, card)
        for name, values, value_map in _maps(job, slide, engines, judged):
            found["maps"][name] = judged.measures(values, value_map)
            of_last = name.partition("/")[0] in (PROBABILITY, OCCLUSION, job.layers[-1])
            if scored and of_last and not name.endswith(_SMOOTHED):
                found["maps"][name] |= judged.faithfulness(values)
            example[name] = values
    if drawn:
        with (
            atomic_path(make_folder(Path(job.folder) / job.part) / f"{job.name}.npz") as path,
            open(path, "wb") as handle,
        ):
            np.savez_compressed(handle, **example)
    return job, found


@lru_cache(maxsize=1)
def _engines(job: Job) -> tuple[TileClassifier, ModelCard, tuple[Engine, ...]]:
    """The classifier, and its engines for any field; the neutral reference is of PatchCamelyon's validation patches."""
    classifier, card = fields.load_subject(Path(job.weights))
    images, labels = fields.patches(Path(job.data), 1, SUBJECTS[job.network].scale)
    temperature = card.calibration.temperature if card.calibration else 1.0
    engines, way = [], "auto"
    for layer in job.layers:
        reference = None
        for smoothing, methods in job.runs:
            settings = MapSettings(methods, layer, smoothing, way="tiled" if way == "tiled" else "auto")
            engine = make_engine(classifier, card.tile_px, card.mpp, 1, settings, temperature, reference)
            if way == "auto":
                asked = torch.cat([images[labels == label][:_ASKED_OF_CLASS] for label in (0, 1)])
                engine = engine_for_slides(engine, asked)
                way = "tiled" if engine.settings.way == "tiled" else "dense"
            if reference is None:
                normal, tumour = (images[labels == label].split(_BATCH) for label in (0, 1))
                reference = engine.reference = engine.neutral(normal, tumour, "PatchCamelyon, validation patches")
            engines.append(engine)
    return classifier, card, tuple(engines)


def _maps(
    job: Job, slide: Slide, engines: tuple[Engine, ...], judged: Judged
) -> Iterator[tuple[str, npt.NDArray[np.float32], ValueMap | None]]:
    """Every map of the slide by name, "layer/method/smoothing" or without a layer; its values at the judged squares.

    The probability is taken linear between its pixels, the best that showing it larger can do. It, and every map made
    without gradient smoothing, is judged once more after a Gaussian, as a reader would look for regions: masks reward
    whatever is smooth, so that maps are to be compared at one smoothness.
    """
    everything = TissueMask(np.ones((1, 1), np.bool_), 2.0 * max(slide.dimensions))
    for engine in engines:
        maps = engine.map(slide, everything)
        layer, smoothing = engine.settings.layer, engine.settings.smoothing
        if engine is engines[0]:
            yield PROBABILITY, judged.at_places(maps.probability, linear=True), None
            yield PROBABILITY + _SMOOTHED, judged.at_places(_smoothed(maps.probability), linear=True), None
        for method, value_map in maps.explanations.items():
            yield f"{layer}/{method}/{smoothing}", judged.at_places(value_map), value_map
            if smoothing == "none":
                after = _smoothed(value_map)
                yield f"{layer}/{method}{_SMOOTHED}", judged.at_places(after), after
    if job.methods:
        return
    hidden = judged.occlusion()
    yield OCCLUSION, hidden, None
    # Known at the judged squares alone; mirrored beyond them, as the tissue that other maps see there.
    yield OCCLUSION + _SMOOTHED, gaussian_filter(hidden, AFTER_UM / judged.square_um, mode="reflect"), None


def _smoothed(value_map: ValueMap) -> ValueMap:
    return replace(value_map, values=blurred(value_map.values, AFTER_UM / value_map.mpp))


class Judged:
    """A field and what its maps are compared with.

    Args:
        slide: the field in its margin.
        field: with its mask.
        classifier, card: that is mapped.
    """

    def __init__(self, slide: Slide, field: Field, classifier: TileClassifier, card: ModelCard) -> None:
        self.field, self.classifier, self.card = field, classifier, card
        self.rows, self.columns, self.tumour = field.places()
        self.square_um = float(self.rows[1] - self.rows[0]) * field.mpp
        self.ratio = card.mpp / field.mpp
        margin = field.margin_px
        height, width = (round(side / self.ratio) for side in field.tumour.shape)
        pixels = slide.read(margin, margin, width, height, mpp=card.mpp)
        self.image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        self.corners, tiles = self._tiles(slide)
        with torch.no_grad():
            logits = torch.cat([classifier(some) for some in tiles.split(_BATCH)])
        temperature = card.calibration.temperature if card.calibration else 1.0
        self.log_odds = evidence(logits / temperature)[:, 1].numpy()

    def _tiles(self, slide: Slide) -> tuple[list[tuple[int, int]], Tensor]:
        """Top left corners (row, column), in tiles from the slide's origin, inside the field; and the tiles."""
        side, margin = self.card.tile_px * self.ratio, self.field.margin_px
        height, width = self.field.tumour.shape
        first = int(np.ceil(margin / side))
        corners = [
            (row, column)
            for row in range(first, int((margin + height) / side + 1e-6))
            for column in range(first, int((margin + width) / side + 1e-6))
        ]
        if not corners:  # a field no larger than a tile: the tiles that it shares with its margin
            corners = [(first - 1, first - 1), (first - 1, first), (first, first - 1), (first, first)]
        read = [
            slide.read(column * side, row * side, self.card.tile_px, self.card.tile_px, mpp=self.card.mpp)
            for row, column in corners
        ]
        return corners, torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2)

    def at_places(self, value_map: ValueMap, linear: bool = False) -> npt.NDArray[np.float32]:
        """The map's values at the judged squares' middles: those of the pixels, or linear between them."""
        rows, columns = (axis / value_map.level0_px for axis in (self.rows, self.columns))
        if linear:
            places = np.meshgrid(rows - 0.5, columns - 0.5, indexing="ij")
            return map_coordinates(value_map.values, places, order=1, mode="nearest")
        return value_map.values[np.floor(rows).astype(int)[:, None], np.floor(columns).astype(int)[None]]

    def measures(self, values: npt.NDArray[np.float32], value_map: ValueMap | None) -> dict[str, float]:
        """Measures of a map's values at the judged squares, and, of an explanation, of its own pixels."""
        of_map, region = (torch.from_numpy(part)[None] for part in (values, self.tumour))
        found = {
            "auc": auc(self.tumour.ravel(), values.ravel()),
            "pointing": float(energy_pointing(of_map.double() / of_map.abs().max().clamp_min(1e-12), region)),
        }
        if value_map is not None:
            sums = self._tile_sums(value_map)
            sure = np.abs(self.log_odds) > 1
            found["variation"] = float(normalised_variation(self._inside(value_map)[None, None]))
            found["sign"] = float((np.sign(sums[sure]) == np.sign(self.log_odds[sure])).sum())
            found["sure"] = float(sure.sum())
            found["apart"] = float(np.abs(sums - self.log_odds).mean() / np.abs(self.log_odds).mean())
        # Where there is nothing to measure, as no positive value to point with, JSON has no NaN.
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def _inside(self, value_map: ValueMap) -> Tensor:
        """The map's pixels inside the field, over the largest."""
        first = int(np.ceil(self.field.margin_px / value_map.level0_px))
        ends = [int((self.field.margin_px + side) / value_map.level0_px) for side in self.field.tumour.shape]
        inner = torch.from_numpy(value_map.values[first : ends[0], first : ends[1]])
        return inner / inner.abs().max().clamp_min(1e-12)

    def _tile_sums(self, value_map: ValueMap) -> Floats:
        side = round(self.card.tile_px * self.ratio / value_map.level0_px)
        return np.array(
            [
                value_map.values[row * side : (row + 1) * side, column * side : (column + 1) * side].sum(dtype=float)
                for row, column in self.corners
            ]
        )

    def faithfulness(self, values: npt.NDArray[np.float32]) -> dict[str, float]:
        """Areas of insertion into and deletion to a blurred field, of the classifier's tumour probability of it all."""
        x = self.classifier.normalise(self.image)
        pixels = F.interpolate(torch.from_numpy(values)[None, None], x.shape[2:])[0]
        how = Perturbation("blur", -(-x.shape[2] * x.shape[3] // _STEPS), torch.Generator().manual_seed(0))
        areas = {}
        for name, curve in (("insertion", insertion_curve), ("deletion", deletion_curve)):
            areas[name] = float(curve_area(curve(self.classifier, x, 1, pixels, how)))
        return areas

    def occlusion(self) -> npt.NDArray[np.float32]:
        """How far the evidence nearby falls where a patch is hidden behind the mean colour, at the judged squares.

        Every fourth patch along rows and columns is hidden at once, far enough apart; the loss is the mean over the
        five by five patches around each.
        """
        x = self.classifier.normalise(self.image)
        rows, columns = (side // _PATCH_PX for side in x.shape[2:])
        x = x[:, :, : rows * _PATCH_PX, : columns * _PATCH_PX]
        whole = self._cell_evidence(x)
        lost = np.zeros((rows, columns), np.float32)
        for phase in np.ndindex(_APART, _APART):
            every = tuple(slice(first, None, _APART) for first in phase)
            hidden = torch.zeros(rows, columns)
            hidden[every] = 1
            hidden = hidden.repeat_interleave(_PATCH_PX, 0).repeat_interleave(_PATCH_PX, 1)
            change = F.adaptive_avg_pool2d((whole - self._cell_evidence(x * (1 - hidden)))[None], (rows, columns))
            around = F.avg_pool2d(change, _APART + 1, 1, _APART // 2, count_include_pad=False)[0]
            lost[every] = around[every].numpy()
        places = (
            ((axis - self.field.margin_px) / self.ratio / _PATCH_PX).astype(int).clip(0, count - 1)
            for axis, count in ((self.rows, rows), (self.columns, columns))
        )
        return lost[np.ix_(*places)]

    def _cell_evidence(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.classifier.feature_map(x)
            logits = torch.einsum("bdhw,kd->bkhw", features, self.classifier.head.weight)
        return evidence(logits)[0, 1]
