"""AIM against cross-entropy and its twin without masks where a tint goes with the label in training, over seeds.

`phantoms`: tiles of phantom slides, tinted around a nest of cells, ResNet-10-t of half width. `pcam`, `ebhi`: real
tissue at 128 px, EfficientNet-Lite0 from ImageNet, the setting of the paper's Waterbirds-100: a pre-trained network,
`end_stage` 2, masks of 4 x 4 and 8 x 8 places, tau 0.25 and 0.35, falling linearly from 1. PatchCamelyon patches are
tinted as a whole, EBHI-Seg's biopsies outside the masks of glands and lesion. The paper's gains are those of
ConvNeXt-T, whose weights are not at hand, over the plain network; here they are told over its twin as well.

Beside them stands cross-entropy on the same tiles tinted at random: what there is to win. Tint and grades of `ebhi`
were chosen on the validation side of seed 0, by cross-entropy and a regression on frozen features alone. Six trainings
a seed and part of real tissue; with its scores one takes 2 (CE) to about 4 minutes of one core (EPYC; SaliencyDecor was
not timed), so that five seeds of both parts are some three hours of one core.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies import data, objectives, objectives_data, tissue
from studies.data import Items
from studies.finetune_tables import draw, tables
from studies.networks import ENCODER
from studies.objectives import STARTS

from medsd.cohort.dataset import Sample
from medsd.evaluate.explanations import ExplanationSettings, score_explanations
from medsd.evaluate.scores import auc
from medsd.files import as_json, sha256_of
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import evaluating
from medsd.networks.start import load_encoder, save_encoder
from medsd.objectives.aim import AimObjective
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.augment import augment
from medsd.training.network import parameter_groups
from medsd.training.terms import Objective

__all__ = ["draw", "tables"]

NO_SHORTCUT = "no-shortcut"


@dataclass(frozen=True)
class Recipe:
    """How every method of a part trains."""

    epochs: int
    lr: float
    encoder_lr: float
    batch_size: int = 32
    weight_decay: float = 0.01
    stain: float = 0.1
    start: str = ""


# How the phantoms train; real tissue: `tissue.PARTS`.
RECIPE = Recipe(epochs=3, lr=1e-3, encoder_lr=3e-4, start="phantoms")
_START = STARTS["lite0"]


@dataclass(frozen=True)
class Part:
    """What a part compares: methods, the options of AIM's networks, and what judges the explanations."""

    methods: tuple[str, ...]
    aim: dict[str, Any]
    explained: ExplanationSettings


_TISSUE = Part(
    ("ce", "saliencydecor", "twin", "aim-25", "aim-35", NO_SHORTCUT),
    {"end_stage": 2, "feature_width": 256, "mask_width": 64},
    ExplanationSettings(items=128, draws=1, steps=8, batch_size=128),
)
PARTS = {
    "phantoms": Part(
        ("ce", "twin", "aim-25", "aim-15"),
        {"end_stage": 1, "feature_width": 64, "mask_width": 16},
        ExplanationSettings(items=64, draws=2, batch_size=256),
    ),
    "pcam": _TISSUE,
    "ebhi": _TISSUE,
}


def objective_of(method: str, epochs: int) -> SaliencyDecor | AimObjective:
    """The objective of a method; one a training."""
    if method in ("ce", NO_SHORTCUT):
        return SaliencyDecor(0, 0)
    if method == "saliencydecor":
        return SaliencyDecor()
    if method == "twin":
        return AimObjective(epochs, 1.0, mask_weight=0.0)
    return AimObjective(epochs, int(method.removeprefix("aim-")) / 100)


def network_of(part: str, method: str) -> Classifier:
    """The network of a method, its encoder of random weights."""
    shown: dict[str, Any] = {"encoder": ENCODER}
    if part != "phantoms":
        shown = {"encoder": _START.name, "input_mean": _START.input_mean, "input_std": _START.input_std}
    if method in ("ce", "saliencydecor", NO_SHORTCUT):
        return TileClassifier(**shown)
    return AimClassifier(**shown, **PARTS[part].aim, masking=method != "twin")


