"""The tapped layer gives captum's gradients, without a graph below and without traces."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.classifier import TileClassifier
from medsd.networks.modes import layer_named
from medsd.saliency.hidden import tapped
from medsd.saliency.registry import make_method


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    network = TileClassifier("resnet18").eval()
    for parameter in network.encoder.parameters():
        if parameter.ndim == 1:  # timm starts residual branches at 0; every branch shall count
            nn.init.uniform_(parameter, 0.2, 0.8)
    return network


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer2.0", "layer3", "layer4", "layer2.0.bn1", "conv1"])
@pytest.mark.parametrize("multiply", [False, True])
def test_gradient_equals_captums(classifier: TileClassifier, layer: str, multiply: bool) -> None:
    assert any(isinstance(module, nn.ReLU) and module.inplace for module in classifier.modules())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    module = layer_named(classifier.encoder, layer)
    reference = LayerGradientXActivation(classifier, module, multiply_by_inputs=multiply)
    expected = reference.attribute(x, target=1).detach()
    with tapped(classifier, module) as hidden:
        logits = classifier(x)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), hidden.activation)
    value = gradient * hidden.activation.detach() if multiply else gradient
    # captum sees the activation after an in-place ReLU where there is one: only the product then differs.
    if not (multiply and layer == "layer2.0.bn1"):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(classifier(x), logits.detach())


def test_there_is_no_graph_below_and_no_parameter_gradient(classifier: TileClassifier) -> None:
    seen: dict[str, Tensor] = {}
    handles = [
        layer_named(classifier.encoder, name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output})
        )
        for name in ("conv1", "layer1", "layer2", "layer3")
    ]
    layer = layer_named(classifier.encoder, "layer2")
    x = torch.randn(1, 3, 64, 64)
    with tapped(classifier, layer) as hidden:
        logits = classifier(x)
        assert not any(parameter.requires_grad for parameter in classifier.parameters())
        (gradient,) = torch.autograd.grad(logits.sum(), hidden.activation)
    for handle in handles:
        handle.remove()
    assert hidden.activation.is_leaf
    assert hidden.activation.grad_fn is None
    assert gradient.shape == hidden.activation.shape
    assert seen["conv1"].grad_fn is None
    assert seen["layer1"].grad_fn is None
    assert not seen["layer1"].requires_grad
    assert seen["layer3"].requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_an_input_that_requires_grad_gets_none(classifier: TileClassifier) -> None:
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    with tapped(classifier, layer_named(classifier.encoder, "layer2")) as hidden:
        classifier(x).sum().backward()
    assert x.grad is None
    assert hidden.activation.grad is not None


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_and_flags_are_put_back(fails: bool) -> None:
    network = TileClassifier("test_resnet")
    frozen = network.encoder.layer1[0].conv1.weight
    frozen.requires_grad_(False)
    try:
        with tapped(network, network.encoder.layer1):
            network(torch.zeros(2, 3, 32, 32))
            if fails:
                network(torch.zeros(2, 7, 32, 32))
    except RuntimeError:
        assert fails
    assert all(parameter.requires_grad != (parameter is frozen) for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert network(torch.zeros(2, 3, 32, 32)).requires_grad


def test_the_last_pass_counts(classifier: TileClassifier) -> None:
    with tapped(classifier, layer_named(classifier.encoder, "layer3")) as hidden:
        classifier(torch.zeros(1, 3, 64, 64))
        logits = classifier(torch.ones(2, 3, 64, 64))
        assert torch.autograd.grad(logits.sum(), hidden.activation)[0].shape[0] == 2


def test_a_layer_that_did_not_run_is_told(classifier: TileClassifier) -> None:
    with tapped(classifier, nn.Identity()) as hidden:
        classifier(torch.zeros(1, 3, 64, 64))
        with pytest.raises(NetworkError, match="not reached"):
            _ = hidden.activation


@pytest.mark.parametrize("method", ["gradient", "captum.LayerGradCam"])
def test_channels_last_are_refused_and_never_read_as_a_map(method: str) -> None:
    network = TileClassifier("test_convnext")
    with pytest.raises(NetworkError, match=r"blocks\.0\.norm': its channels come last") as caught:
        make_method(method, network, "encoder.stages.1.blocks.0.norm").explain(torch.randn(1, 3, 64, 64))
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in network.modules())
