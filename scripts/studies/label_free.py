"""Label-free maps by several measures: ADCC and its parts, pointing and pixel AUC, beside maps that know nothing.

Photographs: EfficientNet-Lite0 and SqueezeNet, both trained on ImageNet, on crops of ten photographs. Tissue: parts of
192 px with tumour masks, cut from tiles of lymph nodes; Lite0 (ImageNet) and DenseNet-121 (H&E) with a head trained on
PatchCamelyon, and an encoder pre-trained without labels, judged both by the probabilities of a linear probe and by the
cosine similarity of its embeddings. The class is the predicted one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies import fields, natural
from studies.label_free_tables import draw, tables
from studies.networks import ENCODER
from torch import Tensor, nn

from medsd.evaluate.scores import auc
from medsd.files import sha256_of
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import load_encoder
from medsd.saliency.method import Method, Target
from medsd.saliency.metrics.confidence import adcc
from medsd.saliency.metrics.perturb import at_pixels, unit_range
from medsd.saliency.metrics.pointing import area_share, energy_pointing
from medsd.saliency.metrics.scoring import Score
from medsd.saliency.registry import make_method

__all__ = ["PARTS", "add_arguments", "draw", "jobs_of", "key_of", "prepare", "recipe_of", "run_job", "tables"]

PARTS = ("photographs", "tissue")
_BATCH = 4
_CROP_PX, _SHARES = 192, (0.1, 0.9)
_CROPS_EACH = 2  # of a photograph: its centre, and a corner
# Raised whenever results mean something else.
VERSION = 1

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "EigenCAM, reference": ("eigencam_reference", {}),
    "EigenCAM, sign fixed": ("eigencam", {}),
    "TSM (= uncentred EigenCAM, absolute)": ("tsm", {}),
    "TSM, ranks halved": ("tsm", {"ranks": "half"}),
    "Multivec-EigenCAM, centred": ("multivec_eigencam", {}),
    "MTSM a (= Multivec-EigenCAM, uncentred)": ("mtsm", {}),
    "MTSM b": ("mtsm", {"weights": "b"}),
    "mean of channels": ("mean_map", {}),
    "energy of channels": ("channel_energy", {}),
}


@dataclass(frozen=True)
class Job:
    """An encoder at one layer."""

    part: str
    network: str
    layer: str
    data: str
    weights: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.network}-{self.layer}"


LAYERS = {
    ("photographs", "lite0"): ("blocks.2", "blocks.4", "blocks.6"),
    ("photographs", "squeezenet"): ("features.7", "features.10", "features.12"),
    ("tissue", "without labels, probe"): ("layer3", "layer4"),
    ("tissue", "without labels, similarity"): ("layer3", "layer4"),
    ("tissue", "lite0"): ("blocks.4", "blocks.6"),
    ("tissue", "densenet"): ("features.denseblock3", "features.denseblock4"),
}


NETWORKS = tuple(dict.fromkeys(network for _, network in LAYERS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Holds pcam_patches, camelyon_tiles_tumour_masks, weights_encoders.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--pretrained",
        type=Path,
        default=Path("runs/evidence/pretrain/encoders/pcam-resnet10t/local-corr-2.safetensors"),
        help="An encoder that evidence.py pretrain left.",
    )


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """The parts and networks asked for, every layer."""
    return [
        Job(part, network, layer, str(arguments.data), str(_weights(arguments, folder, network)))
        for (part, network), layers in LAYERS.items()
        if part in arguments.part and network in arguments.networks
        for layer in layers
    ]


def _weights(arguments: argparse.Namespace, folder: Path, network: str) -> Path:
    if network.startswith("without"):
        path: Path = arguments.pretrained
        return path
    return folder / f"{network}.safetensors"


def key_of(job: Job) -> tuple[str, str, str]:
    """What the tables find a job's results by."""
    return job.part, job.network, job.layer


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    weights = Path(job.weights)
    used = job.part == "tissue" and weights.is_file()
    methods = {words: [name, options] for words, (name, options) in METHODS.items()}
    return {"version": VERSION, "methods": methods, "weights": sha256_of(weights) if used else None}


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Train the heads that are missing."""
    for name in ("lite0", "densenet"):
        path = _weights(arguments, folder, name)
        if "tissue" in arguments.part and name in arguments.networks and not path.is_file():
            fields.with_head(arguments.data, name, path)


@dataclass(frozen=True)
class Subject:
    """What is explained.

    Attributes:
        encoder: that maps are taken from.
        scored: whose answers count: the classifier, or the encoder itself.
        prefix: of the encoder's layers in `scored`.
        x: (n, 3, H, W) as it takes them.
        groups: (n,) what is resampled together.
        masks: (n, H, W) bool, or None where nobody knows.
        score: by what images times maps are judged.
    """

    encoder: nn.Module
    scored: nn.Module
    prefix: str
    x: Tensor
    groups: list[str]
    masks: Tensor | None
    score: Score = "probability"


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Every measure of every map, one list of images each."""
    torch.set_num_threads(1)
    subject = _photographs(job) if job.part == "photographs" else _tissue(job)
    found: dict[str, Any] = {"groups": subject.groups, "maps": {}}
    if subject.masks is not None:
        found["area_share"] = area_share(subject.masks).tolist()
    for words, method in _methods(subject, job.layer).items():
        found["maps"][words] = _measured(subject, method)
    return job, found


