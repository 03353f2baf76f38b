"""A run's folder with a small calibrated classifier of three classes, scores and configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medsd.export.source import CONFIG, TrainedClassifier, open_trained
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.weights import ModelCard, save_classifier
from medsd.phantom import PhantomSpec, draw_phantom

CLASSES = ("normal", "adenoma", "carcinoma")
ROOT = Path(__file__).parents[2]


@torch.no_grad()
def lively(network: Classifier) -> Classifier:
    """The network, with residual branches that count (timm starts them at 0) and answers that differ between tiles."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.encoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.2, 0.8, generator=generator)
    network.eval()
    drawn = torch.from_numpy(draw_phantom(PhantomSpec(seed=1, tumour=True, size_px=1024)).image[::2, ::2].copy())
    tiles = drawn.permute(2, 0, 1).unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)
    mean, std = (moment(network.features(tiles), 0) for moment in (torch.mean, torch.std))
    weight = torch.randn(network.head.weight.shape, generator=generator) / (std + std.mean()) / std.numel() ** 0.5
    network.head.weight.copy_(weight)
    network.head.bias.copy_(-weight @ mean)
    return network


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return Calibration(
        *(0.4, {"gradient_x_activation": 0.01}, "layer3", "none", "a test"),
        temperature=0.7,
        drawn_shares=(0.4, 0.3, 0.3),
        tissue_shares=(0.8, 0.15, 0.05),
        bias=(0.0, 0.2, -0.1),
        way="tiled",
    )


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, calibration: Calibration) -> Path:
    """What a run of the default bundle leaves, as far as an export looks at it. Do not write."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    mean, std = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)  # such as no default would give
    network = lively(TileClassifier("test_resnet", CLASSES, input_mean=mean, input_std=std))
    card = ModelCard(
        *("test_resnet", CLASSES, 64, 1.0, "drawn slides", calibration),
        tissue="colon, H&E",
        input_mean=mean,
        input_std=std,
        others={"carcinoma": calibration},
    )
    digest = save_classifier(folder / "model.safetensors", network, card)
    auc = {"value": 0.875, "low": 0.75, "high": 0.9375, "level": 0.95, "resamples": 1000}
    scores = {"weights_sha256": digest, "target": "adenoma", "tiles": {"patch_auc": auc, "items": 61, "groups": 7}}
    (folder / "scores.json").write_text(json.dumps(scores))
    config = json.loads((ROOT / "bundles" / "camelyon.json").read_text())
    config |= {"output_dir": "/somewhere/out", "dataset_dir": "/somewhere/slides", "classes": list(CLASSES)}
    config |= {"encoder": "test_resnet", "encoder_weights": "/somewhere/else/encoder.safetensors"}
    (folder / CONFIG).parent.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def trained(run_folder: Path) -> TrainedClassifier:
    found = open_trained(run_folder)
    assert isinstance(found, TrainedClassifier)
    return found
