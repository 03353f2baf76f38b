"""Pre-training: Med-MoCo and its parts against MoCo v2, no pre-training and ImageNet, on real tissue."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from studies import pretrain_data
from studies.data import Items
from studies.finetune import Recipe, start_worker, train
from studies.pretrain_data import Images, Sides, ratios_of, sides_of
from studies.pretrain_tables import draw, tables
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from medsd.evaluate.mask_probe import DecoderSettings, Masked, decoder_dice, maps_of
from medsd.evaluate.probes import features_of, knn_probe, linear_probe, score_probe
from medsd.evaluate.scores import auc
from medsd.files import make_folder, sha256_of, write_json
from medsd.networks.classifier import Normalise, TileClassifier, create_encoder
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import evaluating
from medsd.networks.start import load_encoder, save_encoder
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.pretrain.collapse import spectrum
from medsd.pretrain.med_moco import MedMoCoSettings
from medsd.pretrain.start import EncoderStart, settle
from medsd.pretrain.step import PretrainStep
from medsd.pretrain.views import ViewSettings

__all__ = ["draw", "tables"]

VERSION = 1
IMAGENET = "tf_efficientnet_lite0.in1k.fp16.safetensors"


@dataclass(frozen=True)
class Part:
    """A data set and an encoder: what all variants share.

    `adamw` takes the place of SGD with momentum; its first epoch is a warm-up. `blur` and `grey` are shares of views.
    """

    data: str
    encoder: str
    imagenet: bool
    local_layer: str
    epochs: int
    lr: float
    queue: int
    view_px: int
    batch_size: int = 64
    adamw: bool = False
    weight_decay: float = 1e-4
    blur: float = 0.5
    grey: float = 0.2

    @property
    def normalise(self) -> Normalise:
        """What makes the encoder's input: of given weights their own."""
        return Normalise((0.5,) * 3, (0.5,) * 3) if self.imagenet else Normalise()


_ADAMW: dict[str, Any] = {"adamw": True, "lr": 1e-3, "weight_decay": 0.05}
_COLOUR: dict[str, Any] = {"blur": 0.0, "grey": 0.0}
_HALF = Part("pcam", "resnet10t_half", False, "layer2", epochs=15, lr=0.06, queue=768, view_px=64)
_LITE0 = Part("pcam", "tf_efficientnet_lite0", True, "blocks.2", epochs=5, lr=0.015, queue=768, view_px=64)
PARTS = {
    "pcam-resnet10t": _HALF,
    "pcam-resnet10t-colour": replace(_HALF, **_COLOUR),
    "pcam-resnet10t-adamw": replace(_HALF, **_ADAMW),
    "pcam-resnet10t-adamw-colour": replace(_HALF, **_ADAMW, **_COLOUR),
    "pcam-resnet18-adamw": replace(_HALF, encoder="resnet18", **_ADAMW),
    "pcam-lite0": _LITE0,
    "pcam-lite0-adamw": replace(_LITE0, adamw=True, lr=1e-4, weight_decay=0.05),
    "ebhi-lite0": Part("ebhi", "tf_efficientnet_lite0", True, "blocks.4", epochs=20, lr=0.015, queue=64, view_px=112),
    # For a GPU; those above for two cores.
    "pcam-resnet18": Part("pcam", "resnet18", False, "layer3", epochs=30, lr=0.06, queue=768, view_px=96),
    "ebhi-resnet18": Part("ebhi", "resnet18", False, "layer3", epochs=120, lr=0.06, queue=64, view_px=112),
}
START = "start"
VARIANTS = {
    "moco": MedMoCoSettings(local=0.0, decorrelation="none"),
    "local": MedMoCoSettings(decorrelation="none"),
    "w2": MedMoCoSettings(local=0.0),
    "med-moco": MedMoCoSettings(),
    "corr": MedMoCoSettings(local=0.0, decorrelation="corr"),
    "corr-4": MedMoCoSettings(local=0.0, decorrelation="corr", penalty=4.0),
    "local-corr": MedMoCoSettings(decorrelation="corr"),
    "local-corr-4": MedMoCoSettings(decorrelation="corr", penalty=4.0),
    "local-corr-16": MedMoCoSettings(decorrelation="corr", penalty=16.0),
    # One setting at a time, for a choice on validation.
    "moco-t0.1": MedMoCoSettings(local=0.0, decorrelation="none", temperature=0.1),
    "moco-t0.4": MedMoCoSettings(local=0.0, decorrelation="none", temperature=0.4),
    "local-corr-4-t0.4": MedMoCoSettings(decorrelation="corr", penalty=4.0, temperature=0.4),
    "med-moco-t0.1": MedMoCoSettings(temperature=0.1),
    "med-moco-t0.4": MedMoCoSettings(temperature=0.4),
    "med-moco-g16": MedMoCoSettings(group_size=16),
    "med-moco-g32": MedMoCoSettings(group_size=32),
}
# Fine-tuning: the share of labels, and epochs of as many steps.
FRACTIONS = {"finetune_10": (0.1, 20), "finetune_100": (1.0, 4)}
_RECIPE = Recipe(epochs=0, lr=1e-3, encoder_lr=3e-4)
_DECODER = DecoderSettings()
# Unlabelled images that BatchNorms of random weights take their statistics from.
_SETTLED_BY = 1024


