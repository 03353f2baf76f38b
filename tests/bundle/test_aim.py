"""AIM laid on the bundle, in small: trained, written, mapped by its masks, and set beside SaliencyDecor."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from medsd.evaluate.compare import compare_runs
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.aim import AimClassifier
from medsd.networks.start import save_encoder
from medsd.networks.weights import load_classifier

ROOT = Path(__file__).parents[2]
SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "max_epochs": 2,
    "samples_per_epoch": 64,
    "batch_size": 16,
    "explained_tiles": 4,
}


def run(folder: Path, name: str, overlays: list[str], stages: list[str], **overrides: object) -> None:
    for stage in stages:
        flow = ConfigWorkflow(
            config_file=[str(ROOT / "bundles" / "camelyon.json"), *(str(ROOT / "configs" / f) for f in overlays)],
            workflow_type="train",
            logging_file=False,
            run_id=stage,
            bundle_root=str(ROOT),
            phantom_dir=str(folder / "phantom"),
            output_dir=str(folder / name),
            **{**SMALL, **overrides},
        )
        flow.initialize()
        flow.run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aim")
    run(folder, "aim", ["aim.json"], ["prepare", "finetune", "evaluate", "heatmap", "report"], mask_target=0.4)
    return folder


def test_the_network_masks_its_features_and_its_weights_say_so(folder: Path) -> None:
    network, card, _ = load_classifier(folder / "aim" / "model.safetensors")
    assert isinstance(network, AimClassifier)
    assert card.architecture == "aim" and card.options["end_stage"] == 2
    assert card.calibration is not None and card.calibration.attribution == "mask"
    with open(folder / "aim" / "training" / "history.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[-1]["mask_target"]) < float(rows[0]["mask_target"]) <= 1
    settings = json.loads((folder / "aim" / "training" / "settings.json").read_text())
    assert (settings["objective"]["name"], settings["objective"]["mask_target"]) == ("AimObjective", 0.4)
    assert settings["options"]["end_stage"] == 2


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


def test_runs_of_two_objectives_are_compared(folder: Path, tmp_path: Path) -> None:
    stages = ["prepare", "finetune", "evaluate"]
    run(folder, "decor", [], stages, mode="zca", hard_negative_epoch=1, patience=5, amp="bfloat16", accumulation=2)
    compare_runs([folder / "aim", folder / "decor"], tmp_path)
    with open(tmp_path / "compare.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows and (tmp_path / "compare.png").stat().st_size > 10_000
    text = (tmp_path / "compare.md").read_text()
    assert "ECE" in text and "effective rank" in text.lower()
    assert "mask: energy pointing, slides" in text  # AIM's maps are masks; the other run has no slides mapped
    assert "energy pointing, slides | higher" not in text.replace("mask: energy pointing, slides | higher", "")


def test_training_starts_from_an_encoder_whose_stages_can_be_frozen(folder: Path) -> None:
    trained, _, _ = load_classifier(folder / "aim" / "model.safetensors")
    save_encoder(folder / "encoder.safetensors", trained.encoder, "test_resnet", "a test")
    weights = str(folder / "encoder.safetensors")
    stages = ["prepare", "finetune"]
    run(
        folder,
        "frozen",
        [],
        stages,
        encoder_weights=weights,
        frozen=["layer1", "layer2"],
        layer_decay=0.5,
        max_epochs=1,
    )
    network, _, _ = load_classifier(folder / "frozen" / "model.safetensors")
    equal = {
        name.split(".")[0]
        for name, tensor in network.encoder.state_dict().items()
        if np.array_equal(tensor.numpy(), trained.encoder.state_dict()[name].numpy())
    }
    assert {"layer1", "layer2"} <= equal and "layer4" not in equal


def test_features_whitened_in_training_are_a_plain_linear_head_in_the_weights(folder: Path) -> None:
    run(folder, "layer", [], ["prepare", "finetune"], whitening=True, mode="layer", max_epochs=1)
    network, _, _ = load_classifier(folder / "layer" / "model.safetensors")
    assert set(dict(network.head.named_parameters())) == {"weight", "bias"}
    run(folder, "layer", [], ["finetune"], whitening=True, mode="layer", max_epochs=1)  # finished: nothing to do
