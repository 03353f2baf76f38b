"""SaliencyDecor and its parts against cross-entropy, fine-tuned from a given encoder on real tissue.

(a) `pcam`: PatchCamelyon patches, folds of whole stain clusters; further patches without a cluster are trained on where
`may_train` lets them. (b) `ebhi`: colorectal biopsies, normal against adenocarcinoma, folds of whole patients. Three
folds, dealt anew in each repeat, which seeds the training, too. A quarter of the training side, whole groups, fits
temperature and neutral reference alone. From given weights the head starts from a regression and BatchNorm
is frozen; `lite0-x2` is the recipe of `configs/lite0.json`, images twice as large and an encoder that ends early.
ResNet-10-t is trained from scratch, and its BatchNorm learns.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from studies.fields import camelyon16_patches
from studies.networks import ENCODER
from studies.objectives_data import FOLDS, GRADES, Items, Part, items_of, ratio_dealt, split
from studies.objectives_methods import objective_of
from studies.objectives_tables import WORDS, draw, tables
from torch import Tensor

from medsd.cohort.dataset import Sample, SlideGroupedSampler
from medsd.cohort.patches import scaled
from medsd.errors import ConfigError, NetworkError
from medsd.evaluate.explanations import ExplanationSettings, score_explanations
from medsd.evaluate.probes import Labelled, LinearHead, features_of, fit_head
from medsd.evaluate.scores import auc
from medsd.evaluate.temperature import calibration_error, calibration_error_by_chance, fit_temperature, softmax
from medsd.files import as_json, sha256_of
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, TileClassifier
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import training
from medsd.networks.start import load_encoder
from medsd.saliency.metrics.pointing import energy_pointing
from medsd.saliency.neutral import neutral_from_images
from medsd.saliency.registry import make_method
from medsd.tables import read_table
from medsd.training.augment import augment, turn
from medsd.training.network import parameter_groups
from medsd.training.terms import Objective

__all__ = ["draw", "tables"]

PARTS = ("pcam", "ebhi")
EXPLAINED = ExplanationSettings(items=256, draws=1, steps=8, batch_size=96)
# Raised whenever a part holds other pixels or a measure changes, so that kept results are never mixed.
VERSION = 3
_MASKED_PX = 288  # the middle of a field of 512 px, whole tiles of it
_BATCH = 64


@dataclass(frozen=True)
class Start:
    """An encoder with its weights' file, the layer of the additive map, the weights' input, and how it is used.

    Without a file it is trained from scratch. `scale` is by how much images are made larger for it, `end` the layer
    that it ends at.
    """

    name: str
    file: str | None
    layer: str
    input_mean: tuple[float, float, float]
    input_std: tuple[float, float, float]
    scale: int = 1
    end: str | None = None


_PARTS = {
    "pcam": Part("pcam_patches", side_px=96, scale=1, samples=256, more="pcam_more"),
    "ebhi": Part("ebhi_seg", side_px=96, scale=0.5, samples=96),
}
_HALF, _ONE, _NONE = (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
_LITE0 = ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k.fp16.safetensors", "encoder.blocks.4", _HALF, _HALF)
_BLOCK = "features.denseblock3"
_DENSENET = ("densenet121", "densenet121.capricorn_pathmnist.fp16.safetensors", f"encoder.{_BLOCK}", _NONE, _ONE)
STARTS = {
    "lite0": Start(*_LITE0),
    "lite0-x2": Start(*_LITE0, scale=2, end="blocks.6"),
    "densenet": Start(*_DENSENET, end=_BLOCK),
    "densenet-x2": Start(*_DENSENET, scale=2, end=_BLOCK),
    "resnet10t": Start(ENCODER, None, "encoder.layer2", IMAGENET_MEAN, IMAGENET_STD),
}


# Batch statistics must be learnt, and the head has nothing to start from.
_FROM_SCRATCH: dict[str, Any] = {"epochs": 20, "lr": 2e-3, "head_lr": 2e-3, "layer_decay": 1.0, "frozen": ()}


def part_of(job: Job) -> Part:
    """What a job trains on, and how."""
    part = _PARTS[job.part]
    return part if STARTS[job.encoder].file else replace(part, **_FROM_SCRATCH)


@dataclass(frozen=True)
class Job:
    """One training, or the probe of the frozen encoder."""

    part: str
    encoder: str
    method: str
    repeat: int
    fold: int
    data: str

    @property
    def name(self) -> str:
        """What its results are kept by, within the part."""
        return f"{self.encoder}-{self.method}-{self.repeat}-{self.fold}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument(
        "data", type=Path, help="Folder of pcam_patches, ebhi_seg, weights_encoders and tiles with masks."
    )
    parser.add_argument("--encoders", nargs="+", choices=STARTS, default=["lite0"])
    parser.add_argument("--methods", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--repeats", type=int, default=3)


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Every training asked for, fold by fold, so that what a stopped study has is paired."""
    return [
        Job(part, encoder, method, repeat, fold, str(arguments.data))
        for part in arguments.part
        for encoder in arguments.encoders
        for repeat in range(arguments.repeats)
        for fold in range(FOLDS)
        for method in arguments.methods
    ]


