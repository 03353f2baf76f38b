"""Segmentation: which start of the encoder, how many masks, and what masks for nothing are worth before real ones.

Every job is a run of `bundles/segmentation.json` as a user runs it. Encoders are those that the study of pre-training
keeps (`--out` of both the same), so that starts differ in their pre-training alone, and MoCo's tuned further on the
labels of its patches, by cross-entropy and by SaliencyDecor.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import monai.bundle
import numpy as np
import torch
from studies.data import Items
from studies.finetune import Recipe, start_worker, train
from studies.pretrain_data import sides_of
from studies.segment_tables import draw, tables

from medsd.errors import DatasetError
from medsd.files import make_folder, sha256_of
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import load_encoder, save_encoder
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.segment.network import Decoder
from medsd.segment.weak import IGNORED
from medsd.tables import read_table

__all__ = ["draw", "tables"]

VERSION = 2
# Unseen by the classifier, which learnt from slides of small seeds.
_FIRST_PHANTOMS = 100


@dataclass(frozen=True)
class Part:
    """A data set, and what all of its trainings share.

    Attributes:
        configs: files laid on the bundle.
        folder: of the data set, in the folder of all; empty for phantom slides.
        keys: of the bundle.
    """

    configs: tuple[str, ...]
    folder: str
    keys: dict[str, Any] = field(default_factory=dict)


# 128 steps, for two cores.
_FEW = {"max_epochs": 4, "val_interval": 2, "samples_per_epoch": 512, "batch_size": 16, "crop_px": 112}
# On whole images, or nearly: what a frozen map says near the border of a small square is not what it says within.
_LINEAR_CROP_PX = {"ebhi": None, "nuinsseg": 224}
_LINEAR_LR = 0.02
_OWN_MAPS: tuple[Decoder, ...] = ("linear8", "linear16")
_ON_OWN_MAPS = ("start", "moco", "med-moco", "lite0")
# Of EBHI-Seg, whose patients are many enough for a hundredth of them to be one.
_FEWEST = ("moco", "med-moco", "lite0")
PARTS = {
    "ebhi": Part(("configs/ebhi_segmentation.json",), "ebhi_seg", _FEW),
    "nuinsseg": Part(("configs/nuinsseg.json",), "nuinsseg", {**_FEW, "side_px": 256, "mask_kind": "semantic"}),
    "weak": Part((), "", {"phantom_slides": 80, "phantom_size_px": 1024, "encoder": "resnet10t"}),
}
Protocol = Literal["linear", "full"]
PRETRAINED = ("start", "moco", "med-moco", "local-corr-4")
# By the schedule that the study of pre-training chose.
_ADAMW = "-adamw"
PRETRAINED_SO = ("moco-adamw", "med-moco-adamw")
_PRETRAINED_ON, _HALF = "pcam-resnet10t", "resnet10t_half"
# From MoCo's encoder, with the labels of the training side of PatchCamelyon.
TUNED = {"ce": (0.0, 0.0), "saliencydecor": (1.0, 0.1)}
_TUNED_FROM, _TUNING = "moco", Recipe(epochs=8, lr=1e-3, encoder_lr=3e-4)
_IMAGENET = "tf_efficientnet_lite0.in1k.fp16.safetensors"


@dataclass(frozen=True)
class Setting:
    """One training of a part, but for its seed.

    Attributes:
        start: of the encoder: a variant of the study of pre-training (by SGD, or "-adamw"), one of `TUNED`, "lite0"
            (ImageNet), or, in the part "weak", of the classifier's encoder: "masks" alone, "weak" (evidence in the
            place of masks), or "weak then masks".
        protocol, fraction: keys of the bundle; a fraction of 0 looks at no training mask.
        sure, fill: of weak masks.
        decoder: key of the bundle; None for the paper's linear one, or U-Net.
    """

    start: str
    protocol: Protocol = "full"
    fraction: float = 1.0
    sure: float = 2.0
    fill: str = "ignore"
    decoder: Decoder | None = None

    @property
    def kind(self) -> str:
        """Protocol, or decoder where there is a choice."""
        return self.decoder or self.protocol

    @property
    def name(self) -> str:
        """Of files."""
        weak = f"-{self.sure:g}-{self.fill}" if self.start.startswith("weak") else ""
        return f"{self.start.replace(' ', '_')}-{self.kind}-{self.fraction:g}{weak}"


def settings_of(part: str, starts: Sequence[str]) -> list[Setting]:
    """What is trained in a part."""
    if part != "weak":
        kinds: list[tuple[Protocol, float]] = [("linear", 1.0), ("full", 0.1), ("full", 1.0)]
        settings = [Setting(start, *kind) for start in starts for kind in kinds]
        own = [start for start in starts if start in _ON_OWN_MAPS]
        settings += [Setting(start, "linear", decoder=decoder) for decoder in _OWN_MAPS for start in own]
        return settings + [Setting(start, fraction=0.01) for start in starts if start in _FEWEST and part == "ebhi"]
    weak = [Setting("weak", fraction=0, sure=sure) for sure in (1.0, 2.0, 4.0)]
    weak.append(Setting("weak", fraction=0, fill="random_walker"))
    real = [Setting(start, fraction=share) for start in ("masks", "weak then masks") for share in (0.01, 0.1, 1.0)]
    return weak + real


@dataclass(frozen=True)
class Job:
    """One training, scored on its test part."""

    part: str
    setting: Setting
    seed: int
    data: str
    folder: str
    encoder: str
    classifier: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.setting.name}-{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Holds ebhi_seg, nuinsseg, pcam_patches and weights_encoders.")
    parser.add_argument("--seeds", type=int, default=3)
    starts = [*PRETRAINED, *PRETRAINED_SO, *TUNED, "lite0"]
    parser.add_argument("--starts", choices=starts, nargs="+", default=starts)
    protocols = list(get_args(Protocol))
    parser.add_argument("--protocols", choices=protocols, nargs="+", default=protocols)
    parser.add_argument(
        "--classifier", type=Path, default=Path("runs/camelyon/model.safetensors"), help="Of the part 'weak'."
    )


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Seed by seed, so that a study that is stopped has whole comparisons."""
    kept = folder.parent / "pretrain" / "encoders"
    jobs = []
    for part in arguments.part:
        for seed in range(arguments.seeds):
            for setting in settings_of(part, arguments.starts):
                if setting.protocol not in arguments.protocols:
                    continue
                schedule = _ADAMW if setting.start in PRETRAINED_SO else ""
                variant = setting.start.removesuffix(schedule)
                encoder = kept / f"{_PRETRAINED_ON}{schedule}" / f"{variant}-{seed}.safetensors"
                if setting.start in TUNED:
                    encoder = _tuned(folder, setting.start, seed)
                elif setting.start == "lite0":
                    encoder = arguments.data / "weights_encoders" / _IMAGENET
                elif part == "weak":
                    encoder = arguments.classifier
                jobs.append(
                    Job(part, setting, seed, *map(str, (arguments.data, folder, encoder, arguments.classifier)))
                )
    return jobs


