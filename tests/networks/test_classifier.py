"""The classifier is linear in pooled features and refuses encoders that are no maps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.networks.classifier import Normalise, TileClassifier
from medsd.networks.modes import evaluating, layer_named
from medsd.networks.start import load_encoder
from medsd.pretrain.start import EncoderStart


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    return TileClassifier("test_resnet").eval()


def test_forward_is_head_of_mean_features(classifier: TileClassifier) -> None:
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        cells = classifier.feature_map(x)
        assert cells.shape == (2, classifier.feature_dim, 2, 3)
        cell_logits = torch.einsum("bdhw,kd->bkhw", cells, classifier.head.weight).mean(dim=(2, 3))
        torch.testing.assert_close(classifier(x), cell_logits + classifier.head.bias)
        torch.testing.assert_close(classifier.features(x), cells.flatten(2).sum(2) / 6)


def test_uint8_is_normalised_as_imagenet(classifier: TileClassifier) -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = classifier.normalise(images)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(normalised[:, channel].double(), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(classifier(images), classifier(normalised))


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", "0.5"), ("mean", 0.5), ("mean", [0.5, 0.5]), ("mean", [0.5, 1.5, 0.5]), ("std", [0.5, 0.0, 0.5])],
)
def test_a_mean_or_deviation_that_is_none(key: str, value: Any) -> None:
    for make in (Normalise, partial(TileClassifier, "test_resnet"), partial(EncoderStart, "test_resnet")):
        with pytest.raises(ConfigError, match=f"input_{key}=") as caught:
            make(**{f"input_{key}": value})
        assert "\n" not in str(caught.value)


def test_timms_weights_are_fed_what_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model

    def without_download(name: str, pretrained: bool, **options: Any) -> torch.nn.Module:
        return made(name, pretrained=False, **options)

    monkeypatch.setattr("medsd.networks.classifier.timm.create_model", without_download)
    with pytest.raises(WeightsError, match=r"'test_resnet'.*input_mean \[0.5, 0.5, 0.5\].*not \[0.485"):
        TileClassifier("test_resnet", pretrained=True)
    halves = [0.5, 0.5, 0.5]
    assert TileClassifier("test_resnet", pretrained=True, input_mean=halves, input_std=halves).pretrained


def test_state_has_no_constants_and_tagged_names_work() -> None:
    classifier = TileClassifier("test_resnet.r160_in1k", ("a", "b", "c"))
    assert not {"mean", "std"} & set(classifier.state_dict())
    assert classifier.training
    assert all(module.training for module in classifier.modules())
    assert classifier.head.out_features == len(classifier.classes) == 3


def test_making_an_encoder_leaves_its_batchnorm_untouched(classifier: TileClassifier) -> None:
    for name, buffer in classifier.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 0, name


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("resnet81", "did you mean"),
        ("no such thing at all", "timm has no such network"),
        ("test_mambaout", r"channels last"),
        ("mixer_s32_224", "does not take images of every size"),
        ("resnet18.nope", "cannot make it"),
    ],
)
def test_unfit_encoders_are_refused_in_one_line(encoder: str, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        TileClassifier(encoder)
    assert encoder in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(NetworkError, match="couldn't connect") as caught:
        TileClassifier("test_resnet", pretrained=True)
    assert "\n" not in str(caught.value)


def test_layer_named(classifier: TileClassifier) -> None:
    assert layer_named(classifier.encoder, "layer2") is classifier.encoder.layer2
    for name in ("layer22", "", "head"):
        with pytest.raises(NetworkError, match="has no such layer"):
            layer_named(classifier.encoder, name)
    with pytest.raises(NetworkError, match="did you mean 'layer2'"):
        layer_named(classifier.encoder, "layr2")


@pytest.mark.parametrize(
    ("encoder", "channels"),
    [("mobilenetv3_small_050", 1024), ("lcnet_035", 1280), ("ghostnet_050", 1280), ("hgnetv2_b0", 2048)],
)
def test_channels_are_those_that_the_network_gives(encoder: str, channels: int) -> None:
    network = TileClassifier(encoder).eval()
    assert network.feature_dim == channels != network.encoder.num_features
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert network(x).shape == (1, 2)
        timms = timm.create_model(encoder, num_classes=0).eval()
        timms.load_state_dict(network.encoder.state_dict())
        torch.testing.assert_close(network.features(x), timms(x))  # of one cell, timm's own


def test_vgg_is_its_convolutions_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = timm.models.vgg.VGG(cfg=[4, "M", 8, "M", 8, "M", 8, "M", 8, "M"], num_classes=0, global_pool="")
    dense = "pre_logits.fc1.weight"
    assert dense in small.state_dict()
    whole = {**small.features.state_dict(prefix="features."), dense: torch.zeros(1)}
    monkeypatch.setattr("timm.create_model", lambda *_args, **_options: small)
    network = TileClassifier("vgg11")
    x = torch.randn(1, 3, 64, 96)
    assert network.feature_dim == 8
    torch.testing.assert_close(network.feature_map(x), small.features(x))
    assert not any(name.startswith("pre_logits") for name in network.state_dict())
    torch.save(whole, tmp_path / "vgg.pt")
    load_encoder(network.encoder, tmp_path / "vgg.pt")  # a file of the whole network does


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_puts_back_every_module(classifier: TileClassifier, fails: bool) -> None:
    network = TileClassifier("test_resnet")
    network.encoder.bn1.eval()  # a frozen BatchNorm in a network in training
    before = [module.training for module in network.modules()]
    try:
        with evaluating(network):
            assert not any(module.training for module in network.modules())
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert [module.training for module in network.modules()] == before
    assert not network.encoder.bn1.training
    assert network.training
