"""The stage that trains surrogates, on a folder of patches and a classifier that is written there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from medsd.bundle.data import PatchData
from medsd.explain.surrogates import load_surrogate
from medsd.networks.weights import load_classifier
from medsd.saliency import smooth

FILES = "bundles/camelyon.json,configs/pcam.json,configs/smooth_surrogate.json"
SMALL = {"surrogate_epochs": 2, "surrogate_samples": 32, "surrogate_batch_size": 8, "tile_px": 32}
Stage = Callable[..., object]


@pytest.fixture(scope="module")
def run_stage(run_bundle) -> Stage:
    def run(folder: Path, **overrides: object) -> object:
        places = {"dataset_dir": str(folder / "patches"), "output_dir": str(folder / "out")}
        return run_bundle(FILES, "surrogate", **{**places, **SMALL, **overrides})

    return run


def data(folder: Path) -> PatchData:
    """The split that the configuration makes."""
    return PatchData(str(folder / "patches"), 32, 0.97)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_stage: Stage, write_weights: Stage) -> Path:
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
    write_weights(folder / "out" / "model.safetensors", data(folder))
    run_stage(folder)
    return folder


def test_scores_are_those_of_the_files(finished: Path) -> None:
    scores = json.loads((finished / "out" / "surrogate.json").read_text())
    network, _, digest = load_classifier(finished / "out" / "model.safetensors")
    surrogate, card = load_surrogate(finished / "out" / "surrogate.safetensors", digest)
    assert scores["recipe"]["weights_sha256"] == card.weights_sha256 == digest and card.encoder == "test_resnet"
    assert scores["recipe"]["settings"] == card.settings and card.settings["epochs"] == 2 == len(scores["loss"])
    validation = data(finished).part("validation")
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


def test_running_again_trains_only_where_something_has_changed(
    finished: Path, run_stage: Stage, write_weights: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, scores = finished / "out" / "surrogate.safetensors", finished / "out" / "surrogate.json"
    content, weights = written.read_bytes(), finished / "out" / "model.safetensors"
    network, _, digest = load_classifier(weights)
    kept, _ = load_surrogate(written, digest)
    report = smooth.SurrogateReport(smooth.measure_surrogate(network, kept, [torch.zeros(1, 3, 32, 32)]), (0.5,))
    trainings: list[object] = []

    def train(*arguments: object) -> object:
        trainings.append(arguments)
        return kept, report

    monkeypatch.setattr(smooth, "train_surrogate", train)

    def trains(**overrides: object) -> bool:
        before = len(trainings)
        run_stage(finished, **overrides)
        return len(trainings) > before

    assert not trains()
    scores.unlink()
    assert trains() and not trains()
    assert trains(surrogate_lr=0.01) and trains() and not trains()
    written.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert trains() and not trains()
    write_weights(weights, data(finished), 1)
    assert trains() and not trains()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"surrogate_batch_size": 64}, "surrogate_batch_size=64: must be a whole number from 1 to 32"),
        ({"surrogate_also": ["maxpool"]}, "also='maxpool'.*'max_pool'"),
        ({"surrogate_lr": 0.0}, "lr=0"),
        ({"surrogate_epoch": 2}, "surrogate_epoch'.*'surrogate_epochs'"),
        ({"seed": 3}, "trained on another split of the data; run the stage 'finetune'"),
        ({"output_dir": "nowhere"}, "nowhere/model.safetensors: no such weights file"),
    ],
)
def test_a_wrong_choice_is_told(finished: Path, run_stage: Stage, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        run_stage(finished, **overrides)