def key_of(job: Job) -> tuple[str, str, str, int, int]:
    """What the tables find a job's results by."""
    return job.part, job.encoder, job.method, job.repeat, job.fold


def dealt(job: Job) -> dict[str, float]:
    """See `studies.redealt.RATIOS`."""
    return {"testing": ratio_dealt(job.part, part_of(job), Path(job.data), job.repeat, job.fold)}


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    part, data, start = part_of(job), Path(job.data), STARTS[job.encoder]
    fixed = {
        "version": VERSION,
        "tables": {folder: _table_sha256(data / folder) for folder in (part.folder, part.more) if folder},
        "start": asdict(start),
        "weights": sha256_of(data / "weights_encoders" / start.file) if start.file else None,
    }
    if job.method == "frozen":
        return fixed | {"side_px": part.side_px, "scale": part.scale}
    objective = {name: value for name, value in vars(objective_of(job.method)).items() if not name.startswith("_")}
    return fixed | asdict(part) | {"objective": objective, "explained": asdict(EXPLAINED)}


def _table_sha256(folder: Path) -> str:
    return sha256_of(next(folder / name for name in ("labels.csv", "index.csv") if (folder / name).is_file()))


def prepare(_arguments: argparse.Namespace, _folder: Path) -> None:
    """Nothing is shared between trainings."""


@freed_memory_kept()
def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train on a fold's training side and score on its test side."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of maps that miss their sums, which is measured
    start, part, data = STARTS[job.encoder], part_of(job), Path(job.data)
    sides = split(items_of(job.part, part, data), part, data, job.repeat, job.fold)
    fit, held, test = (_enlarged(side, start.scale) for side in sides)
    torch.manual_seed(job.repeat)
    classes = GRADES if job.part == "ebhi" else ("normal", "tumour")
    ends = {} if start.end is None else {"end": start.end}
    network = TileClassifier(start.name, classes, False, start.input_mean, start.input_std, ends)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start.file is not None:
        load_encoder(network.encoder, data / "weights_encoders" / start.file)
        head = regression(network, [fit, held] if job.method == "frozen" else [fit])
        network.head.load_state_dict({name: torch.from_numpy(value) for name, value in vars(head).items()})
    if job.method == "frozen":
        network.eval()
        # The held-out side fitted the head, so nothing is left to fit a temperature on.
        return job, scores_of(network, None, test)
    before = copy.deepcopy(network.state_dict())
    train(network, objective_of(job.method), fit, part, job.repeat)
    scores = scores_of(network, held, test)
    scores |= explained(network, test) | pointing(network, held, test, job)
    return job, scores | ({} if start.file is None else halfway(network, before, held, test, job))


def regression(network: TileClassifier, sides: list[Items]) -> LinearHead:
    """The head of a regression on the encoder as it is."""
    features = [features_of(network.encoder, side.images.split(_BATCH), None, network.normalise) for side in sides]
    labels, groups = (np.concatenate([getattr(side, name) for side in sides]) for name in ("labels", "groups"))
    return fit_head(Labelled(np.concatenate(features), labels.astype(np.int64), groups))


