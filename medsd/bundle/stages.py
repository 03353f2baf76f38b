"""The stages of a bundle, and the factories of its parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from medsd.bundle.config import boundary
from medsd.bundle.data import Data, Items
from medsd.errors import DatasetError, MedsdError
from medsd.evaluate.plots import draw_summary
from medsd.evaluate.predict import predict
from medsd.evaluate.summary import as_json, score_slides, score_tiles
from medsd.files import make_folder, write_json
from medsd.finetune.objective import SaliencyDecor
from medsd.finetune.step import SaliencyDecorStep
from medsd.finetune.training import run_training
from medsd.heatmap.cohort import map_slides, read_results
from medsd.heatmap.engine import DenseEngine, MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import Attribution, ModelCard, Smoothing, load_classifier, save_classifier
from medsd.progress import progress_bar
from medsd.slides.dataset import SlideGroupedSampler

WEIGHTS, SCORES, HEATMAPS = "model.safetensors", "scores.json", "heatmaps"


@boundary
def classifier(encoder: str, pretrained: bool = False) -> TileClassifier:
    """The network: a timm encoder with a linear head for the classes normal and tumour."""
    return TileClassifier(encoder, pretrained=pretrained)


@boundary
def dataset(data: Data, part: str) -> Items:
    """The items of the part "training", "validation" or "testing"."""
    return data.part(part)


@boundary
def sampler(dataset: Items, samples: int, run: int = 8, seed: int = 0) -> SlideGroupedSampler:
    """Balanced draws of `samples` items an epoch, see `SlideGroupedSampler`."""
    return SlideGroupedSampler(dataset.labels, dataset.groups, samples, run, seed)


@boundary
def step(
    consistency: float,
    decorrelation: float,
    masked_share: float,
    ramp_epochs: float,
    seed: int = 0,
    stain: float = 0.1,
) -> SaliencyDecorStep:
    """The SaliencyDecor training step, see `SaliencyDecor` and `SaliencyDecorStep`."""
    return SaliencyDecorStep(SaliencyDecor(consistency, decorrelation, masked_share, ramp_epochs), seed, stain)


@boundary
def prepare(data: Data, output_dir: str) -> None:
    """Stage prepare: phantoms if wanted, tissue, tiles, labels."""
    make_folder(output_dir)
    data.prepare()


@boundary
def finetune(
    data: Data,
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator,
    sampler: SlideGroupedSampler,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    output_dir: str,
    layer: str,
    attribution: Attribution,
    smoothing: Smoothing,
    block_px: int,
    settings: dict[str, Any],
) -> None:
    """Stage finetune: train (or go on), then fix threshold and scale on validation data, then write the weights."""
    network = trainer.network
    assert isinstance(network, TileClassifier)
    map_settings = MapSettings(layer, attribution, smoothing, block_px)
    # Before hours of training: a layer or tile size that the network lacks is told now.
    engine = DenseEngine(network, data.tile_px, data.mpp, settings=map_settings)
    run_training(trainer, evaluator, sampler, scheduler, Path(output_dir) / "training", settings)
    card = ModelCard(network.encoder_name, network.classes, data.tile_px, data.mpp, data.description)
    card = replace(card, calibration=data.calibrate(engine))
    save_classifier(Path(output_dir) / WEIGHTS, network, card)


@boundary
def evaluate(data: Data, output_dir: str, device: torch.device, batch_size: int = 64) -> None:
    """Stage evaluate: scores on the test tiles into `scores.json`, their probabilities into `test_tiles.npz`."""
    network, _, digest = load_classifier(Path(output_dir) / WEIGHTS, device)
    items = data.part("testing")
    probabilities = predict(network, items, batch_size=batch_size, progress=progress_bar("evaluate"))  # type: ignore[arg-type]
    scores = score_tiles(items.labels, probabilities, items.groups)
    np.savez_compressed(
        Path(output_dir) / "test_tiles.npz", label=items.labels, probability=probabilities, group=items.groups
    )
    write_json(Path(output_dir) / SCORES, {"weights_sha256": digest, "tiles": as_json(scores)})


@boundary
def heatmap(data: Data, output_dir: str, device: torch.device, block_px: int) -> None:
    """Stage heatmap: a folder a test slide, `slides.csv` and `index.html`; fails at the end when a slide failed."""
    jobs = data.jobs()
    if not jobs:
        return
    folder = Path(output_dir) / HEATMAPS
    results = map_slides(jobs, Path(output_dir) / WEIGHTS, folder, block_px, device, progress_bar("heatmap"))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise MedsdError(f"{len(failed)} of {len(results)} slides failed, the first: {failed[0].reason}")


@boundary
def report(data: Data, output_dir: str) -> None:
    """Stage report: slide scores and pointing shares beside the tile scores, and `summary.png`."""
    folder = Path(output_dir)
    scores = _read_scores(folder)
    entries = data.test_slides()
    if entries:
        slide_scores = score_slides(entries, read_results(folder / HEATMAPS), folder / HEATMAPS)
        scores["slides"] = {**as_json(slide_scores), "mean_pointing_ratio": slide_scores.mean_pointing_ratio}
        write_json(folder / SCORES, scores)
    draw_summary(folder / "summary.png", folder)


def summary(output_dir: str) -> str:
    """What a run leaves, in a few lines: scores and where the files are."""
    folder = Path(output_dir)
    lines = ["", "medsd: done"]
    if (folder / SCORES).is_file():
        scores = _read_scores(folder)
        interval = scores["tiles"]["patch_auc"]
        lines.append(
            f"  patch AUC    {interval['value']:.3f} (95 % interval {interval['low']:.3f} to {interval['high']:.3f}, "
            f"{scores['tiles']['items']} tiles of {scores['tiles']['groups']} groups)"
        )
        if "slides" in scores:
            slides = scores["slides"]
            lines.append(f"  slide AUC    {slides['slide_auc']:.3f} ({len(slides['slides'])} slides)")
            lines.append(f"  pointing     {slides['mean_pointing_ratio']:.1f} times tumour's share of the tissue")
    for label, name in (("weights", WEIGHTS), ("heatmaps", f"{HEATMAPS}/index.html"), ("figure", "summary.png")):
        if (folder / name).is_file():
            lines.append(f"  {label:<12} {folder / name}")
    return "\n".join(lines)


def _read_scores(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    if not path.is_file():
        raise DatasetError(f"{path}: no scores; run the stage 'evaluate' first")
    scores: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return scores
