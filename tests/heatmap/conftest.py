"""A classifier that knows one thing, where it is green, and a phantom slide with green discs at known places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import Calibration, ModelCard, save_classifier
from medsd.phantom import PhantomSpec, draw_phantom, write_phantom

FIDUCIALS = ((700, 820), (1290, 1010), (1000, 1500))
CARD = ModelCard(
    encoder="test_resnet",
    classes=("normal", "tumour"),
    tile_px=32,
    mpp=1.0,
    trained_on="green discs",
    calibration=Calibration(0.5, 0.01, "layer2", "gradient_x_activation", "none", "green discs"),
)


@pytest.fixture(scope="session")
def fiducials() -> tuple[tuple[int, int], ...]:
    """Level-0 centres (x, y) of the discs."""
    return FIDUCIALS


@pytest.fixture(scope="session")
def fiducial_spec() -> PhantomSpec:
    return PhantomSpec(seed=5, tumour=False, size_px=2048, fiducials=FIDUCIALS)


@pytest.fixture(scope="session")
def fiducial_slide(tmp_path_factory, fiducial_spec) -> Path:
    path = tmp_path_factory.mktemp("slides") / "fiducials.tif"
    write_phantom(fiducial_spec, path)
    return path


@pytest.fixture(scope="session")
def green_classifier(fiducial_spec) -> TileClassifier:
    """Averaging kernels over a first layer that subtracts red and blue from green; sure at a disc's middle only."""
    network = TileClassifier(CARD.encoder).eval()
    first = True
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data = torch.ones_like(module.weight) / module.weight[0].numel()
        if isinstance(module, torch.nn.Conv2d) and first:
            module.weight.data[:, [0, 2]] *= -1
            first = False
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.ones_like(module.weight)
    network.head.weight.data[0] = 0
    network.head.bias.data.zero_()
    pixels = draw_phantom(replace(fiducial_spec, fiducials=FIDUCIALS[:1])).image[::2, ::2]
    x, y = (place // 2 for place in FIDUCIALS[0])
    crop = torch.from_numpy(pixels[y - 128 : y + 128, x - 128 : x + 128].copy()).permute(2, 0, 1)[None]
    engine = DenseEngine(network, CARD.tile_px, CARD.mpp, settings=MapSettings("layer2"))
    probability = torch.from_numpy(engine.run(crop)[0])
    peak = probability.logit().max()
    network.head.weight.data[1] *= 8 / peak
    network.head.bias.data[1] = -2.0
    return network


@pytest.fixture(scope="session")
def green_weights(tmp_path_factory, green_classifier) -> Path:
    path = tmp_path_factory.mktemp("weights") / "green.safetensors"
    save_classifier(path, green_classifier, CARD)
    return path


@pytest.fixture(scope="session")
def green_card() -> ModelCard:
    return CARD
