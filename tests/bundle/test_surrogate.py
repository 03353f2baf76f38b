"""The stage that trains surrogates, on a folder of patches and a classifier that is written there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from sklearn.metrics import roc_auc_score

from medsd.bundle.data import patch_data
from medsd.explain.surrogates import load_surrogate
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, load_classifier, read_tensors, save_classifier
from medsd.saliency import smooth

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "bundles" / "camelyon.json", ROOT / "configs" / "pcam.json", ROOT / "configs" / "smooth_surrogate.json"]
SMALL = {"surrogate_epochs": 2, "surrogate_samples": 32, "surrogate_batch_size": 8, "tile_px": 32}


def run_stage(stage: str, folder: Path, **overrides: object) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=[str(file) for file in FILES],
        workflow_type="train",
        logging_file=False,
        run_id=stage,
        bundle_root=str(ROOT),
        **{"dataset_dir": str(folder / "patches"), "output_dir": str(folder / "out"), **SMALL, **overrides},
    )
    flow.initialize()
    flow.run()
    return flow


def write_classifier(folder: Path, seed: int) -> None:
    """A classifier with random weights, of the split that the configuration makes."""
    torch.manual_seed(seed)
    classifier = TileClassifier("test_resnet")
    for parameter in classifier.encoder.parameters():
        if parameter.ndim == 1:  # timm starts residual branches at 0; every branch shall count
            torch.nn.init.uniform_(parameter, 0.2, 0.8)
    data = patch_data(str(folder / "patches"), 32, 0.97, validation_share=0.15, test_share=0.25)
    card = ModelCard("test_resnet", classifier.classes, 32, 0.97, data.description, data_sha256=data.fingerprint())
    save_classifier(folder / "out" / "model.safetensors", classifier, card)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surrogate")
    (folder / "patches" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with open(folder / "patches" / "labels.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "label", "stain_cluster"])
        for number in range(96):
            coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(folder / "patches" / "images" / f"p{number}.png")
            writer.writerow([f"p{number}", number % 2, number // 8])
    write_classifier(folder, 0)
    run_stage("surrogate", folder)
    return folder


def test_scores_are_those_of_the_files(finished: Path) -> None:
    scores = json.loads((finished / "out" / "surrogate.json").read_text())
    network, _, digest = load_classifier(finished / "out" / "model.safetensors")
    surrogate, card = load_surrogate(finished / "out" / "surrogate.safetensors", digest)
    assert scores["weights_sha256"] == card.weights_sha256 == digest and card.encoder == "test_resnet"
    assert scores["settings"] == card.settings and card.settings["epochs"] == 2 == len(scores["loss"])
    validation = patch_data(str(finished / "patches"), 32, 0.97, validation_share=0.15, test_share=0.25).part(
        "validation"
    )
    images = torch.stack([validation[item]["image"] for item in range(len(validation))])
    assert scores["items"] == len(images) > 8
    with torch.no_grad():
        plain = network(images).softmax(1)
        with smooth.surrogate(network, surrogate):
            replaced = network(images).softmax(1)
    labels = validation.labels
    assert scores["accuracy"] == pytest.approx(((plain[:, 1] > 0.5).numpy() == labels).mean())
    assert scores["surrogate_accuracy"] == pytest.approx(((replaced[:, 1] > 0.5).numpy() == labels).mean())
    assert scores["patch_auc"] == pytest.approx(roc_auc_score(labels, plain[:, 1]))
    assert scores["surrogate_patch_auc"] == pytest.approx(roc_auc_score(labels, replaced[:, 1]))
    assert scores["softmax_change"] == pytest.approx(float((plain - replaced).abs().sum(1).mean()), rel=1e-3)
    assert scores["softmax_change"] > 1e-4
    errors = smooth.measure_surrogate(network, surrogate, [network.normalise(images)])
    for name, error in errors.items():
        assert scores["points"][name]["relative_l1"] == pytest.approx(error.relative_l1, rel=1e-4)
        assert card.relative_l1[name] == scores["points"][name]["relative_l1"]


def test_running_again_trains_only_where_something_has_changed(finished: Path) -> None:
    written, scores = finished / "out" / "surrogate.safetensors", finished / "out" / "surrogate.json"

    def trains(**overrides: object) -> bool:
        stamp = written.stat().st_mtime_ns
        run_stage("surrogate", finished, **overrides)
        return written.stat().st_mtime_ns != stamp

    def digest() -> str:
        return read_tensors(written).sha256

    before, words = digest(), scores.read_text()
    assert not trains()
    scores.unlink()
    assert trains() and digest() == before and scores.read_text() == words
    assert trains(surrogate_lr=0.01) and digest() != before
    assert trains() and digest() == before
    content = written.read_bytes()
    written.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert trains() and digest() == before
    write_classifier(finished, 1)
    assert trains() and digest() != before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"surrogate_batch_size": 64}, "batch_size=64: must lie in 1 to samples=32"),
        ({"surrogate_also": ["maxpool"]}, "also='maxpool'.*'max_pool'"),
        ({"surrogate_lr": 0}, "lr=0"),
        ({"surrogate_epoch": 2}, "surrogate_epoch'.*'surrogate_epochs'"),
        ({"seed": 3}, "trained on another split of the data; run the stage 'finetune'"),
        ({"output_dir": "nowhere"}, "nowhere/model.safetensors: no such weights file"),
    ],
)
def test_a_wrong_choice_is_told(finished: Path, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(SystemExit, match=words) as stop:
        run_stage("surrogate", finished, **overrides)
    assert "\n" not in str(stop.value)
