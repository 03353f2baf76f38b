"""A classifier that knows one thing, where it is green, and a phantom slide with green discs at known places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medsd.cohort.entry import SlideEntry
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.model import MapRequest
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier
from medsd.phantom import PhantomSpec, draw_phantom, write_phantom
from medsd.phantom.files import write_pyramid

FIDUCIALS = ((700, 820), (1290, 1010), (1000, 1500))
SPEC = PhantomSpec(seed=5, tumour=False, size_px=2048)
CARD = ModelCard(
    encoder="test_resnet",
    classes=("normal", "tumour"),
    tile_px=32,
    mpp=1.0,
    trained_on="green discs",
    calibration=Calibration(0.5, {"gradient_x_activation": 0.01}, "layer2", "none", "green discs"),
)


@pytest.fixture(scope="session")
def fiducials() -> tuple[tuple[int, int], ...]:
    """Level-0 centres (x, y) of the discs."""
    return FIDUCIALS


@pytest.fixture(scope="session")
def fiducial_spec() -> PhantomSpec:
    return SPEC


def with_discs(image: np.ndarray, centres: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Green discs of 64 px across."""
    image = image.copy()
    for x, y in centres:
        rows, columns = np.ogrid[y - 32 : y + 32, x - 32 : x + 32]
        inside = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= 32**2
        image[y - 32 : y + 32, x - 32 : x + 32][inside] = (0, 160, 60)
    return image


@pytest.fixture(scope="session")
def plain_image() -> np.ndarray:
    return draw_phantom(SPEC).image


@pytest.fixture(scope="session")
def fiducial_slide(tmp_path_factory, plain_image) -> Path:
    path = tmp_path_factory.mktemp("slides") / "fiducials.tif"
    write_pyramid(path, with_discs(plain_image, FIDUCIALS), SPEC.mpp, SPEC.pyramid_factor)
    return path


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory) -> Path:
    """Tissue on 512 x 512 px, where only the files count that are left."""
    path = tmp_path_factory.mktemp("small") / "small.tif"
    write_phantom(PhantomSpec(seed=5, tumour=False, size_px=512), path)
    return path


@pytest.fixture(scope="session")
def green_classifier(plain_image) -> TileClassifier:
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
    pixels = with_discs(plain_image, FIDUCIALS[:1])[::2, ::2]
    x, y = (place // 2 for place in FIDUCIALS[0])
    crop = torch.from_numpy(pixels[y - 128 : y + 128, x - 128 : x + 128].copy()).permute(2, 0, 1)[None]
    engine = DenseEngine(network, CARD.tile_px, CARD.mpp, settings=MapSettings(("gradient_x_activation",), "layer2"))
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
def mapped(tmp_path_factory, fiducial_slide, green_weights) -> Path:
    """The outputs of the slide, in a folder of a cohort; all that can be asked for."""
    output = tmp_path_factory.mktemp("maps")
    entry = SlideEntry(fiducial_slide.stem, fiducial_slide)
    (result,) = map_slides([entry], green_weights, output, MapRequest(also=("overlay.tif", "tiles.geojson", "dicom")))
    assert result.status == "ok"
    return output / fiducial_slide.stem


@pytest.fixture(scope="session")
def green_card() -> ModelCard:
    return CARD
