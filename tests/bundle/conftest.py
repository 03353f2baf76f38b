"""Running a bundle's stages in this process, as the command line does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from medsd.bundle import check_config, mistake
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier

ROOT = Path(__file__).parents[2]
Run = Callable[..., ConfigWorkflow]


@pytest.fixture(scope="session")
def run_bundle() -> Run:
    """`run_bundle(files, *stages, **overrides)`; a user's mistake ends it as it ends the command: with its line."""

    def run(files: str, *stages: str, **overrides: Any) -> ConfigWorkflow:
        paths = [str(ROOT / file) for file in files.split(",")]
        settings = {"bundle_root": str(ROOT), **overrides}
        try:
            for stage in stages:
                check_config(paths, stage, **settings)
                flow = ConfigWorkflow(config_file=paths, run_id=stage, logging_file=False, **settings)
                flow.initialize()
                flow.run()
        except Exception as error:
            line = mistake(error)
            if line is None:
                raise
            assert "\n" not in line
            raise SystemExit(f"medsd: {line}") from error
        return flow

    return run


@pytest.fixture(scope="session")
def write_weights() -> Callable[..., str]:
    """`write_weights(path, data, seed=0)`: a calibrated classifier of the split of `data` that has learnt nothing."""

    def write(path: Path, data: Any, seed: int = 0) -> str:
        torch.manual_seed(seed)
        classifier = TileClassifier("test_resnet")
        for parameter in classifier.encoder.parameters():
            if parameter.ndim == 1:  # timm starts residual branches at 0; every branch shall count
                torch.nn.init.uniform_(parameter, 0.2, 0.8)
        card = ModelCard(
            encoder="test_resnet",
            classes=classifier.classes,
            tile_px=data.tile_px,
            mpp=data.mpp,
            trained_on=data.description,
            calibration=Calibration(0.5, {"gradient_x_activation": 1.0}, "layer3", "backward_hook", "a test"),
            data_sha256=data.fingerprint(),
            stain_target=data.stain_target and json.loads(json.dumps(asdict(data.stain_target))),
        )
        return save_classifier(path, classifier, card)

    return write


SMALL_SEGMENTATION: dict[str, Any] = {
    "encoder": "test_resnet",
    "pretrained": False,
    "input_mean": [0.485, 0.456, 0.406],
    "input_std": [0.229, 0.224, 0.225],
    "frozen": [],
    "side_px": 32,
    "batch_size": 8,
    "samples_per_epoch": 32,
    "max_epochs": 2,
}


def write_masked(folder: Path, patients: int = 8) -> None:
    """Two images a patient, dark where their mask is set; the last one's mask is empty."""
    folder.mkdir(parents=True)
    lines = ["file,mask,patient,label"]
    for number in range(2 * patients):
        draws = np.random.default_rng(number)
        mask = np.kron(draws.integers(2, size=(2, 2)), np.ones((16, 16))).astype(np.uint8)
        mask *= number < 2 * patients - 1
        mask[:16, :16] = number < 2 * patients - 1
        pixels = np.where(mask[..., None] > 0, 60, 200) + draws.integers(-20, 20, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask * 255).save(folder / f"{number}m.png")
        lines.append(f"{number}.png,{number}m.png,p{number // 2},{'a' if number % 3 else 'b'}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def small_masks() -> SimpleNamespace:
    """`write(folder)`: images with masks; `settings`: with which they train in a moment."""
    return SimpleNamespace(write=write_masked, settings=SMALL_SEGMENTATION)
