"""The stages of the bundles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch.utils.data import DataLoader

from medsd.bundle.data import Data
from medsd.bundle.inference import FoundSlides
from medsd.bundle.masks import MaskData
from medsd.bundle.pretraining import ENCODER
from medsd.classes import folded
from medsd.cohort.learnt import learnt_and_tested, why_too_good
from medsd.cohort.prepare import failed_slides
from medsd.errors import ConfigError, DatasetError, NoTissueError, SlideError, WeightsError
from medsd.evaluate.explanations import ExplanationSettings, score_explanations
from medsd.evaluate.lesion_scores import judge_slides, score_lesions, write_lesion_scores
from medsd.evaluate.plots import draw_froc, draw_summary
from medsd.evaluate.probes import score_probe
from medsd.evaluate.runs import read_run_json
from medsd.evaluate.summary import interval_text, score_slides, score_text, score_tiles
from medsd.evaluate.temperature import score_calibration, softmax
from medsd.explain.explain import explain_images
from medsd.explain.settings import ExplainSettings
from medsd.files import as_json, atomic_path, make_folder, write_json
from medsd.heatmap.cohort import map_slides, read_results
from medsd.heatmap.model import MapRequest
from medsd.networks.calibrated import calibrated
from medsd.networks.classifier import Classifier
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import usable_device
from medsd.networks.weights import ModelCard, load_classifier
from medsd.progress import progress_bar
from medsd.training.predict import collect

logger = logging.getLogger(__name__)

WEIGHTS, SCORES, HEATMAPS = "model.safetensors", "scores.json", "heatmaps"
_BATCH = 64


def prepare(data: Data, output_dir: str) -> None:
    """Stage prepare: phantoms if wanted, tissue, tiles, labels."""
    make_folder(output_dir)
    data.prepare()


def load_own(data: Data, path: Path, device: torch.device) -> tuple[Classifier, ModelCard, str]:
    """The classifier of the stage finetune, if it was trained on this very split of the data.

    Raises:
        WeightsError: there is none, or it was trained on other classes or on another split.
    """
    network, card, digest = load_classifier(path, usable_device(device))
    if list(map(folded, card.classes)) != list(map(folded, data.classes)):
        raise WeightsError(
            f"{path}: its classes are {', '.join(card.classes)}, those of the data {', '.join(data.classes)}; set "
            "--classes, or train on these"
        )
    if card.data_sha256 != data.fingerprint():
        raise WeightsError(f"{path}: trained on another split of the data; run the stage 'finetune' for this one")
    return network, card, digest


@freed_memory_kept()
def evaluate(
    data: Data, output_dir: str, device: torch.device, explained_tiles: int = 64, workers: int = 0, seed: int = 0
) -> None:
    """Stage evaluate: scores on the test tiles into `scores.json`, their probabilities into `test_tiles.npz`.

    Args:
        explained_tiles: tiles whose explanations are judged, see `score_explanations`; 0 for none.
        workers: processes that read tiles.
        seed: draws the tiles that are judged.
    """
    path = Path(output_dir) / WEIGHTS
    network, card, digest = load_own(data, path, device)
    if card.calibration is None:
        raise WeightsError(f"{path}: not calibrated; run the stage 'finetune' to its end")
    target, found = card.asked(data.target)
    calibration, items = found or card.calibration, data.part("testing")
    loader = DataLoader(items, batch_size=_BATCH, num_workers=workers)
    features, labels = collect(network, loader, progress_bar("evaluate"), network.features)
    if network.test_time_augmentation:
        logits, _ = collect(network, loader, progress_bar("evaluate, turned"))
    else:
        with torch.inference_mode():
            logits = network.head(torch.from_numpy(features).to(device)).cpu().numpy()
    adjusted = calibrated(torch.from_numpy(logits), calibration.temperature, calibration.offset).numpy()
    probabilities = softmax(adjusted)[:, target].astype(np.float32)
    log_odds = adjusted[:, target] - logsumexp(np.delete(adjusted, target, axis=1), axis=1)
    has = (items.labels == target).astype(np.int8)
    content = {
        "weights_sha256": digest,
        "data_sha256": card.data_sha256,
        "target": card.classes[target],
        "other": card.classes[0] if len(card.classes) == 2 else "other classes",
        # Ranked by log-odds, since probabilities of sure tiles are all 1.
        "tiles": as_json(score_tiles(has, log_odds, items.groups)),
        "calibration": as_json(
            score_calibration(
                logits, items.labels, calibration.temperature, calibration.threshold, calibration.offset, target
            )
        ),
    }
    if learnt := learnt_and_tested(data, card.learnt_from):
        content["learnt_before"] = learnt
    if len(network.classes) > 2:
        rest = [logsumexp(np.delete(logits, number, axis=1), axis=1) for number in range(len(network.classes))]
        content["classes"] = as_json(score_probe(items.labels, logits - np.stack(rest, axis=1), items.groups))
    if explained_tiles:
        settings = ExplanationSettings(items=explained_tiles, target=target, seed=seed)
        explained = score_explanations(
            network, items, settings, progress=progress_bar("explain"), collected=(features, labels)
        )
        content["explanations"] = as_json(explained)
    with atomic_path(Path(output_dir) / "test_tiles.npz") as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, label=has, probability=probabilities, log_odds=log_odds, group=items.groups)
    write_json(Path(output_dir) / SCORES, content)


def heatmap(
    data: Data | FoundSlides,
    output_dir: str,
    device: torch.device,
    block_px: int | None = None,
    also: Sequence[str] = (),
    faithful_tiles: int = 64,
    workers: int = 0,
    weights: str | None = None,
) -> None:
    """Stage heatmap: a folder a test slide, `slides.csv`, `index.html`; a failed slide is a row, see `check_slides`.

    Args:
        block_px, also, faithful_tiles: see `MapRequest`.
        workers: processes that read a slide; 0 for one.
        weights: a calibrated classifier's; None for those in `output_dir`.
    """
    jobs = data.jobs()
    if jobs:
        folder = Path(output_dir) / HEATMAPS
        request = MapRequest(
            block_px=block_px, also=also, faithful_tiles=faithful_tiles, target=data.target, workers=workers or None
        )
        map_slides(jobs, weights or Path(output_dir) / WEIGHTS, folder, request, device, progress_bar("heatmap"))


def check_slides(data: Data | MaskData | FoundSlides, output_dir: str) -> None:
    """End with exit code 1 when slides failed, in any stage, or none had tissue; comes last, so the rest is done."""
    folder = Path(output_dir)
    reasons = failed_slides(folder / "prepared")
    jobs = getattr(data, "jobs", None)  # a segmentation maps no slides
    if jobs is not None and (folder / HEATMAPS / "slides.csv").is_file():
        mapped = {entry.name for entry in jobs()}  # other runs may have mapped other slides there
        results = [result for result in read_results(folder / HEATMAPS) if result.slide in mapped]
        reasons |= {result.slide: result.reason for result in results if result.status == "failed"}
        if results and all(result.status == "empty" for result in results):
            raise NoTissueError(f"{folder / HEATMAPS}: no tissue in any slide; look at the thumbnails there")
    if reasons:
        raise SlideError(
            f"{len(reasons)} slide(s) failed, the others are done; the first: {next(iter(reasons.values()))}"
        )


def report(data: Data, output_dir: str) -> None:
    """Stage report: scores of slides and their lesions beside those of tiles, and `summary.png`.

    Of lesions: `lesions.csv` with FROC, slide AUC and Dice, the curves in `froc.csv`, `roc.csv` and `froc.png`, and
    `candidates/<slide>.csv` as CAMELYON16 takes them.
    """
    folder = Path(output_dir)
    scores = _read_scores(folder)
    entries = data.test_slides()
    if entries:
        card = load_classifier(folder / WEIGHTS)[1]
        target = card.asked(data.target)[0]
        results, digest = read_results(folder / HEATMAPS), scores["weights_sha256"]
        slide_scores = score_slides(entries, results, folder / HEATMAPS, digest, card.classes, target)
        mapped = [entry for entry in entries if entry.name in slide_scores.slides]
        judged = judge_slides(mapped, folder / HEATMAPS, card, folder / "candidates", target=data.target)
        lesions = score_lesions(judged)
        write_lesion_scores(folder, judged, lesions)
        draw_froc(folder / "froc.png", judged, lesions, card.classes[target])
        write_json(folder / SCORES, {**scores, "slides": as_json(slide_scores), "lesions": as_json(lesions)})
    draw_summary(folder / "summary.png", folder)


def summary(output_dir: str) -> str:
    """What a run leaves, in a few lines: scores and where the files are."""
    folder = Path(output_dir)
    lines = ["", "medsd: done"]
    if (folder / SCORES).is_file():
        scores = _read_scores(folder)
        tiles, target = scores["tiles"], scores.get("target", "tumour")
        for words, key in (
            (f"{tiles['items']} tiles", "patch_auc"),
            (f"{tiles['groups']} groups", "patch_auc_by_group"),
        ):
            lines.append(f"  patch AUC    {interval_text(tiles[key])} (resampling {words})")
        if "slides" in scores:
            slides = scores["slides"]
            ratio = score_text(slides["mean_pointing_ratio"], 1)
            lines.append(f"  slide AUC    {score_text(slides['slide_auc'])} ({len(slides['slides'])} slides)")
            what = "open masks" if slides.get("quantity") == "mask" else "positive saliency"
            lines.append(f"  pointing     {what} in {target}: {ratio} times its share of the tissue")
        if "lesions" in scores:
            lesions, froc = scores["lesions"], scores["lesions"]["maps"]["model"]["froc"]
            what = f"{lesions['lesions']} lesions, resampling {lesions['slides']} slides"
            lines.append(f"  lesion FROC  {interval_text(froc)} ({what})")
        if learnt := scores.get("learnt_before"):
            lines.append(f"  beware       {why_too_good(learnt)}")
    for label, name in (
        ("encoder", ENCODER),
        ("weights", WEIGHTS),
        ("heatmaps", f"{HEATMAPS}/index.html"),
        ("figure", "summary.png"),
        ("lesions", "lesions.csv"),
    ):
        if (folder / name).is_file():
            lines.append(f"  {label:<12} {folder / name}")
    return "\n".join(lines)


def _read_scores(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    if not path.is_file():
        raise DatasetError(f"{path}: no scores; run the stage 'evaluate' first")
    return read_run_json(path)


def explain(
    images: str | Sequence[str] | None,
    weights: str,
    output_dir: str,
    settings: ExplainSettings,
    masks: str | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """Stage explain: contact sheets, tables and maps of images, see `explain_images`; what was made, in words.

    Args:
        images: a folder or file, or several.
        weights, output_dir, settings, masks, device: as in `explain_images`.

    Raises:
        ConfigError: no images are named.
        DatasetError: an image could not be read; the others are done.
    """
    if not images:
        raise ConfigError("images: not set; name a folder of images, --images FOLDER")
    places = [images] if isinstance(images, str) else list(images)
    explained = explain_images(places, weights, output_dir, settings, masks, device, progress_bar("explain"))
    if explained.failed:
        raise DatasetError(
            f"{len(explained.failed)} image(s) failed, the others are done; the first: "
            f"{next(iter(explained.failed.values()))}"
        )
    return f"{explained.in_words()}\n{explained.images} image(s); see {output_dir}"
