"""captum's attributions by name: what captum gives by hand, and a misfit told in one line."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.saliency.captum_method import CaptumMethod
from medsd.saliency.registry import make_method

TARGET = torch.tensor([2, 0])


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).train()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LayerConductance", {}),
        ("LayerIntegratedGradients", {"n_steps": 7, "multiply_by_inputs": False}),
        ("LayerGradCam", {"relu_attributions": True}),
        ("LayerDeepLift", {}),
        ("LayerFeatureAblation", {}),
        ("InternalInfluence", {"n_steps": 5}),
    ],
)
def test_a_layers_attribution_is_captums(network: nn.Sequential, x: Tensor, kind: str, options: dict[str, Any]) -> None:
    made = {key: value for key, value in options.items() if key == "multiply_by_inputs"}
    called = {key: value for key, value in options.items() if key not in made}
    by_hand = getattr(captum.attr, kind)(network, network[2], **made)
    expected = by_hand.attribute(x.clone().requires_grad_(), target=TARGET, **called).detach()
    with torch.inference_mode():
        maps = make_method(f"captum.{kind}", network, "2", options=options)(x, TARGET)
    torch.testing.assert_close(maps, expected.mean(dim=1), rtol=1e-6, atol=1e-7)
    assert maps.shape == (2, 12, 8) and maps.abs().max() > 0
    assert network.training and all(parameter.grad is None for parameter in network.parameters())


def test_what_has_no_class_is_given_none(network: nn.Sequential, x: Tensor) -> None:
    expected = network[:3](x).mean(dim=1).detach()
    torch.testing.assert_close(make_method("captum.LayerActivation", network, "2")(x), expected)


def test_an_input_is_explained_whatever_the_layer(network: nn.Sequential, x: Tensor) -> None:
    options = {"sliding_window_shapes": [3, 4, 4], "strides": [3, 2, 2]}
    method = make_method("captum.Occlusion", network, "2", options=options)
    expected = captum.attr.Occlusion(network).attribute(x, (3, 4, 4), (3, 2, 2), target=TARGET)
    assert method.layer is None
    torch.testing.assert_close(method(x, TARGET), expected.mean(dim=1))


@pytest.mark.parametrize(
    "kind", ["Occlusion", "FeatureAblation", "KernelShap", "GradientShap", "DeepLiftShap", "Saliency"]
)
def test_what_captum_must_be_told_has_a_default(network: nn.Sequential, x: Tensor, kind: str) -> None:
    maps = make_method(f"captum.{kind}", network)(x, TARGET)
    assert maps.shape == (2, 16, 12) and maps.abs().max() > 0
    if kind == "FeatureAblation":
        squares = maps.view(2, 8, 2, 12)[..., 0]  # the first column's eight squares, 2 px high
        assert torch.equal(squares[:, :, 0], squares[:, :, 1]) and len(squares[0].unique()) == 8


# All but ShapleyValues, which asks for all orders of the parts, and LRP, for a rule of each module.
INPUTS = ["IntegratedGradients", "DeepLift", "DeepLiftShap", "GradientShap", "InputXGradient", "Saliency", "Occlusion"]
INPUTS += ["GuidedBackprop", "Deconvolution", "FeatureAblation", "ShapleyValueSampling", "Lime", "KernelShap"]
LAYERS = ["LayerConductance", "LayerGradientXActivation", "LayerActivation", "LayerFeatureAblation", "LayerGradCam"]
LAYERS += ["LayerDeepLift", "LayerDeepLiftShap", "LayerGradientShap", "LayerIntegratedGradients", "InternalInfluence"]


@pytest.mark.parametrize("kind", [*INPUTS, "GuidedGradCam", *LAYERS])
def test_a_map_is_the_same_again_and_alone(network: nn.Sequential, x: Tensor, kind: str) -> None:
    """ShapleyValueSampling never ran; what draws at random drew anew each time, for the batch as a whole."""
    options = {"n_samples": 3} if kind in ("ShapleyValueSampling", "Lime", "KernelShap") else {}
    method = make_method(f"captum.{kind}", network, "0", options=options)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    x = x[:, :, :8, :6]
    maps = method(x, TARGET)
    assert maps.shape[0] == 2 and (maps.abs().max() > 0 or kind == "Lime")  # whose Lasso takes small slopes for none
    torch.testing.assert_close(method(x[1:], TARGET[1:]), maps[1:], rtol=1e-4, atol=1e-6 * float(maps.abs().max()))
    torch.rand(3)
    assert torch.equal(method(x, TARGET), maps)
    torch.set_rng_state(before[0])
    method(x, TARGET)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_evidence_is_the_classs_above_the_others(network: nn.Sequential, x: Tensor) -> None:
    maps = make_method("captum.InputXGradient", network, output="evidence")(x, TARGET)
    ours = make_method("gradient_x_activation", network, output="evidence")(x, TARGET)
    torch.testing.assert_close(maps, ours)


def test_misfits_are_told_in_one_line(network: nn.Sequential, x: Tensor) -> None:
    for name, words in (
        ("captum.LayerConductence", "did you mean 'captum.LayerConductance'"),
        ("captum.NeuronGradient", "no such attribution"),
        ("captum.NoiseTunnel", "no such attribution"),
        ("captum.FeaturePermutation", "between images.*use captum.Occlusion"),
        ("captum.LayerFeaturePermutation", "between images"),
        ("captum.LLMAttribution", "no such attribution"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_method(name, network, "2")
    with pytest.raises(ConfigError, match="needs a hidden layer"):
        make_method("captum.LayerGradCam", network)
    with pytest.raises(ConfigError, match=r"no option 'step'.*did you mean 'n_steps'"):
        make_method("captum.LayerConductance", network, "2", options={"step": 3})
    with pytest.raises(NetworkError, match="no such layer"):
        make_method("captum.LayerGradCam", network, "9")
    with pytest.raises(NetworkError, match=r"layer '6': it gives \(2, 3\), no map"):
        make_method("captum.LayerActivation", network, "6")(x)
    with pytest.raises(NetworkError, match=r"method 'captum\.Occlusion': captum cannot explain") as error:
        CaptumMethod(network, name="captum.Occlusion", options={"sliding_window_shapes": (3, 99, 99)})(x)
    assert "\n" not in str(error.value)