@dataclass(frozen=True)
class Job:
    """One training."""

    part: str
    method: str
    seed: int
    data: str
    folder: str

    @property
    def name(self) -> str:
        """What its results are kept by, within the part."""
        return f"{self.method}-{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Folder of pcam_patches, pcam_more, ebhi_seg and weights_encoders.")
    parser.add_argument("--seeds", type=int, default=5)
    methods = list(dict.fromkeys(method for part in PARTS.values() for method in part.methods))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="Those that a part has.")


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Every training of the parts asked for, seed by seed."""
    return [
        Job(part, method, seed, str(arguments.data), str(folder))
        for seed in range(arguments.seeds)
        for part in arguments.part
        for method in PARTS[part].methods
        if method in arguments.methods
    ]


def key_of(job: Job) -> tuple[str, str, int]:
    """What the tables find a job's results by."""
    return job.part, job.method, job.seed


def dealt(job: Job) -> dict[str, float]:
    """See `studies.redealt.RATIOS`."""
    return {"testing": data.RATIO if job.part == "phantoms" else tissue.ratio_of(job.part, Path(job.data), job.seed)}


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    part, phantoms = PARTS[job.part], job.part == "phantoms"
    objective = objective_of(job.method, RECIPE.epochs if phantoms else tissue.PARTS[job.part].epochs)
    how = {
        "objective": {name: value for name, value in vars(objective).items() if not name.startswith("_")},
        "aim": part.aim,
        "explained": asdict(part.explained),
    }
    if phantoms:
        return asdict(RECIPE) | how | {"encoder": ENCODER, "data": data.VERSION}
    of = tissue.PARTS[job.part]
    table = Path(job.data, of.folder, "labels.csv" if job.part == "pcam" else "index.csv")
    pixels = {
        "data": tissue.VERSION,
        "tint": tissue.TINT[job.part],
        "side_px": tissue.SIDE_PX,
        "table": sha256_of(table),
    }
    return how | {"start": asdict(_START), "part": asdict(of), "pixels": pixels}


def start_worker() -> None:
    """One thread a process."""
    torch.set_num_threads(1)


@freed_memory_kept()
def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train, and score on the test side (and on the validation side, which recipes and tint are chosen on)."""
    start_worker()
    torch.manual_seed(job.seed)
    network = network_of(job.part, job.method)
    if job.part == "phantoms":
        split = data.phantoms_with_shortcut(Path(job.folder) / "slides", job.seed)
        load_encoder(network.encoder, pretrained_encoder(Path(job.folder)))
        train(network, objective_of(job.method, RECIPE.epochs), split.training, RECIPE, job.seed)
    else:
        of = tissue.PARTS[job.part]
        split = tissue.tissue_with_shortcut(job.part, Path(job.data), job.seed, job.method != NO_SHORTCUT)
        load_encoder(network.encoder, Path(job.data, "weights_encoders", _START.file), network.normalise)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        labels = split.training.labels.numpy().astype(np.int8)
        training = objectives_data.Items(split.training.images, labels, np.full(len(labels), ""))
        # The other study's loop: its rates fall from layer to layer of an encoder whose BatchNorm is frozen.
        objectives.train(network, objective_of(job.method, of.epochs), training, of, job.seed)
    scores: dict[str, Any] = {}
    for name, items in (("validation", split.validation), ("testing", split.testing)):
        scores |= {f"{name}_{key}": value for key, value in score(network, items).items()}
    return job, scores | explain(network, split.testing, PARTS[job.part].explained) | masks_of(network, split.testing)


def pretrained_encoder(folder: Path) -> Path:
    """The file of the encoder that the phantoms start from; see `prepare`."""
    return folder / f"encoder-{data.VERSION}.safetensors"


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Draw the phantom slides and pre-train their encoder, once.

    It learns tumour from normal nests on slides of its own, in surroundings whose tint is drawn at random: what
    ImageNet is to Waterbirds, a start that knows the objects and owes nothing to the shortcut.
    """
    if "phantoms" not in arguments.part:
        return
    for number in data.SLIDES:
        data.draw_slide(folder / "slides", number)
    if not pretrained_encoder(folder).is_file():
        torch.manual_seed(0)
        network = TileClassifier(ENCODER)
        items = data.phantoms_without_shortcut(folder / "slides")
        train(network, SaliencyDecor(0, 0), items, Recipe(epochs=6, lr=2e-3, encoder_lr=2e-3, stain=0.2), seed=0)
        save_encoder(pretrained_encoder(folder), network.encoder, ENCODER, "phantom tiles, tint at random")