def train(network: Classifier, objective: Objective, items: Items, part: Part, seed: int) -> None:
    """Train for all epochs; the last network is kept. Every objective sees the same images in the same order."""
    groups = parameter_groups(network, part.lr, part.weight_decay, part.frozen, part.layer_decay, part.head_lr)
    optimizer = torch.optim.AdamW(groups, lr=part.lr)
    sampler = SlideGroupedSampler(items.labels, np.full(len(items.labels), ""), part.samples, seed=seed)
    steps, labels = part.samples // part.batch_size, torch.from_numpy(items.labels.astype(np.int64))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=part.epochs * steps
    )
    changes, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for epoch in range(part.epochs):
        sampler.set_epoch(epoch)
        for step, rows in enumerate(torch.tensor(sampler.draw()).split(part.batch_size)):
            training(network)
            x = network.normalise(augment(items.images[rows], changes, part.stain))
            x = x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            objective(network, x, labels[rows], epoch + step / steps, draws).total.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def scores_of(network: TileClassifier, held: Items | None, test: Items) -> dict[str, float]:
    """Accuracy and AUC of the test side, and its calibration before and after the temperature of the held-out side.

    `ece_oracle` is of the temperature that the test side itself asks for: no honest one does better but by luck.
    `auc_held` is the held-out side's, for choices that the test side must not make. `auc_turned` and `ece_turned` are
    of log-odds averaged over the eight symmetries of the square, whose temperature is fitted to such log-odds.
    """
    chosen_by: dict[str, float] = {}
    temperature = turned_temperature = 1.0
    if held is not None:
        logits = _logits(network, held)
        temperature = fit_temperature(logits, held.labels)
        turned_temperature = fit_temperature(_turned_logits(network, held), held.labels)
        chosen_by = {"auc_held": auc(held.labels, logits[:, 1] - logits[:, 0])}
    logits, turned = _logits(network, test), _turned_logits(network, test)
    divisors = 1.0, temperature, fit_temperature(logits, test.labels)
    before, after, oracle = (softmax(logits / divisor)[:, 1] for divisor in divisors)
    return chosen_by | {
        "accuracy": float((logits.argmax(axis=1) == test.labels).mean()),
        "auc": auc(test.labels, logits[:, 1] - logits[:, 0]),
        "auc_turned": auc(test.labels, turned[:, 1] - turned[:, 0]),
        "ece_before": calibration_error(test.labels, before),
        "ece": calibration_error(test.labels, after),
        "ece_turned": calibration_error(test.labels, softmax(turned / turned_temperature)[:, 1]),
        "ece_oracle": calibration_error(test.labels, oracle),
        "ece_by_chance": calibration_error_by_chance(after),
        "temperature": temperature,
    }


def _turned_logits(network: TileClassifier, items: Items) -> npt.NDArray[np.float32]:
    """Their mean over the eight symmetries, as the bundle's `test_time_augmentation`."""
    whole = torch.ones(len(items.labels), dtype=torch.int64)
    sides = (replace(items, images=turn(items.images, number * whole)) for number in range(8))
    found: npt.NDArray[np.float32] = np.mean([_logits(network, side) for side in sides], axis=0)
    return found


def halfway(network: TileClassifier, before: dict[str, Tensor], held: Items, test: Items, job: Job) -> dict[str, float]:
    """Scores of the mean of the weights before and after the training (WiSE-FT, Wortsman et al. 2022), the last ones.

    Head and BatchNorm are the start's, too, so that the two lie on one path.
    """
    after = network.state_dict()
    floats = [name for name, value in after.items() if value.is_floating_point()]
    network.load_state_dict(after | {name: torch.lerp(before[name], after[name], 0.5) for name in floats})
    scores = scores_of(network, held, test) | pointing(network, held, test, job)
    kept = ("accuracy", "auc", "auc_held", "auc_turned", "ece", "ece_turned", "pixel_auc", "pixel_auc_other")
    return {f"{name}_half": scores[name] for name in kept if name in scores}


@torch.inference_mode()
def _logits(network: TileClassifier, items: Items) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = torch.cat([network(batch) for batch in items.images.split(_BATCH)]).numpy()
    return found


def explained(network: TileClassifier, test: Items) -> dict[str, Any]:
    """Faithfulness of the input gradient, and health of the features."""
    samples: list[Sample] = [
        {"image": image, "label": torch.tensor(int(label))}
        for image, label in zip(test.images, test.labels, strict=True)
    ]
    found = as_json(score_explanations(network, samples, EXPLAINED))
    gradient, features = found["maps"]["gradient"], found["features"]
    return {
        "masking_area": gradient["masking_area"]["value"],
        "gap": gradient["gap"]["value"],
        "deletion": gradient["deletion"]["value"],
        "insertion": gradient["insertion"]["value"],
        "correlation": features["mean_abs_correlation"],
        "correlation_by_chance": features["correlation_by_chance"],
        "rank": features["effective_rank"],
        "curve": [step["value"] for step in gradient["accuracy"]],
        "random_curve": [step["value"] for step in found["random"]["accuracy"]],
    }


