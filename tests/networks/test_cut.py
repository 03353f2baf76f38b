"""An encoder that ends early gives the inner layer's own map, starts from whole weights and is kept as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import load_encoder
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.training.network import parameter_groups

CLASSES = ("normal", "tumour")


def map_at(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a layer of a whole network gives, by torch's own hook."""
    found: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: found.append(output))
    network.eval()(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "layer2"),
        ("test_resnet", "layer4"),
        ("tf_efficientnet_lite0", "blocks.4"),
        ("densenet121", "features.denseblock3"),
        ("test_convnext", "stages.1"),
        ("vgg11", "features.10"),
    ],
)
@torch.no_grad()
def test_its_features_are_the_mean_of_the_layers_map(name: str, layer: str, tmp_path: Path) -> None:
    whole = timm.create_model(name, num_classes=3)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    classifier = TileClassifier(name, CLASSES, encoder_options={"end": layer}).eval()
    load_encoder(classifier.encoder, tmp_path / "whole.safetensors")
    images = torch.randn(2, 3, 64, 96)
    expected = map_at(whole, layer, images)
    torch.testing.assert_close(classifier.feature_map(images), expected)
    torch.testing.assert_close(classifier(images), classifier.head(expected.mean(dim=(2, 3))))
    kept = sum(tensor.numel() for tensor in classifier.encoder.state_dict().values())
    assert kept < sum(tensor.numel() for tensor in whole.state_dict().values())


def test_it_is_kept_with_its_end_and_no_other_encoder_takes_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    classifier = TileClassifier("test_resnet", encoder_options={"end": "layer2"}).eval()
    save_classifier(path, classifier, ModelCard("test_resnet", CLASSES, 96, 1.0, "a test", options=classifier.options))
    again, card, _ = load_classifier(path)
    assert card.options == {"encoder_options": {"end": "layer2"}}
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), classifier(images))
    with pytest.raises(WeightsError, match=r"missing: 'layer3"):
        load_encoder(TileClassifier("test_resnet").encoder, path)


def test_layers_are_counted_from_its_end() -> None:
    classifier = TileClassifier("test_resnet", encoder_options={"end": "layer2"})
    groups = parameter_groups(classifier, 1.0, 0.0, layer_decay=0.5)
    assert max(group["lr"] for group in groups) == 1
    trained = sum(len(group["params"]) for group in groups)
    assert trained == len(list(classifier.parameters()))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet18", {"end": "layer9"}, NetworkError, "end: layer 'layer9': .* did you mean 'layer4'"),
        ("resnet18", {"ends": "layer3"}, ConfigError, "encoder_options of 'resnet18'='ends': .* did you mean 'end'"),
        ("resnet18", {"end": 3}, ConfigError, "end=3: must be the name of a layer"),
        ("resnet18", {"end": "layer3.0.conv2"}, NetworkError, "end='layer3.0.conv2': the encoder cannot end there"),
        # A shortcut is added to this map in place; to that one's, which random weights make 0, something else.
        ("resnet18", {"end": "layer4.1.bn2"}, NetworkError, "what follows takes more than its map"),
        ("resnet18", {"end": "layer3.0.downsample"}, NetworkError, "what follows takes more than its map"),
        ("test_vit", {"end": "blocks.0"}, ConfigError, "ends by 'depth'"),
    ],
)
def test_ends_that_cannot_be(name: str, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TileClassifier(name, encoder_options=options)
