"""configs/weak_labels.json: a network trained on a classifier's evidence alone, then on the few masks from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medsd.bundle import check_config
from medsd.bundle.weak import WeaklyLabelled
from medsd.errors import ConfigError, WeightsError
from medsd.networks.classifier import TileClassifier
from medsd.segment.weak import IGNORED, WeakLabelling
from medsd.segment.weights import load_segmentation

ROOT = Path(__file__).parents[2]
FOLDER = "bundles/segmentation.json,configs/ebhi_segmentation.json"
CLASSIFIER = "classifier.safetensors"


class Darkness:
    """An engine whose evidence is how dark a cell is, and a little of nothing where it is neither."""

    tile_px, mpp = 16, 1.0
    settings = SimpleNamespace(layer="layer1", methods=("deeplift",))
    classifier = TileClassifier("test_resnet").eval()

    def patch_saliency(self, tiles: torch.Tensor) -> np.ndarray:
        cells = torch.nn.functional.avg_pool2d(tiles.float().mean(dim=1), 4)
        return ((130 - cells) / 10).numpy() / 16


@pytest.fixture(autouse=True)
def dark(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(classes=("normal", "dark"), learnt_from=("of the classifier",))
    model = SimpleNamespace(engine=Darkness(), card=card, sha256="0" * 64)
    monkeypatch.setattr("medsd.bundle.weak.load_map_model", lambda *_: model)
    monkeypatch.setattr("medsd.bundle.weak.load_classifier", lambda *_: None)


def test_evidence_trains_before_masks_do(run_bundle: Callable[..., Any], small_masks, tmp_path, monkeypatch) -> None:
    small_masks.write(tmp_path / "masks")
    usual = {**small_masks.settings, "dataset_dir": str(tmp_path / "masks"), "protocol": "linear", "lr": 0.05}
    weak = {**usual, "output_dir": str(tmp_path / "weak"), "classifier": CLASSIFIER, "sure": 1.0}
    run_bundle(f"{FOLDER},configs/weak_labels.json", "segment", "evaluate", **weak)
    _, card, _ = load_segmentation(tmp_path / "weak" / "segmentation.safetensors")
    assert card.trained_on.startswith("evidence of classifier.safetensors, no masks; ")
    assert "of the classifier" in card.learnt_from
    scores = json.loads((tmp_path / "weak" / "scores.json").read_text())
    assert scores["masks"]["gland or lesion"]["dice"]["value"] > 0.6
    with np.load(tmp_path / "weak" / "weak" / "weak_masks.npz") as kept:
        masks = kept["masks"]
    assert set(np.unique(masks)) == {0, 1, IGNORED} and masks.shape[1:] == (32, 32)
    # What is kept is not made again.
    monkeypatch.setattr(Darkness, "patch_saliency", None)
    run_bundle(f"{FOLDER},configs/weak_labels.json", "segment", **weak)
    few = {**usual, "output_dir": str(tmp_path / "few"), "label_fraction": 0.1, "max_epochs": 1}
    start = str(tmp_path / "weak" / "segmentation.safetensors")
    run_bundle(FOLDER, "segment", **few, start_weights=start)
    _, card, _ = load_segmentation(tmp_path / "few" / "segmentation.safetensors")
    assert "of the classifier" in card.learnt_from  # by way of the weights that it starts from
    assert card.start.startswith("the whole network from segmentation.safetensors, SHA-256 ")
    with pytest.raises(
        SystemExit, match=r"segmentation\.safetensors: its decoder is linear8, not fpn; choose the same"
    ):
        other = {**few, "output_dir": str(tmp_path / "other"), "decoder": "fpn"}
        run_bundle(FOLDER, "segment", **other, start_weights=start)
    assert not (tmp_path / "other" / "training" / "settings.json").exists()
    with pytest.raises(SystemExit, match=r"none\.safetensors: no such weights file"):
        run_bundle(FOLDER, "segment", **other, start_weights=str(tmp_path / "none.safetensors"))


def data_of(classes: tuple[str, ...] = ("background", "dark"), mpp: float | None = 1.0) -> Any:
    return SimpleNamespace(classes=classes, mpp=mpp, fingerprint=lambda: "")


def test_what_cannot_be_used_is_told_in_a_line(tmp_path: Path, monkeypatch) -> None:
    rest = str(tmp_path), WeakLabelling(), torch.device("cpu")
    with pytest.raises(ConfigError, match="classifier: not set"):
        WeaklyLabelled(data_of(), None, *rest)
    with pytest.raises(ConfigError, match="evidence tells two apart; name two"):
        WeaklyLabelled(data_of(("a", "b", "c")), CLASSIFIER, *rest)
    with pytest.raises(ConfigError, match=r"mpp=2: .*takes 1 um per pixel"):
        WeaklyLabelled(data_of(mpp=2.0), CLASSIFIER, *rest).fingerprint()
    monkeypatch.setattr(Darkness, "settings", SimpleNamespace(layer="layer1", methods=("gradient",)))
    with pytest.raises(WeightsError, match=r"classifier\.safetensors: weak masks want a classifier of two classes"):
        WeaklyLabelled(data_of(), CLASSIFIER, *rest).fingerprint()


@pytest.mark.parametrize("below", [(), ("ebhi_segmentation",), ("nuinsseg",)])
def test_it_lies_on_any_data(below: tuple[str, ...]) -> None:
    files = ["bundles/segmentation.json", *(f"configs/{name}.json" for name in (*below, "weak_labels"))]
    check_config([str(ROOT / name) for name in files])
