"""AIM laid on the bundle, in small: trained, written, mapped by its masks, and set beside another network."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from medsd.errors import TrainingError
from medsd.evaluate.compare import compare_runs
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.aim import AimClassifier
from medsd.networks.weights import load_classifier

FILES = "bundles/camelyon.json,configs/aim.json"
SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "pretrain_epochs": 1,
    "pretrain_samples": 32,
    "pretrain_batch_size": 16,
    "queue": 16,
    "pretraining::settings::group_size": 8,
    "max_epochs": 2,
    "samples_per_epoch": 64,
    "batch_size": 16,
    "explained_tiles": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, phantoms: Path, run_bundle) -> Path:
    folder = tmp_path_factory.mktemp("aim")
    overrides = {**SMALL, "phantom_dir": str(phantoms), "output_dir": str(folder / "aim")}
    # Whatever else a training can be asked for, all at once.
    more = {"hard_negative_epoch": 1, "patience": 5, "amp": "bfloat16", "accumulation": 2, "mask_target": 0.4}
    run_bundle(FILES, "run", **overrides, **more)
    return folder


def test_the_network_masks_its_features_and_its_weights_say_so(folder: Path) -> None:
    network, card, _ = load_classifier(folder / "aim" / "model.safetensors")
    assert isinstance(network, AimClassifier)
    assert card.architecture == "aim" and card.options["end_stage"] == 2
    assert card.calibration is not None and list(card.calibration.limits) == ["mask"]
    with open(folder / "aim" / "training" / "history.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[-1]["mask_target"]) < float(rows[0]["mask_target"]) <= 1
    settings = json.loads((folder / "aim" / "training" / "settings.json").read_text())
    assert (settings["loss_function"]["name"], settings["loss_function"]["mask_target"]) == ("AimObjective", 0.4)
    assert settings["network"]["options"]["end_stage"] == 2
    assert settings["hard_negatives"]["epoch"] == 1 and settings["patience"] == 5


def test_the_best_epoch_is_one_after_the_fall_of_the_target(
    folder: Path, phantoms: Path, run_bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_training(*_: object, complete_from: int, **__: object) -> None:
        raise TrainingError(f"from epoch {complete_from} on")

    monkeypatch.setattr("medsd.bundle.finetuning.run_training", run_training)
    overrides = {**SMALL, "phantom_dir": str(phantoms), "output_dir": str(folder / "aim"), "max_epochs": 20}
    with pytest.raises(SystemExit, match="from epoch 6 on"):
        run_bundle(FILES, "finetune", **overrides)
    with pytest.raises(SystemExit, match="from epoch 1 on"):
        run_bundle(FILES, "finetune", **overrides, masking=False, methods=["gradient"])


def test_its_map_is_that_of_the_masks(folder: Path) -> None:
    value_map = read_ome_tiff(folder / "aim" / "heatmaps" / "test_001" / "saliency.ome.tif")
    seen = value_map.values[value_map.seen]
    assert len(seen) and seen.min() >= 0 and seen.max() <= 1
    assert value_map.quantity == "mask"
    report = (folder / "aim" / "heatmaps" / "test_001" / "report.html").read_text()
    assert "all masks closed to all open" in report


def test_masks_are_judged_beside_the_gradient(folder: Path) -> None:
    scores = json.loads((folder / "aim" / "scores.json").read_text())
    assert set(scores["explanations"]["maps"]) == {"gradient", "mask"}


def test_runs_of_two_networks_are_compared(
    folder: Path, phantoms: Path, tmp_path: Path, run_bundle, write_weights
) -> None:
    overrides = {**SMALL, "phantom_dir": str(phantoms), "output_dir": str(folder / "plain")}
    data = run_bundle("bundles/camelyon.json", "prepare", **overrides).parser.get_parsed_content("data")
    write_weights(folder / "plain" / "model.safetensors", data)
    run_bundle("bundles/camelyon.json", "evaluate", **overrides)
    compare_runs([folder / "aim", folder / "plain"], tmp_path)
    with open(tmp_path / "compare.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows and (tmp_path / "compare.png").stat().st_size > 10_000
    text = (tmp_path / "compare.md").read_text()
    assert "ECE" in text and "effective rank" in text.lower()
    assert "mask: energy pointing, slides" in text  # AIM's maps are masks; the other run has no slides mapped
    assert "energy pointing, slides | higher" not in text.replace("mask: energy pointing, slides | higher", "")