def key_of(job: Job) -> tuple[str, Setting, int]:
    """What the tables find a job's results by."""
    return job.part, job.setting, job.seed


def dealt(job: Job) -> dict[str, float]:
    """See `studies.redealt.RATIOS`; phantom slides are drawn anew for each seed, and nothing is dealt twice."""
    return {"testing": _ratio_dealt(job.part, Path(job.data), job.seed) if PARTS[job.part].folder else 0.0}


@lru_cache
def _ratio_dealt(part: str, data: Path, seed: int) -> float:
    parser = monai.bundle.ConfigParser()
    parser.read_config(["bundles/segmentation.json", *PARTS[part].configs])
    parser.update(PARTS[part].keys | {"dataset_dir": str(data / PARTS[part].folder), "seed": seed})
    masks = parser.get_parsed_content("masked")
    trained, tested = (len(masks.part(name)) for name in ("training", "testing"))
    return tested / trained


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    weights = Path(job.encoder)
    # Results from before there was a choice of decoders are still good.
    setting = {name: value for name, value in asdict(job.setting).items() if value is not None}
    files = ("bundles/segmentation.json", "configs/weak_labels.json", *PARTS[job.part].configs)
    return {
        "version": VERSION,
        "part": asdict(PARTS[job.part]),
        "files": {name: sha256_of(Path(name)) for name in files},
        "setting": setting,
        **({"linear": _linear_keys(job.part)} if job.setting.protocol == "linear" else {}),
        "encoder": sha256_of(weights) if weights.is_file() else None,
    }


