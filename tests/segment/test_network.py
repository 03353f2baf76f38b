"""Networks: what they are made of, where their weights come from and go, what is trained of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.networks.classifier import TileClassifier
from medsd.networks.modes import training
from medsd.networks.start import save_encoder
from medsd.networks.weights import ModelCard, save_classifier
from medsd.segment.network import Decoder, SegmentationNetwork, standardise_channels
from medsd.segment.transfer import transfer_weights
from medsd.segment.weights import SegmentationCard, load_segmentation, save_segmentation
from medsd.training.network import parameter_groups

Trained = Callable[[str], nn.Module]
CLASSES = ("background", "gland", "nucleus")


@pytest.mark.parametrize("decoder", get_args(Decoder))
def test_any_size_goes_in_and_bytes_are_normalised(decoder: str) -> None:
    network = SegmentationNetwork("test_resnet", CLASSES, decoder).eval()  # type: ignore[arg-type]
    if decoder.startswith("linear"):
        nn.init.normal_(network.model.decoder.convolution.weight)
    images = torch.randint(256, (2, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = network(images)
        assert logits.shape == (2, 3, 50, 70) and logits.std() > 0
        assert torch.equal(logits, network(network.normalise(images)))
    assert network.encoder(network.normalise(images)[..., :32, :32])[0].shape[1] == 32  # timm's stem


@pytest.mark.parametrize("kind", ["encoder", "classifier", "state_dict"])
def test_whatever_was_trained_goes_in(kind: str, tmp_path: Path, trained_encoder: Trained) -> None:
    encoder, path = trained_encoder("test_resnet"), tmp_path / "weights.safetensors"
    if kind == "encoder":
        save_encoder(path, encoder, "test_resnet", "a test")
    elif kind == "classifier":
        classifier = TileClassifier("test_resnet")
        classifier.encoder.load_state_dict(encoder.state_dict())
        save_classifier(path, classifier, ModelCard("test_resnet", classifier.classes, 64, 1.0, "a test"))
    else:
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in encoder.state_dict().items()}}, path)
    network = SegmentationNetwork("test_resnet", CLASSES, "fpn", encoder_weights=str(path)).eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network.encoder(images)[-1], encoder(images), rtol=0, atol=1e-6)


def test_weights_of_another_encoder_or_input_are_refused(tmp_path: Path, trained_encoder: Trained) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, trained_encoder("test_resnet"), "test_resnet", "a test")
    with pytest.raises(WeightsError, match=r"encoder\.safetensors: weights of the encoder 'test_resnet', not"):
        SegmentationNetwork("resnet18", CLASSES, encoder_weights=str(path))
    with pytest.raises(WeightsError, match=r"encoder\.safetensors: its weights take input_mean"):
        SegmentationNetwork("test_resnet", CLASSES, encoder_weights=str(path), input_mean=[0.5] * 3)
    for name, words in (("vit_tiny_patch16_224", "vit_tiny"), ("resnet17", r"did you mean '.*resnet\w+'\?")):
        with pytest.raises(NetworkError, match=words):
            SegmentationNetwork(name, CLASSES)
    with pytest.raises(
        NetworkError, match=r"encoder 'densenet121': does not fit decoder 'linear' \(.*linear8, unet or fpn"
    ):
        SegmentationNetwork("densenet121", CLASSES, "linear")
    with pytest.raises(ConfigError, match=r"decoder='unett': use one of .* did you mean 'unet'"):
        SegmentationNetwork("test_resnet", CLASSES, "unett")  # type: ignore[arg-type]
    for classes in (["one"], ["a", "A"]):
        with pytest.raises(ConfigError, match=r"name two or more|is there twice"):
            SegmentationNetwork("test_resnet", classes)


def test_rates_fall_towards_the_input_and_are_timm_s() -> None:
    network = SegmentationNetwork("test_resnet", CLASSES, "fpn")
    classifier = TileClassifier("test_resnet")
    kwargs = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    ours, theirs = (parameter_groups(each, **kwargs) for each in (network, classifier))  # type: ignore[arg-type]
    of_rate = [{group["lr"]: group["params"] for group in groups} for groups in (ours, theirs)]
    assert of_rate[0].keys() == of_rate[1].keys()
    for rate in of_rate[0].keys() - {1.0}:
        assert [p.shape for p in of_rate[0][rate]] == [p.shape for p in of_rate[1][rate]], rate
    decoder = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in network.encoder.parameters())
    assert sum(p.numel() for p in of_rate[0][1.0]) == decoder


def test_linear_protocol_leaves_the_encoder_as_it_is() -> None:
    network = SegmentationNetwork("test_resnet", CLASSES, "linear")
    groups = parameter_groups(network, 0.1, 0.0, frozen=["encoder"])
    assert sum(p.numel() for group in groups for p in group["params"]) == 96 * 3 + 3
    training(network)
    assert network.model.decoder.training and not any(module.training for module in network.encoder.modules())
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    network(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in network.encoder.parameters())


@pytest.mark.parametrize(("decoder", "stride"), [("linear8", 8), ("linear16", 16)])
@pytest.mark.parametrize("encoder", ["test_resnet", "tf_efficientnet_lite0", "test_convnext"])
def test_a_linear_decoder_may_read_the_encoders_own_map(
    decoder: Decoder, stride: int, encoder: str, trained_encoder: Trained, tmp_path: Path
) -> None:
    whole = trained_encoder(encoder)
    save_encoder(tmp_path / "encoder.safetensors", whole, encoder, "a test")
    network = SegmentationNetwork(encoder, CLASSES, decoder, encoder_weights=str(tmp_path / "encoder.safetensors"))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network.eval().model.encoder(images)[-1]
        wanted = whole.forward_intermediates(images, norm=False, intermediates_only=True)
    assert found.shape[2:] == (64 // stride, 96 // stride)
    (same,) = (one for one in wanted if one.shape[2:] == found.shape[2:])
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)
    assert network(images).shape == (2, 3, 64, 96)


def test_the_linear_decoder_sees_channels_of_unit_variance(trained_encoder: Trained) -> None:
    network = SegmentationNetwork("test_resnet", CLASSES, "linear")
    transfer_weights(trained_encoder("test_resnet"), network.encoder)
    images = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network.train()
    standardise_channels(network, images.split(4))
    assert network.training and network.model.decoder.training
    with torch.inference_mode():
        maps = network.eval().model.encoder(network.normalise(images))[-1]
    assert maps.shape[2:] == (8, 8)  # stride 8
    seen = (maps - network.model.decoder.mean) * network.model.decoder.scale
    assert seen.mean(dim=(0, 2, 3)).abs().max() < 0.01
    deviation = seen.std(dim=(0, 2, 3), correction=0)
    assert (deviation[deviation > 0] - 1).abs().max() < 0.01 and (deviation > 0).sum() > 10
    standardise_channels(SegmentationNetwork("test_resnet", CLASSES, "fpn"), images.split(4))  # needs none


def test_weights_come_back_and_say_what_they_are(tmp_path: Path) -> None:
    network = SegmentationNetwork("test_resnet", CLASSES, "fpn").eval()
    card = SegmentationCard("test_resnet", "fpn", CLASSES, 64, "a test", mpp=0.5)
    path = tmp_path / "segmentation.safetensors"
    digest = save_segmentation(path, network, card)
    again, found, sha256 = load_segmentation(path)
    assert (found, sha256) == (card, digest)
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))
    with pytest.raises(WeightsError, match="describe this one"):
        save_segmentation(path, network, SegmentationCard("test_resnet", "unet", CLASSES, 64, "a test"))
    save_encoder(path, network.encoder, "test_resnet", "a test")
    with pytest.raises(WeightsError, match=r"segmentation\.safetensors: no weights of a segmentation network"):
        load_segmentation(path)