def _photographs(job: Job) -> Subject:
    crops = natural.images()
    chosen = [row for row in range(len(crops.images)) if row % 5 < _CROPS_EACH]
    crops = natural.Natural(crops.images[chosen], [crops.sources[row] for row in chosen])
    if job.network == "squeezenet":
        network = natural.squeezenet(Path(job.data, "weights_squeezenet", "squeezenet1_0_imagenet.npz"))
        return Subject(network, network, "", natural.normalise(crops.images), crops.sources, None)
    lite0 = fields.imagenet_lite0(Path(job.data))
    return Subject(lite0, lite0, "", (crops.images.float() / 255 - 0.5) / 0.5, crops.sources, None)


def _tissue(job: Job) -> Subject:
    images, masks, groups = _crops(Path(job.data))
    if not job.network.startswith("without"):
        classifier, _ = fields.load_subject(Path(job.weights))
        x = classifier.normalise(_enlarged(images, fields.SUBJECTS[job.network].scale))
        return Subject(classifier.encoder, classifier, "encoder.", x, groups, _as_large(masks, x))
    classifier = _probe(job.data, job.weights)
    x = classifier.normalise(images)
    if job.network.endswith("probe"):
        return Subject(classifier.encoder, classifier, "encoder.", x, groups, masks)
    return Subject(classifier.encoder, classifier.encoder, "", x, groups, masks, "similarity")


@lru_cache(maxsize=1)
def _probe(data: str, weights: str) -> TileClassifier:
    """The encoder without labels, with logistic regression on PatchCamelyon's training patches."""
    classifier = TileClassifier(ENCODER).eval()
    load_encoder(classifier.encoder, Path(weights))
    fields.fit_head(classifier, Path(data), 1)
    return classifier


@lru_cache(maxsize=1)
def _crops(data: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Of each tile the part, of four, whose tumour share is nearest a half, if it is from 10 to 90 %; by tile."""
    images, masks, groups = [], [], []
    for field in fields.camelyon_tiles(data):
        starts = (32, 512 - 32 - _CROP_PX)
        corners = [(top, left) for top in starts for left in starts]
        parts = {(top, left): field.tumour[top : top + _CROP_PX, left : left + _CROP_PX] for top, left in corners}
        (top, left), mask = min(parts.items(), key=lambda part: abs(part[1].mean() - 0.5))
        if _SHARES[0] <= mask.mean() <= _SHARES[1]:
            images.append(field.image[top : top + _CROP_PX, left : left + _CROP_PX])
            masks.append(mask)
            groups.append(field.name)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks)), groups


def _enlarged(images: Tensor, scale: int) -> Tensor:
    larger = nn.functional.interpolate(images.float(), scale_factor=scale, mode="bilinear") if scale > 1 else images
    return larger.round().to(torch.uint8) if scale > 1 else images


def _as_large(masks: Tensor, x: Tensor) -> Tensor:
    return nn.functional.interpolate(masks[:, None].float(), x.shape[2:], mode="nearest")[:, 0] > 0.5


def _methods(subject: Subject, layer: str) -> dict[str, Method]:
    """By name: label-free maps, Grad-CAM where there are classes, and maps that know nothing."""
    methods: dict[str, Method] = {
        words: Positive(make_method(name, subject.encoder, layer, options=options))
        for words, (name, options) in METHODS.items()
    }
    if subject.score == "probability":
        output: Any = "evidence" if isinstance(subject.scored, TileClassifier) else "logit"
        methods["Grad-CAM, of the class"] = Positive(
            make_method("gradcam", subject.scored, subject.prefix + layer, output)
        )
    tsm = make_method("tsm", subject.encoder, layer)
    methods["control: TSM inverted"] = Known(subject.encoder, lambda x: 1 - unit_range(tsm(x)))
    methods["control: blurred centre"] = Known(subject.encoder, _centre)
    methods["control: constant"] = Known(subject.encoder, lambda x: torch.ones(len(x), *x.shape[2:]))
    return methods


def _centre(x: Tensor) -> Tensor:
    """A Gaussian in the middle whose deviation is a quarter of the side."""
    rows, columns = (torch.linspace(-2, 2, side) for side in x.shape[2:])
    return (-(rows[:, None] ** 2 + columns**2) / 2).exp().expand(len(x), -1, -1)


@dataclass(frozen=True)
class Positive:
    """The positive part of a method's maps, which is what papers and pytorch-grad-cam look at."""

    method: Method

    @property
    def network(self) -> nn.Module:
        """That is explained."""
        return self.method.network

    @property
    def layer(self) -> str | None:
        """Where it is explained."""
        return self.method.layer

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w), none negative."""
        return self.method(x, target).clamp(min=0)


@dataclass(frozen=True)
class Known:
    """Maps that a function of the images gives."""

    network: nn.Module
    maps: Callable[[Tensor], Tensor]
    layer: str | None = None

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w)."""
        return self.maps(x)


def _measured(subject: Subject, method: Method) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for first in range(0, len(subject.x), _BATCH):
        x = subject.x[first : first + _BATCH]
        target = None
        if subject.score == "probability":
            with torch.no_grad():
                target = subject.scored(x).argmax(dim=1)
        maps = method(x, target)
        scores = adcc(subject.scored, method, x, target, maps, subject.score)
        values = {name: getattr(scores, name) for name in ("adcc", "average_drop", "increase", "coherency")}
        values["complexity"] = scores.complexity
        if subject.masks is not None:
            masks, shown = subject.masks[first : first + _BATCH], at_pixels(unit_range(maps), x, "bilinear")
            values["pointing"] = energy_pointing(shown, masks).nan_to_num(0.0)
            pairs = zip(masks.numpy(), shown.numpy(), strict=True)
            values["pixel_auc"] = torch.tensor([auc(mask.ravel(), map_.ravel()) for mask, map_ in pairs])
        for name, value in values.items():
            found.setdefault(name, []).extend(value.tolist())
    return found