@dataclass(frozen=True)
class Job:
    """One pre-training, or what it started from, and all that is measured of it."""

    part: str
    variant: str
    seed: int
    data: str
    folder: str
    device: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.variant}-{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Holds pcam_patches, ebhi_seg, nuinsseg, weights_encoders and so on.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", choices=(START, *VARIANTS), nargs="+", default=[START, *VARIANTS])
    parser.add_argument("--device", default="cpu")


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Seed by seed, so that a study that is stopped has whole comparisons."""
    return [
        Job(part, variant, seed, str(arguments.data), str(folder), arguments.device)
        for part in arguments.part
        for seed in range(arguments.seeds)
        for variant in arguments.variants
    ]


def key_of(job: Job) -> tuple[str, str, int]:
    """What the tables find a job's results by."""
    return job.part, job.variant, job.seed


def dealt(job: Job) -> dict[str, float]:
    """See `studies.redealt.RATIOS`."""
    return ratios_of(PARTS[job.part].data, Path(job.data), job.seed)


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on, but for the device."""
    return {
        **_pretraining_of(job),
        "finetune": [list(FRACTIONS.values()), asdict(_RECIPE)],
        "decoder": asdict(_DECODER),
    }


def _pretraining_of(job: Job) -> dict[str, Any]:
    """What the encoder of a job depends on."""
    weights = _weights(job)
    return {
        "version": [VERSION, pretrain_data.VERSION],
        "part": asdict(PARTS[job.part]),
        "variant": {"settled": _SETTLED_BY} if job.variant == START else asdict(VARIANTS[job.variant]),
        "weights": None if weights is None else {"sha256": sha256_of(weights), "input": _input_of(PARTS[job.part])},
    }


def _input_of(part: Part) -> dict[str, tuple[float, ...]]:
    return {"input_mean": part.normalise.input_mean, "input_std": part.normalise.input_std}


def _weights(job: Job) -> Path | None:
    return Path(job.data, "weights_encoders", IMAGENET) if PARTS[job.part].imagenet else None


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Decode all images once."""
    for data in {PARTS[part].data for part in arguments.part}:
        sides_of(data, arguments.data, make_folder(folder / "images"), 0)


@freed_memory_kept()
def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Pre-train, then measure."""
    start_worker()
    part = PARTS[job.part]
    sides = sides_of(part.data, Path(job.data), Path(job.folder, "images"), job.seed)
    encoder, found = _kept_encoder(job, part, sides.unlabelled)
    found |= _measured(encoder, part, sides) | _decoded(encoder, part, sides, job.device)
    for name, (share, epochs) in FRACTIONS.items():
        found[name] = _finetuned(encoder, part, sides, share, epochs, job)
    return job, found


def _kept_encoder(job: Job, part: Part, images: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of an earlier run of the same recipe, or a new one: fine-tuning anew need not pre-train anew."""
    weights = make_folder(Path(job.folder, "encoders", job.part)) / f"{job.name}.safetensors"
    record, recipe = weights.with_suffix(".json"), json.loads(json.dumps(_pretraining_of(job)))
    if record.is_file():
        kept = json.loads(record.read_text("utf-8"))
        if kept["recipe"] == recipe:
            encoder, _ = create_encoder(part.encoder, pretrained=False)
            load_encoder(encoder, weights, part.normalise)
            return encoder.to(job.device).eval(), kept["found"]
    record.unlink(missing_ok=True)
    started = time.perf_counter()
    encoder, found = _encoder(job, part, images)
    found["seconds"] = time.perf_counter() - started
    source = f"study of pre-training, {job.variant}, seed {job.seed}"
    save_encoder(weights, encoder, part.encoder, source, part.normalise)
    write_json(record, {"recipe": recipe, "found": found})
    return encoder, found


def _encoder(job: Job, part: Part, images: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    weights = _weights(job)
    given = None if weights is None else str(weights)
    start = EncoderStart(part.encoder, weights=given, channels_last=True, seed=job.seed, **_input_of(part))
    if job.variant == START:
        encoder = start.encoder_alone().to(job.device).eval()
        if start.is_random:
            drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(job.seed))[:_SETTLED_BY]
            settle(encoder, images[drawn].split(part.batch_size), start.normalise().to(job.device))
        return encoder, {}
    settings = replace(VARIANTS[job.variant], queue=part.queue, local_layer=part.local_layer)
    network = start.network(settings, torch.device(job.device))
    steps = len(images) // part.batch_size
    optimizer, schedule = _optimiser(part, [each for each in network.parameters() if each.requires_grad], steps)
    state = SimpleNamespace(
        device=torch.device(job.device), iteration=0, epoch=1, epoch_length=steps, max_epochs=part.epochs
    )
    engine: Any = SimpleNamespace(state=state, network=network, optimizer=optimizer)
    step = PretrainStep(seed=job.seed, views=ViewSettings(part.view_px, blur=part.blur, grey=part.grey))
    rows, last = _batches(len(images), part, job.seed), []
    for chosen in rows:
        state.iteration += 1
        state.epoch = 1 + (state.iteration - 1) // steps
        groups = torch.full((len(chosen),), -1)
        last.append(step(engine, {"image": images[chosen], "group": groups}))
        schedule.step()
    end = {name: float(np.mean([each[name] for each in last[-steps:]])) for name in last[-1]}
    with evaluating(network), torch.no_grad():
        seen = [network.normalise(batch.to(state.device)) for batch in images[:512].split(64)]
        embeddings = torch.cat([network.embed(batch)[1] for batch in seen])
    return network.plain_encoder().eval(), {"end": end, "embedding_rank": spectrum(embeddings).effective_rank}


def _optimiser(part: Part, learnt: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
    """The optimiser, and its rate by the step: a cosine, after AdamW's warm-up of an epoch of `steps`."""
    if not part.adamw:
        momentum = torch.optim.SGD(learnt, part.lr, momentum=0.9, weight_decay=part.weight_decay)
        return momentum, CosineAnnealingLR(momentum, part.epochs * steps)
    adamw = torch.optim.AdamW(learnt, part.lr, weight_decay=part.weight_decay)
    rates = [LinearLR(adamw, 0.05, total_iters=steps), CosineAnnealingLR(adamw, (part.epochs - 1) * steps)]
    return adamw, SequentialLR(adamw, rates, [steps])


def _batches(images: int, part: Part, seed: int) -> Iterator[Tensor]:
    """Rows of each step; what is left of an epoch is dropped. All variants see the same."""
    orders = torch.Generator().manual_seed(seed)
    for _ in range(part.epochs):
        order = torch.randperm(images, generator=orders)
        yield from (rows for rows in order.split(part.batch_size) if len(rows) == part.batch_size)


def _measured(encoder: nn.Module, part: Part, sides: Sides) -> dict[str, Any]:
    """Collapse of the features of test images, and what probes read off them."""

    def read(images: Images) -> np.ndarray:
        return features_of(encoder, images.pixels.split(64), normalise=part.normalise)

    features = [read(images) for images in (sides.training, sides.testing)]
    found = spectrum(features[1])
    measures: dict[str, Any] = {
        "rank": found.effective_rank,
        "participation": found.participation_ratio,
        "correlation": found.mean_abs_correlation,
        "singular": found.singular_values.tolist(),
    }
    train_on, test = sides.training.labelled(features[0]), sides.testing.labelled(features[1])
    for name, probe in (("probe", linear_probe), ("knn", knn_probe)):
        for kind, whiten in (("", False), ("_white", True)):
            scores = probe(train_on, test.features, whiten=whiten)
            measures[name + kind] = score_probe(test.labels, scores, test.groups).auc.value
    if sides.validation is not None:
        held = sides.validation.labelled(read(sides.validation))
        measures["validation_rank"] = spectrum(held.features).effective_rank
        scores = linear_probe(train_on, held.features)
        measures["validation_probe"] = score_probe(held.labels, scores, held.groups).auc.value
    return measures


def _decoded(encoder: nn.Module, part: Part, sides: Sides, device: str) -> dict[str, float]:
    """Dice of a linear decoder on the last map, whose stages are dilated to a stride of 8, as the paper's."""
    dilated = timm.create_model(part.encoder, num_classes=0, global_pool="", output_stride=8)
    dilated.load_state_dict(encoder.state_dict())
    dilated.to(device).eval()

    def maps(images: Images) -> Masked:
        assert images.masks is not None
        return Masked(maps_of(dilated, images.pixels.split(16), normalise=part.normalise), images.masks, images.groups)

    found = decoder_dice(maps(sides.masked_training), maps(sides.masked_testing), _DECODER, device)
    return {"dice": found.dice.value, "oracle": found.oracle.value}


def _finetuned(encoder: nn.Module, part: Part, sides: Sides, share: float, epochs: int, job: Job) -> float:
    """AUC of test items after cross-entropy on a share of the labels, drawn class by class."""
    known = np.flatnonzero(sides.training.labels >= 0)
    random, chosen = np.random.default_rng((job.seed, 4)), []
    for label in (0, 1):
        rows = random.permutation(known[sides.training.labels[known] == label])
        chosen.append(rows[: max(16, round(share * len(rows)))])
    rows = np.sort(np.concatenate(chosen))
    with torch.random.fork_rng([]):
        torch.manual_seed(job.seed)
        network = TileClassifier(part.encoder, **_input_of(part))
    network.encoder.load_state_dict(encoder.state_dict())
    network.to(job.device)
    labels = torch.from_numpy(sides.training.labels[rows]).to(job.device)
    pixels = sides.training.pixels[torch.from_numpy(rows)].to(job.device)
    items = Items(pixels, labels, cue=torch.zeros_like(labels))
    recipe = replace(_RECIPE, epochs=epochs, batch_size=min(_RECIPE.batch_size, len(rows)))
    train(network, SaliencyDecor(0, 0), items, recipe, job.seed)
    judged = sides.testing.labels >= 0
    tests = sides.testing.pixels[torch.from_numpy(judged)]
    with evaluating(network), torch.no_grad():
        logits = torch.cat([network(network.normalise(batch.to(job.device))).cpu() for batch in tests.split(64)])
    return auc(sides.testing.labels[judged], (logits[:, 1] - logits[:, 0]).numpy())
