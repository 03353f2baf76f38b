"""Networks that do what few networks do: each is explained right, or refused in one line, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medsd.errors import NetworkError
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import GradCAM, Gradient, GradientXActivation, SmoothGrad
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.label_free import LabelFree, channel_energy, eigencam, mean_map, mtsm, multivec_eigencam
from medsd.saliency.method import ClassMethod, Method
from medsd.saliency.registry import make_method

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EIGENCAM = partial(LabelFree, map_of=eigencam)
CLASS_METHODS = (Gradient, DeepLift, IntegratedGradients, SmoothGrad)


class Network(nn.Module):
    """Two convolutions and a head; `inside` is what happens between them and it."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.inside = inside
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = self.inside(torch.tanh(self.second(self.first(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class Twice(nn.Module):
    """One activation module for two calls, whose outputs meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.Tanh(), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        logits: Tensor = self.above(y, self.act(self.b(y)))
        return logits

    def above(self, y: Tensor, z: Tensor) -> Tensor:
        logits: Tensor = self.head((z * z + y * z).mean(dim=(2, 3)))
        return logits


def test_integrated_gradients_replace_a_layer_where_it_runs_last() -> None:
    network, steps = Twice(), 20
    with torch.no_grad():
        y, y0 = (torch.tanh(network.a(images)) for images in (X, torch.zeros_like(X)))
        z, z0 = torch.tanh(network.b(y)), torch.tanh(network.b(y0))
    total = torch.zeros_like(z)
    for place, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        on_path = (z0 + (place + 1) / 2 * (z - z0)).requires_grad_()
        total += weight / 2 * torch.autograd.grad(network.above(y, on_path)[:, 1].sum(), on_path)[0]
    found = IntegratedGradients(network, "act", steps=steps, batch_size=3).attribute(X, 1)
    torch.testing.assert_close(found, total * (z - z0), rtol=1e-12, atol=1e-14)


class WritesToItsInput(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


class Copies(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25)


def captums(name: str) -> Callable[[nn.Module, str | None], Method]:
    return lambda network, layer: make_method(f"captum.{name}", network, layer)


@pytest.mark.parametrize(
    ("method", "layer"),
    [(method, layer) for method in CLASS_METHODS for layer in (None, "second")]
    + [(EIGENCAM, "second"), (partial(LabelFree, map_of=mean_map), "first")]
    + [(captums(name), None) for name in ("Saliency", "IntegratedGradients", "Occlusion", "FeatureAblation")]
    + [(captums(name), "second") for name in ("LayerGradientXActivation", "LayerConductance", "LayerFeatureAblation")],
)
def test_a_network_may_write_to_its_input(method: Callable[[nn.Module, str | None], Method], layer: str | None) -> None:
    given = X.clone()
    found = method(WritesToItsInput(nn.Identity()), layer)(given, 1)
    torch.testing.assert_close(given, X, rtol=0, atol=0)
    torch.testing.assert_close(found, method(Copies(nn.Identity()), layer)(X, 1), rtol=1e-5, atol=1e-8)


def without_gradient(v: Tensor) -> Tensor:
    with torch.no_grad():
        gate = (torch.sigmoid(v) > 0.5).to(v)
    return v * gate


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "a number without axes": lambda v: v / (v.pow(2).mean() + 1e-5),
    "its root": lambda v: v / torch.sqrt(v.pow(2).mean()),
    "a gate without gradient": without_gradient,
    "infinite where masked": lambda v: torch.sigmoid(v.masked_fill(v > 0.5, -torch.inf)),
}


@pytest.mark.parametrize("name", ODD)
def test_deeplift_lets_pass_what_is_no_activation(name: str) -> None:
    assert DeepLift(Network(ODD[name]), "second")(X, 1).abs().max() > 0


def test_deeplift_in_half_precision_where_images_equal_the_baseline() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = X.clone()
    x[:, :, :4] = 0
    expected = DeepLift(network.double(), "0")(x, 1)
    found = DeepLift(network.half(), "0")(x.half(), 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v.clip(-0.2, 0.2),
        lambda v: v.clamp_min(0),
        lambda v: F.threshold(v, 0.1, 0.0),
        nn.Threshold(0.1, 0.0),
        lambda v: v.pow(2),
        lambda v: v**3,
        lambda v: F.softshrink(v, 0.1),
        lambda v: F.hardshrink(v, 0.1),
        F.tanhshrink,
        torch.erf,
        lambda v: torch.log1p(v.abs()),
        lambda v: torch.sqrt(v + 2),
    ],
)
def test_deeplift_is_complete_for_functions_of_one_element(function: Callable[[Tensor], Tensor]) -> None:
    network = Network(function)
    with torch.no_grad():
        change = (network(X) - network(torch.zeros_like(X)))[:, 1]
    torch.testing.assert_close(DeepLift(network).attribute(X, 1).flatten(1).sum(dim=1), change, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(
    "norm",
    [
        lambda v, eps: torch.layer_norm(v, (6, 6), torch.ones(6, 6).double(), None, eps),
        lambda v, eps: torch.layer_norm(v, (6, 6), None, None, eps, False),
        lambda v, eps: torch.rms_norm(v, (6, 6), torch.full((6, 6), 2.0).double(), eps),
        lambda v, eps: F.rms_norm(v, (4, 6, 6), eps=eps),
        lambda v, eps: F.layer_norm(v, (6,), eps=eps),
    ],
)
def test_deeplift_is_complete_for_norms_however_they_are_called(
    norm: Callable[[Tensor, float], Tensor], eps: float
) -> None:
    network = Network(lambda v: torch.tanh(norm(v, eps)))
    with torch.no_grad():
        change = (network(X) - network(torch.zeros_like(X)))[:, 1]
    torch.testing.assert_close(DeepLift(network).attribute(X, 1).flatten(1).sum(dim=1), change, rtol=1e-8, atol=1e-12)


def test_a_view_is_not_overwritten() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2]

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.view, self.head = nn.Conv2d(3, 4, 3), First(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            kept = self.view(y)
            logits = self.head((kept * kept).mean(dim=(2, 3)))
            y.zero_()
            return logits  # type: ignore[no-any-return]

    network = Views().double()
    assert GradientXActivation(network, "view")(X, 1).abs().max() > 0
    torch.testing.assert_close(
        LabelFree(network, "view", mean_map)(X), network.conv(X)[:, :2].mean(dim=1).float().detach()
    )


@pytest.mark.parametrize("layer", [None, "0"])
def test_a_scripted_network_is_refused_and_left_alone(layer: str | None) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double())
    with pytest.raises(NetworkError, match="scripted modules take no hooks"):
        Gradient(scripted, layer)(X, 1)
    assert all(parameter.requires_grad for parameter in scripted.parameters())


def test_label_free_maps_of_a_network_made_in_inference_mode() -> None:
    with torch.inference_mode():
        network = Network(nn.Identity())
    torch.testing.assert_close(EIGENCAM(network, "second")(X), EIGENCAM(Network(nn.Identity()), "second")(X))
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("method", [*CLASS_METHODS, GradCAM, EIGENCAM])
def test_a_compiled_network_is_explained_as_itself(method: type[ClassMethod]) -> None:
    network = Network(torch.relu).eval().requires_grad_(False)
    compiled = torch.compile(network, backend="eager")
    compiled(X)
    expected, found = method(network, "second")(X, 1), method(compiled, "_orig_mod.second")(X, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(NetworkError, match=r"did you mean '_orig_mod\.second'"):
        method(compiled, "second")


@pytest.mark.parametrize("method", [Gradient, EIGENCAM])
def test_an_exported_program_is_refused_in_a_line(method: type[ClassMethod]) -> None:
    """It has no eval mode; a network around it is left as it was."""
    network = nn.Sequential(torch.export.export(Network(nn.Identity()), (X,)).module(), nn.Identity())
    with pytest.raises(NetworkError, match=r"^Sequential: takes no eval mode, .* torch\.export; give the") as caught:
        method(network, "0.second")(X, 1)
    assert "\n" not in str(caught.value)
    assert all(module.training for module in network.modules())


def test_deeplift_names_checkpointing_and_gradients_follow_it() -> None:
    class Recomputed(Network):
        def forward(self, x: Tensor) -> Tensor:
            features = checkpoint(nn.Sequential(self.second, nn.ReLU()), self.first(x), use_reentrant=False)
            logits: Tensor = self.head(features.mean(dim=(2, 3)))
            return logits

    network = Recomputed(nn.Identity())
    with pytest.raises(NetworkError, match="gradient checkpointing off") as caught:
        DeepLift(network)(X, 1)
    assert "\n" not in str(caught.value)
    assert Gradient(network)(X, 1).abs().max() > 0


@pytest.mark.parametrize("method", CLASS_METHODS)
def test_rows_that_are_places_and_not_images_are_refused(method: type[ClassMethod]) -> None:
    class Places(Network):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.first(x).permute(0, 2, 3, 1).reshape(-1, 4))
            return logits

    with pytest.raises(NetworkError, match=r"for \d images; give one row an image"):
        method(Places(nn.Identity()), "first")(X)


@pytest.mark.parametrize("function", [mtsm, multivec_eigencam, channel_energy])
def test_a_map_beyond_float32_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    network = nn.Sequential(nn.Identity())
    with pytest.raises(NetworkError, match="layer '0': the map is not finite"):
        LabelFree(network, "0", function)(X.abs() * 1e25)


@pytest.mark.parametrize("method", [DeepLift, IntegratedGradients])
def test_a_baseline_made_in_inference_mode(method: type[DeepLift]) -> None:
    network = Network(nn.Identity())
    with torch.inference_mode():
        baseline = torch.zeros(3, 8, 8)
    torch.testing.assert_close(method(network, baseline=baseline)(X, 1), method(network)(X, 1))
