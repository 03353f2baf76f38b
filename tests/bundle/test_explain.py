"""The bundle that explains images: the same as the command, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "explain.json"


@pytest.fixture
def data(tmp_path) -> Path:
    """Two images and the weights of a classifier."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for name in "ab":
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").eval()
    card = ModelCard("test_resnet", network.classes, 64, 0.5, "nothing")
    save_classifier(tmp_path / "model.safetensors", network, card)
    return tmp_path


@pytest.fixture
def run(data, run_bundle) -> Callable[..., object]:
    def stage(**overrides: object) -> object:
        settings = {
            "images": str(data / "images"),
            "weights": str(data / "model.safetensors"),
            "output_dir": str(data / "out"),
            "measured": False,
            "device": "cpu",
        }
        return run_bundle("bundles/explain.json", "run", **{**settings, **overrides})

    return stage


@pytest.fixture
def refusal(run) -> Callable[..., str]:
    def refused(**overrides: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(**overrides)
        return str(stop.value)

    return refused


def test_images_are_explained(data, run, capsys):
    run(methods=["gradient", "tsm"], target=1, layer="layer3", smoothing="backward_hook")
    assert f"2 image(s); see {data / 'out'}" in capsys.readouterr().out
    assert sorted(path.name for path in (data / "out").iterdir()) == [
        "maps.safetensors",
        "metrics.csv",
        "metrics.json",
        "sheet.png",
    ]
    settings = json.loads((data / "out" / "metrics.json").read_text())["settings"]
    assert settings["methods"] == ["gradient", "tsm"] and settings["smoothing"] == "backward_hook"


def test_mistakes_are_one_line(data, refusal):
    assert "'targt'" in refusal(targt="tumour") and "'target'" in refusal(targt=1)
    assert "--images FOLDER" in refusal(images=None)
    assert "did you mean 'gradcam'" in refusal(methods="gradcamm")
    assert not (data / "out").exists()
    (data / "images" / "a.png").write_text("hello")
    assert "1 image(s) failed, the others are done; the first: " in refusal(methods="tsm")
    assert (data / "out" / "sheet.png").is_file()


def test_every_key_is_used():
    config = json.loads(BUNDLE.read_text())
    texts = json.dumps([config["settings"], config["run"]])
    lists = {"_desc_", "imports", "bundle_root", "settings", "initialize", "run"}
    assert all(f"@{key}" in texts for key in config if key not in lists)