def pointing(network: TileClassifier, held: Items, test: Items, job: Job) -> dict[str, Any]:
    """Where the additive map (DeepLift against the neutral reference) lies in real masks; nothing without a map.

    Of lymph nodes also on fields of other slides, `pixel_auc_other`, and of each field, which are those of every fold.
    """
    layer = STARTS[job.encoder].layer
    try:
        found = neutral_from_images(network, layer, _normalised(network, held.images), "evidence", 1)
    except (ConfigError, NetworkError):
        return {}
    network.neutral = asdict(found)
    method = make_method("deeplift", network, layer, "evidence", {"reference": "neutral"})

    def scored(fields: Iterator[_Field]) -> tuple[list[float], list[float]]:
        areas, energies = [], []
        for images, mask, margin in fields:
            with torch.no_grad():
                maps = torch.cat([method(batch, 1) for batch in _normalised(network, images)])
            inside = slice(margin, margin + len(mask))
            values = _stitched(maps, len(mask) + 2 * margin)[inside, inside]
            areas.append(auc(mask.ravel(), values.ravel()))
            scaled = torch.from_numpy(values / max(np.abs(values).max(), 1e-12))[None].double()
            energies.append(float(energy_pointing(scaled, torch.from_numpy(mask)[None])))
        return areas, energies

    areas, energies = scored(_masked(test, job))
    known = [energy for energy in energies if math.isfinite(energy)]
    measures: dict[str, Any] = {"pixel_auc": float(np.mean(areas)), "energy": float(np.mean(known))}
    if job.part == "pcam":
        others, _ = scored(_other_slides(job))
        measures |= {"pixel_auc_other": float(np.mean(others))}
        measures |= {"pixel_auc_each": areas, "pixel_auc_other_each": others}
    return measures


def _enlarged(items: Items, scale: int) -> Items:
    masks = None if items.masks is None else items.masks.repeat(scale, axis=1).repeat(scale, axis=2)
    return replace(items, images=_larger(items.images, scale), masks=masks)


def _larger(images: Tensor, scale: int) -> Tensor:
    """Images (n, 3, S, S) uint8 made larger as the bundle does."""
    pixels = [scaled(image, scale) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _normalised(network: TileClassifier, images: Tensor) -> Iterator[Tensor]:
    return (network.normalise(batch).contiguous(memory_format=torch.channels_last) for batch in images.split(_BATCH))


# Tiles (n, 3, S, S) that a field is cut into, row by row, its mask (H, H), and the pixels around it, not judged.
_Field = tuple[Tensor, npt.NDArray[np.bool_], int]


def _masked(test: Items, job: Job) -> Iterator[_Field]:
    if test.masks is not None:
        for row in np.flatnonzero(test.labels == 1):
            if 0 < test.masks[row].mean() < 1:
                yield test.images[row : row + 1], test.masks[row], 0
        return
    folder, side = Path(job.data) / "camelyon_tiles_tumour_masks", _PARTS[job.part].side_px
    table = read_table(folder / "index.csv", ("file", "mask"))
    for file, name in zip(table["file"], table["mask"], strict=True):
        with Image.open(folder / file) as image, Image.open(folder / name) as drawn:
            box = [(edge + sign * _MASKED_PX) // 2 for sign in (-1, 1) for edge in image.size]
            pixels = np.asarray(image.convert("RGB").crop(tuple(box)))  # type: ignore[arg-type]
            mask = np.asarray(drawn.convert("L").crop(tuple(box))) > 0  # type: ignore[arg-type]
        if 0.05 < mask.mean() < 0.95:
            tiles = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unfold(1, side, side).unfold(2, side, side)
            yield _larger(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1), STARTS[job.encoder].scale), mask, 0


def _other_slides(job: Job) -> Iterator[_Field]:
    """Patches of CAMELYON16 (62 um), each a tile in its mirrored margin, at the network's scale."""
    scale, side = STARTS[job.encoder].scale, _PARTS[job.part].side_px * STARTS[job.encoder].scale
    for field in camelyon16_patches(Path(job.data)):
        small = Image.fromarray(field.image).reduce(4 // scale)
        mask = np.asarray(Image.fromarray(field.tumour).convert("L").reduce(4 // scale)) > 127
        if not 0.01 < mask.mean() < 0.99:
            continue
        margin = (side - len(mask)) // 2
        tile = np.pad(np.asarray(small), ((margin, margin), (margin, margin), (0, 0)), "reflect")
        yield torch.from_numpy(tile).permute(2, 0, 1)[None], mask, margin


def _stitched(maps: Tensor, side: int) -> npt.NDArray[np.float32]:
    """Maps (n * n, h, w) of tiles, row by row, as one map at the pixels of their field (side, side)."""
    count = math.isqrt(len(maps))
    whole = maps.unflatten(0, (count, count)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    full: npt.NDArray[np.float32] = torch.nn.functional.interpolate(
        whole[None, None].float(), (side, side), mode="bilinear"
    )[0, 0].numpy()
    return full
