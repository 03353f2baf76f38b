"""The bundle that explains images: the same as the command, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
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


def workflow(data: Path, **overrides: object) -> ConfigWorkflow:
    settings = {
        "images": str(data / "images"),
        "weights": str(data / "model.safetensors"),
        "output_dir": str(data / "out"),
        "measured": False,
        "device": "cpu",
        "bundle_root": str(ROOT),
        **overrides,
    }
    return ConfigWorkflow(config_file=str(BUNDLE), workflow_type="inference", logging_file=False, **settings)


def run(flow: ConfigWorkflow) -> None:
    flow.initialize()
    flow.run()


def refusal(flow: ConfigWorkflow) -> str:
    with pytest.raises(SystemExit) as stop:
        run(flow)
    message = str(stop.value)
    assert message.startswith("medsd: ") and "\n" not in message
    return message


def test_images_are_explained(data, capsys):
    run(workflow(data, methods=["gradient", "tsm"], target=1, layer="layer3", smoothing="backward_hook"))
    assert f"2 image(s); see {data / 'out'}" in capsys.readouterr().out
    assert sorted(path.name for path in (data / "out").iterdir()) == [
        "maps.safetensors",
        "metrics.csv",
        "metrics.json",
        "sheet.png",
    ]
    settings = json.loads((data / "out" / "metrics.json").read_text())["settings"]
    assert settings["methods"] == ["gradient", "tsm"] and settings["smoothing"] == "backward_hook"


def test_mistakes_are_one_line(data):
    assert "'targt'" in refusal(workflow(data, targt="tumour")) and "'target'" in refusal(workflow(data, targt=1))
    assert "--images FOLDER" in refusal(workflow(data, images=None))
    assert "did you mean 'gradcam'" in refusal(workflow(data, methods="gradcamm"))
    assert not (data / "out").exists()
    (data / "images" / "a.png").write_text("hello")
    assert "1 image(s) failed, the others are done; the first: " in refusal(workflow(data, methods="tsm"))
    assert (data / "out" / "sheet.png").is_file()


def test_every_key_reaches_the_function():
    config = json.loads(BUNDLE.read_text())
    stage = config["explain"]
    assert all(stage[key] == f"@{key}" and key in config for key in stage if key != "_target_")
