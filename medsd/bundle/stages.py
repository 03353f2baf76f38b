"""The stages of a bundle, and the factories of its parts."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from medsd.bundle.config import boundary
from medsd.bundle.data import Data, Items
from medsd.errors import ConfigError, DatasetError, NoTissueError, SlideError, WeightsError
from medsd.evaluate.plots import draw_summary
from medsd.evaluate.predict import predict
from medsd.evaluate.summary import as_json, score_slides, score_tiles
from medsd.files import atomic_path, make_folder, write_json
from medsd.finetune.objective import SaliencyDecor
from medsd.finetune.step import SaliencyDecorStep
from medsd.finetune.training import run_training
from medsd.heatmap.cohort import map_slides, read_results
from medsd.heatmap.engine import DenseEngine, MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import Attribution, ModelCard, Smoothing, load_classifier, save_classifier
from medsd.progress import progress_bar
from medsd.slides.dataset import SlideGroupedSampler
from medsd.slides.prepare import failed_slides

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
def sampler(
    dataset: Items, samples: int, batch_size: int, run: int = 1, by_group: bool = True, seed: int = 0
) -> SlideGroupedSampler:
    """Balanced draws of `samples` items an epoch, at least a batch, see `SlideGroupedSampler`.

    Classes are drawn evenly; with `by_group` so are the slides (or clusters) of a class, else as many as they hold.
    """
    if not 2 <= batch_size <= samples:
        raise ConfigError(f"batch_size={batch_size}: must lie in 2 to samples_per_epoch={samples}")
    groups = dataset.groups if by_group else np.zeros_like(dataset.groups)
    return SlideGroupedSampler(dataset.labels, groups, samples, run, seed)


@boundary
def step(
    consistency: float,
    decorrelation: float,
    masked_share: float,
    ramp_epochs: float,
    seed: int = 0,
    stain: float = 0.1,
    stain_apart: float = 0.0,
) -> SaliencyDecorStep:
    """The SaliencyDecor training step, see `SaliencyDecor` and `SaliencyDecorStep`."""
    objective = SaliencyDecor(consistency, decorrelation, masked_share, ramp_epochs)
    return SaliencyDecorStep(objective, seed, stain, stain_apart)


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
    # Training patches of one split are test patches of another: a training belongs to its split.
    settings = {**settings, "split": data.fingerprint()}
    run_training(trainer, evaluator, sampler, scheduler, Path(output_dir) / "training", settings)
    card = ModelCard(
        encoder=network.encoder_name,
        classes=network.classes,
        tile_px=data.tile_px,
        mpp=data.mpp,
        trained_on=data.description,
        data_sha256=settings["split"],
        settings_sha256=sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        stain_target=data.stain_target,
    )
    path = Path(output_dir) / WEIGHTS
    if not _is_written(path, network, card, map_settings):
        save_classifier(path, network, replace(card, calibration=data.calibrate(engine)))


def _is_written(path: Path, network: TileClassifier, card: ModelCard, settings: MapSettings) -> bool:
    """Whether `path` holds this network, calibrated with these settings: calibrating again would change nothing."""
    if not path.is_file():
        return False
    try:
        written, written_card, _ = load_classifier(path)
    except WeightsError:
        return False  # of an earlier version or damaged: written anew
    calibration = written_card.calibration
    state = network.state_dict()
    return (
        calibration is not None
        and replace(written_card, calibration=None) == card
        and (calibration.layer, calibration.attribution, calibration.smoothing)
        == (settings.layer, settings.attribution, settings.smoothing)
        and all(torch.equal(tensor, state[name].cpu()) for name, tensor in written.state_dict().items())
    )


@boundary
def evaluate(data: Data, output_dir: str, device: torch.device, batch_size: int = 64) -> None:
    """Stage evaluate: scores on the test tiles into `scores.json`, their probabilities into `test_tiles.npz`."""
    path = Path(output_dir) / WEIGHTS
    network, card, digest = load_classifier(path, device)
    if card.data_sha256 != data.fingerprint():
        raise WeightsError(f"{path}: trained on another split of the data; run the stage 'finetune' for this one")
    items = data.part("testing")
    probabilities = predict(network, items, batch_size=batch_size, progress=progress_bar("evaluate"))  # type: ignore[arg-type]
    scores = score_tiles(items.labels, probabilities, items.groups)
    with atomic_path(Path(output_dir) / "test_tiles.npz") as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, label=items.labels, probability=probabilities, group=items.groups)
    write_json(Path(output_dir) / SCORES, {"weights_sha256": digest, "tiles": as_json(scores)})


@boundary
def heatmap(data: Data, output_dir: str, device: torch.device, block_px: int) -> None:
    """Stage heatmap: a folder a test slide, `slides.csv`, `index.html`; a failed slide is a row, see `check_slides`."""
    jobs = data.jobs()
    if jobs:
        folder = Path(output_dir) / HEATMAPS
        map_slides(jobs, Path(output_dir) / WEIGHTS, folder, block_px, device, progress_bar("heatmap"))


@boundary
def check_slides(output_dir: str) -> None:
    """End with exit code 1 when slides failed, in any stage, or none had tissue; comes last, so the rest is done."""
    folder = Path(output_dir)
    reasons = failed_slides(folder / "prepared")
    if (folder / HEATMAPS / "slides.csv").is_file():
        results = read_results(folder / HEATMAPS)
        reasons |= {result.slide: result.reason for result in results if result.status == "failed"}
        if all(result.status == "empty" for result in results):
            raise NoTissueError(f"{folder / HEATMAPS}: no tissue in any slide; look at the thumbnails there")
    if reasons:
        raise SlideError(
            f"{len(reasons)} slide(s) failed, the others are done; the first: {next(iter(reasons.values()))}"
        )


@boundary
def report(data: Data, output_dir: str) -> None:
    """Stage report: slide scores and pointing shares beside the tile scores, and `summary.png`."""
    folder = Path(output_dir)
    scores = _read_scores(folder)
    entries = data.test_slides()
    if entries:
        slide_scores = score_slides(
            entries, read_results(folder / HEATMAPS), folder / HEATMAPS, scores["weights_sha256"]
        )
        write_json(folder / SCORES, {**scores, "slides": as_json(slide_scores)})
    draw_summary(folder / "summary.png", folder)


@boundary
def summary(output_dir: str) -> str:
    """What a run leaves, in a few lines: scores and where the files are."""
    folder = Path(output_dir)
    lines = ["", "medsd: done"]
    if (folder / SCORES).is_file():
        scores = _read_scores(folder)
        tiles = scores["tiles"]
        for words, key in (
            (f"{tiles['items']} tiles", "patch_auc"),
            (f"{tiles['groups']} groups", "patch_auc_by_group"),
        ):
            value, low, high = (_number(tiles[key][name]) for name in ("value", "low", "high"))
            lines.append(f"  patch AUC    {value}, 95 % interval {low} to {high} (resampling {words})")
        if "slides" in scores:
            slides = scores["slides"]
            ratio = _number(slides["mean_pointing_ratio"], 1)
            lines.append(f"  slide AUC    {_number(slides['slide_auc'])} ({len(slides['slides'])} slides)")
            lines.append(f"  pointing     positive saliency in tumour: {ratio} times tumour's share of the tissue")
    for label, name in (("weights", WEIGHTS), ("heatmaps", f"{HEATMAPS}/index.html"), ("figure", "summary.png")):
        if (folder / name).is_file():
            lines.append(f"  {label:<12} {folder / name}")
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    """A score in words; a dash where it has no value (one class only, no annotation)."""
    return "-" if value is None else f"{value:.{digits}f}"


def _read_scores(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    if not path.is_file():
        raise DatasetError(f"{path}: no scores; run the stage 'evaluate' first")
    scores: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return scores
