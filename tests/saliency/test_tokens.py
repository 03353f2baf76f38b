"""Maps at a vision transformer's tokens: captum's, complete where every token is a patch's, and told where not."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import captum.attr
import pytest
import timm
import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.classifier import TileClassifier
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import GradCAM, Gradient, GradientXActivation
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.metrics.randomisation import randomised_cascade
from medsd.saliency.registry import make_method

PATCHES = {"class_token": False, "global_pool": "avg"}


def transformer(**options: Any) -> nn.Module:
    """Small, on images of 32 x 48 px in patches of 16, with weights large enough that attention is not even."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3, img_size=(32, 48), depth=3, **options)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.15)
    return network.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def as_map(tokens: Tensor, prefix: int) -> Tensor:
    """Tokens (B, N, C) of a 2 x 3 grid as (B, C, 2, 3), place by place."""
    return torch.stack([torch.stack([tokens[:, prefix + 3 * r + c] for c in range(3)], -1) for r in range(2)], -2)


@pytest.mark.parametrize(("options", "prefix"), [({}, 1), ({"reg_tokens": 2}, 3), (PATCHES, 0)])
def test_gradient_x_activation_is_captums(images: Tensor, options: dict[str, Any], prefix: int) -> None:
    network, target = transformer(**options), torch.tensor([2, 0])
    expected = captum.attr.LayerGradientXActivation(network, network.blocks[0]).attribute(images, target=target)
    value = GradientXActivation(network, "blocks.0").attribute(images, target)
    torch.testing.assert_close(value, as_map(expected, prefix))
    through = make_method("captum.LayerGradientXActivation", network, "blocks.0")
    torch.testing.assert_close(through(images, target), value.mean(dim=1).float())


def test_integrated_gradients_are_captums(images: Tensor) -> None:
    network = transformer(**PATCHES)
    reference = captum.attr.LayerIntegratedGradients(network, network.blocks[0])
    expected = reference.attribute(images, torch.zeros_like(images), target=1, n_steps=7)
    value = IntegratedGradients(network, "blocks.0", steps=7, batch_size=5).attribute(images, 1)
    torch.testing.assert_close(value, as_map(expected, 0), rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", ["blocks.0", "blocks.2", "norm"])
def test_deeplift_adds_up_through_attention_where_every_token_is_a_patchs(images: Tensor, layer: str) -> None:
    network = transformer(**PATCHES, final_norm=True, fc_norm=False)
    with torch.no_grad():
        change = (network(images) - network(torch.zeros_like(images)))[:, 1]
    value = DeepLift(network, layer).attribute(images, 1)
    torch.testing.assert_close(value.sum(dim=(1, 2, 3)), change, rtol=1e-9, atol=1e-9)


def test_what_the_class_token_holds_is_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """Where the mean over patches is read the class token is a path around the map in all blocks but the last."""
    network = transformer(global_pool="avg", fc_norm=False)
    with torch.no_grad():
        change = (network(images) - network(torch.zeros_like(images)))[:, 1]
    with caplog.at_level(logging.WARNING):
        last = DeepLift(network, "blocks.2").attribute(images, 1).sum(dim=(1, 2, 3))
    torch.testing.assert_close(last, change, rtol=1e-9, atol=1e-9)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        early = DeepLift(network, "blocks.0").attribute(images, 1).sum(dim=(1, 2, 3))
    assert (early - change).abs().min() > 1e-3 * change.abs().max()
    assert "a class token does" in caplog.text


def test_an_output_that_reads_the_class_token_alone(images: Tensor) -> None:
    network = transformer()
    for method in (Gradient, GradientXActivation, IntegratedGradients, DeepLift):
        with pytest.raises(NetworkError, match=r"only from the class token.*global_pool='avg'") as caught:
            method(network, "blocks.2")(images, 1)
        assert "\n" not in str(caught.value)
        assert method(network, "blocks.1").attribute(images, 1).shape[2:] == (2, 3)


def test_a_linear_head_on_the_mean_of_patches_adds_up_by_construction() -> None:
    """At the final norm each place holds its token's part of the log-odds, (w1 - w0) . (token - reference) / cells."""
    torch.manual_seed(0)
    classifier = TileClassifier("test_vit", encoder_options={"img_size": 64, "depth": 2}).double().eval()
    images, reference = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    with torch.no_grad():
        tokens = classifier.encoder(images)[:, 1:]
        weight = classifier.head.weight[1] - classifier.head.weight[0]
        expected = ((tokens - reference) @ weight / 16).reshape(2, 4, 4)
        at_reference = weight @ reference + classifier.head.bias[1] - classifier.head.bias[0]
        logits = classifier(images)
    found = DeepLift(classifier, "encoder.norm", "evidence", reference=reference).attribute(images, 1).sum(dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=(1, 2)) + at_reference, logits[:, 1] - logits[:, 0])


def test_methods_without_labels_take_tokens(images: Tensor) -> None:
    assert make_method("tsm", transformer(), "blocks.1")(images).shape == (2, 2, 3)


def test_a_transformers_own_weights_are_drawn_anew() -> None:
    """Class token and places, which belong to no layer that could draw them."""
    torch.manual_seed(0)
    network, images = timm.create_model("test_vit", num_classes=2, img_size=32, depth=2), torch.randn(1, 3, 32, 32)
    found = randomised_cascade(network.eval(), partial(GradCAM, layer="blocks.0"), images, target=1)
    assert [stage.name for stage in found][-1] == "all"
    assert not torch.allclose(found[0].maps, found[-1].maps, rtol=0.1, atol=0)
