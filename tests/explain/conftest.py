"""A small classifier, its encoder, and images of two sizes on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import save_encoder
from medsd.networks.weights import ModelCard, save_classifier


@pytest.fixture(scope="session")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").eval()
    torch.nn.init.normal_(network.head.weight, std=2.0)
    return network


@pytest.fixture(scope="session")
def weights(tmp_path_factory, classifier) -> Path:
    """A calibrated classifier whose card says tiles of 64 px."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    calibration = Calibration(0.5, {"gradient_x_activation": 0.25}, "layer3", "none", "a test", temperature=3.0)
    save_classifier(path, classifier, ModelCard("test_resnet", classifier.classes, 64, 0.5, "noise", calibration))
    return path


@pytest.fixture(scope="session")
def encoder_weights(tmp_path_factory, classifier) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, classifier.encoder, "test_resnet", "a test")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of 64 px and one of 96 x 80 px, with a mask of two of them in `masks` beside it."""
    generator = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name, size in (("a", (64, 64)), ("b", (80, 96)), ("c", (64, 64)), ("d", (64, 64))):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        if name in "ab":
            mask = np.zeros(size, np.uint8)
            mask[: size[0] // 2] = 255
            Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path / "images"
