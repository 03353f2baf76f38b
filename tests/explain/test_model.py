"""Weights files as networks to explain: layers, classes, encoders, and what is refused."""

from __future__ import annotations

import pytest
import torch

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.explain.model import load_model
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import save_encoder
from medsd.networks.weights import ModelCard, save_classifier, save_tensors

CALIBRATION = Calibration(0.5, {"gradient_x_activation": 0.1}, "layer3", "none", "a test", temperature=2.0)


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    return TileClassifier("test_resnet").eval()


def saved(path, classifier, calibration=None):
    card = ModelCard("test_resnet", classifier.classes, 32, 0.5, "nothing", calibration)
    save_classifier(path, classifier, card)
    return load_model(path)


def test_a_classifier_brings_its_card(tmp_path, classifier):
    model = saved(tmp_path / "c.safetensors", classifier, CALIBRATION)
    assert model.classes == ("normal", "tumour") and model.temperature == 2.0 and model.smallest_px == 32
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model.network(model.normalise(images)), classifier(images))


def test_layers_are_found_in_the_network_and_in_its_encoder(tmp_path, classifier):
    model = saved(tmp_path / "c.safetensors", classifier, CALIBRATION)
    assert model.layer(None) == model.layer("layer3") == model.layer("encoder.layer3") == "encoder.layer3"
    assert model.layer("input") is None
    with pytest.raises(NetworkError, match=r"layer 'layr3'.*did you mean 'layer3'"):
        model.layer("layr3")
    assert saved(tmp_path / "d.safetensors", classifier).layer(None) == "encoder.layer4"


def test_classes_go_by_name_and_number(tmp_path, classifier):
    model = saved(tmp_path / "c.safetensors", classifier)
    known = {"predicted": None, "normal": 0, "tumour": 1, "Tumor": 1, "0": 0, "1": 1}
    assert {name: model.target(name) for name in known} == known
    for wrong, words in (
        ("tumur", "did you mean 'tumour'"),
        ("2", "use one of predicted, normal, tumour"),
        ("-1", ""),
        (5000 * "9", "use"),
    ):
        with pytest.raises(ConfigError, match=f"target '{wrong}'.*{words}"):
            model.target(wrong)


def test_an_encoder_has_no_classes(tmp_path, classifier):
    save_encoder(tmp_path / "e.safetensors", classifier.encoder, "test_resnet", "a test")
    model = load_model(tmp_path / "e.safetensors")
    assert model.classes == () and model.card is None and model.layer(None) == "layer4" and model.temperature == 1.0
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model.network(model.normalise(images)), classifier.feature_map(images))
    with pytest.raises(ConfigError, match=r"target '1'.*an encoder, which has no classes; leave it out"):
        model.target("1")


def test_weights_that_cannot_be_used_are_named(tmp_path, classifier):
    path = tmp_path / "w.safetensors"
    with pytest.raises(WeightsError, match="no such weights file"):
        load_model(path)
    path.write_text("hello")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_model(path)
    save_tensors(path, classifier.state_dict(), "another", {})
    with pytest.raises(WeightsError, match="weights of another network"):
        load_model(path)
    save_tensors(path, classifier.encoder.state_dict(), "medsd-encoder-1", {"source": "a test"})
    with pytest.raises(WeightsError, match="its card cannot be read"):
        load_model(path)
    with pytest.raises(ConfigError, match="device 'cuda:99': cannot be used here"):
        load_model(path, "cuda:99")