def train(network: Classifier, objective: Objective, items: Items, recipe: Recipe, seed: int) -> None:
    """Train for all epochs; the last network is kept."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    (group,) = parameter_groups(network, recipe.lr, recipe.weight_decay)
    groups = [
        {"params": [p for p in group["params"] if id(p) in encoder], "lr": recipe.encoder_lr},
        {"params": [p for p in group["params"] if id(p) not in encoder], "lr": recipe.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    steps = len(items) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.encoder_lr, recipe.lr], total_steps=recipe.epochs * steps
    )
    # Two generators, so that every method sees the same images in the same order.
    orders, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(items), generator=orders)
        for step in range(steps):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = network.normalise(augment(items.images[rows], orders, recipe.stain))
            optimizer.zero_grad()
            objective(network, x, items.labels[rows], epoch + step / steps, draws).total.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def score(network: Classifier, items: Items) -> dict[str, float]:
    """Accuracy, AUC, and the least accuracy of the groups (label, cue) that the items hold."""
    with evaluating(network), torch.inference_mode():
        logits = torch.cat([network(batch) for batch in items.images.split(128)])
    correct = (logits.argmax(dim=1) == items.labels).float()
    groups = 2 * items.labels + items.cue
    by_group = {f"group_{int(group)}": float(correct[groups == group].mean()) for group in groups.unique()}
    return {
        "accuracy": float(correct.mean()),
        "auc": auc(items.labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy()),
        "worst_group": min(by_group.values()),
        **by_group,
    }


def explain(network: Classifier, items: Items, settings: ExplanationSettings) -> dict[str, Any]:
    """Faithfulness of the input gradient (and of AIM's masks), and health of the features."""
    samples: list[Sample] = [
        {"image": image, "label": label} for image, label in zip(items.images, items.labels, strict=True)
    ]
    region = None if items.masks is None else items.masks.numpy().__getitem__
    found = score_explanations(network, samples, settings, region)
    content = as_json(found)
    features, area = content["features"], content["area_share"]
    scores: dict[str, Any] = {
        "correlation": features["mean_abs_correlation"],
        "rank": features["effective_rank"],
        "dead": features["dead_channels"],
        "random_area": content["random"]["masking_area"]["value"],
        "chance_pointing": None if area is None else area["value"],
    }
    for name, of_map in content["maps"].items():
        for measure in (
            "masking_area",
            "gap",
            "deletion",
            "insertion",
            "total_variation",
            "gini",
            "entropy",
            "pointing",
        ):
            scores[f"{name}_{measure}"] = None if of_map[measure] is None else of_map[measure]["value"]
    return scores


def masks_of(network: Classifier, items: Items) -> dict[str, float]:
    """Share of places that AIM's masks leave open, by stage, and of images that a mask shuts out."""
    if not isinstance(network, AimClassifier):
        return {}
    with evaluating(network), torch.inference_mode():
        passes = [network.masked(batch).masks for batch in items.images.split(128)]
    shares = {
        stage: torch.cat([masks[number].mean(dim=(1, 2, 3)) for masks in passes])
        for number, stage in enumerate(network.stages)
    }
    open_shares = {f"open_{stage}": float(share.mean()) for stage, share in shares.items()}
    return open_shares | {f"empty_{stage}": float((share == 0).float().mean()) for stage, share in shares.items()}