def _linear_keys(part: str) -> dict[str, Any]:
    """Keys of the bundle where the encoder is frozen; MONAI takes None itself for not given."""
    crop_px = _LINEAR_CROP_PX[part]
    return {"crop_px": "$None" if crop_px is None else crop_px, "lr": _LINEAR_LR}


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Ask for the encoders before anything is trained, then tune what is tuned."""
    kept = folder.parent / "pretrain"
    for job in jobs_of(arguments, folder):
        tuned = job.setting.start in TUNED
        needed = kept / "encoders" / _PRETRAINED_ON / f"{_TUNED_FROM}-{job.seed}.safetensors" if tuned else job.encoder
        if not Path(needed).is_file():
            hint = (
                "run the bundle" if job.part == "weak" else f"run the study 'pretrain', part {_PRETRAINED_ON}[{_ADAMW}]"
            )
            raise DatasetError(f"{needed}: no such file; {hint} first, with the same --out")
        if tuned and not Path(job.encoder).is_file():
            _tune(Path(needed), Path(job.encoder), job, make_folder(kept / "images"))


def _tuned(folder: Path, start: str, seed: int) -> Path:
    return folder / f"encoders-{VERSION}" / f"{start}-{seed}.safetensors"


def _tune(start: Path, tuned: Path, job: Job, images: Path) -> None:
    """Go on from an encoder with the labels of the patches that it was pre-trained on."""
    patches = sides_of("pcam", Path(job.data), images, job.seed).training
    torch.manual_seed(job.seed)
    network = TileClassifier(_HALF)
    load_encoder(network.encoder, start)
    consistency, decorrelation = TUNED[job.setting.start]
    labels = torch.from_numpy(patches.labels)
    items = Items(patches.pixels, labels, cue=torch.zeros_like(labels))
    train(network, SaliencyDecor(consistency, decorrelation), items, _TUNING, job.seed)
    make_folder(tuned.parent)
    save_encoder(tuned, network.encoder, _HALF, f"study of segmentation, {job.setting.start}, seed {job.seed}")


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train by the bundle, and take its scores; the run's folder is kept until then, so that it may be stopped."""
    start_worker()
    part, setting = PARTS[job.part], job.setting
    runs = make_folder(Path(job.folder, "runs", job.part))
    keys = {
        **part.keys,
        "protocol": setting.protocol,
        **(_linear_keys(job.part) if setting.protocol == "linear" else {}),
        "decoder": setting.decoder or ("linear" if setting.protocol == "linear" else "unet"),
        "label_fraction": setting.fraction or 1.0,
        "encoder_weights": job.encoder,
        "seed": job.seed,
        "device": "$torch.device('cpu')",
    }
    if part.folder:
        keys["dataset_dir"] = str(Path(job.data, part.folder))
        if setting.start != "lite0":
            keys |= {"encoder": _HALF, "input_mean": [0.485, 0.456, 0.406], "input_std": [0.229, 0.224, 0.225]}
    else:
        phantoms = _FIRST_PHANTOMS + job.seed
        keys |= {"phantom_dir": str(Path(job.folder, "phantoms", str(phantoms))), "phantoms::seed": phantoms}
    if setting.start != "weak":
        if setting.start == "weak then masks":
            keys["start_weights"] = str(_weak_start(job, keys))
        return job, _scores(runs / job.name, part.configs, keys, None)
    return job, _scores(runs / job.name, part.configs, keys, _weak_keys(job), _kept(job))


def _weak_start(job: Job, keys: dict[str, Any]) -> Path:
    """What evidence trained, of the job that did so before, or new."""
    kept = _kept(job)
    if not kept.is_file():
        run = Path(job.folder, "runs", job.part, f"{job.name}-weak")
        _scores(run, (), {**keys, "label_fraction": 1.0}, _weak_keys(job), kept)
    return kept


def _kept(job: Job) -> Path:
    """Weights that evidence trained, whatever masks come after."""
    setting, digest = job.setting, sha256_of(Path(job.classifier))[:12]
    return Path(
        job.folder, f"weak_starts-{VERSION}", f"{setting.sure:g}-{setting.fill}-{job.seed}-{digest}.safetensors"
    )


def _weak_keys(job: Job) -> dict[str, Any]:
    return {"classifier": job.classifier, "sure": job.setting.sure, "fill": job.setting.fill}


def _scores(
    run: Path, configs: tuple[str, ...], keys: dict[str, Any], weak: dict[str, Any] | None, kept: Path | None = None
) -> dict[str, Any]:
    """Dice on the test part, of the best epoch on the validation part, and what weak masks are like.

    The weights go to `kept`, if anywhere; the rest of the run's folder is removed.
    """
    files = ["bundles/segmentation.json", *configs, *(["configs/weak_labels.json"] if weak else [])]
    # As `monai.bundle.run` does, which does not give back the workflow.
    workflow = monai.bundle.create_workflow(config_file=files, output_dir=str(run), **keys, **(weak or {}))
    workflow.run()
    workflow.finalize()
    (scores,) = json.loads((run / "scores.json").read_text("utf-8"))["masks"].values()
    history = read_table(run / "training" / "history.csv", ("epoch", "validation_dice"))
    found = {
        "dice": scores["dice"]["value"],
        "pooled": scores["pooled_dice"]["value"],
        "hausdorff95": scores["hausdorff95"]["value"],
        "surface_dice": scores["surface_dice"]["value"],
        "patients": scores["patients"],
        # Empty after the epochs that were not validated.
        "validation": max(float(value) for value in history["validation_dice"] if value),
    }
    if weak:
        items = workflow.parser.get_parsed_content("data").part("training")
        real = workflow.parser.get_parsed_content("masked").part("training")
        truth = np.stack([real[item]["label"][0].numpy() for item in range(len(real))])
        found["weak"] = {
            "said": float((items.masks != IGNORED).mean()),
            "precision": float((truth[items.masks == 1] == 1).mean()),
            "background": float((truth[items.masks == 0] == 0).mean()),
            "share": float(truth.mean()),
        }
    if kept is not None:
        make_folder(kept.parent)
        (run / "segmentation.safetensors").replace(kept)
    shutil.rmtree(run)
    return found
