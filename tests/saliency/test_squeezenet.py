"""Class methods on a network that was trained on real photographs: SqueezeNet 1.0 with its ImageNet weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    LayerDeepLift,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Saliency,
)
from torch import Tensor, nn

from medsd.errors import WeightsError
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import GradCAM, Gradient, GradientXActivation
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.method import ClassMethod
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.scoring import Perturbation

SCRIPTS = Path(__file__).parents[2] / "scripts"
CATS, ESPRESSO, TRIPOD, MOPEDS = range(281, 286), 967, 872, (665, 670)
# fire4, fire6, fire9.
LAYERS = ["features.5", "features.8", "features.12"]


@pytest.fixture(scope="module")
def natural() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return importlib.import_module("studies.natural")


@pytest.fixture(scope="module")
def weights(shared_data: Path) -> Path:
    return shared_data / "weights_squeezenet" / "squeezenet1_0_imagenet.npz"


@pytest.fixture(scope="module")
def network(natural: ModuleType, weights: Path) -> nn.Module:
    network: nn.Module = natural.squeezenet(weights)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's DeepLift fails on others
    return network


@pytest.fixture(scope="module")
def photographs(natural: ModuleType) -> dict[str, Tensor]:
    """The five crops of each photograph, (5, 3, 227, 227) uint8, the centre first."""
    found = natural.images()
    assert found.images.shape == (len(found.sources), 3, 227, 227) and found.images.dtype == torch.uint8
    return {name: found.images[[of == name for of in found.sources]] for name in dict.fromkeys(found.sources)}


@pytest.fixture(scope="module")
def x(natural: ModuleType, photographs: dict[str, Tensor]) -> Tensor:
    """Espresso and a tripod: images that the network is sure of."""
    chosen = torch.cat([photographs[name][:1] for name in ("coffee", "camera")])
    images: Tensor = natural.normalise(chosen)
    return images


def close(given: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    expected = expected.detach()
    assert expected.abs().max() > 0
    torch.testing.assert_close(given, expected, rtol=0, atol=share * float(expected.abs().max()))


def test_the_network_is_its_authors(
    natural: ModuleType, weights: Path, network: nn.Module, photographs: dict[str, Tensor]
) -> None:
    images = torch.cat([photographs["coffee"][:1], photographs["motorcycle"][:1]])
    with np.load(weights, allow_pickle=False) as content:
        stored = {key: torch.from_numpy(content[key]) for key in content.files}

    def convolved(h: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(h, stored[f"{name}.weight"], stored[f"{name}.bias"], stride, padding).relu()

    # Their layer list, fed as they fed it: B, G, R in 0..255 less the mean.
    h = convolved(images.flip(1).float() - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1), "conv1", stride=2)
    for fire in range(2, 10):
        if fire in (2, 5, 9):
            h = F.max_pool2d(h, 3, 2, ceil_mode=True)
        squeezed = convolved(h, f"fire{fire}/squeeze1x1")
        wide = convolved(squeezed, f"fire{fire}/expand3x3", padding=1)
        h = torch.cat([convolved(squeezed, f"fire{fire}/expand1x1"), wide], dim=1)
    expected = convolved(h, "conv10", padding=1).mean(dim=(2, 3))
    with torch.no_grad():
        close(network(natural.normalise(images)), expected)


def test_it_recognises_what_is_on_the_photographs(
    natural: ModuleType, network: nn.Module, photographs: dict[str, Tensor]
) -> None:
    assert len(photographs) == 10
    known = {"chelsea": CATS, "coffee": [ESPRESSO], "camera": [TRIPOD], "motorcycle": MOPEDS}
    for name, classes in known.items():
        with torch.no_grad():
            named = network(natural.normalise(photographs[name])).argmax(dim=1)
        assert set(named.tolist()) <= set(classes), name


def test_a_file_that_holds_other_weights_is_told(natural: ModuleType, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("other.npz", "none.npz"):
        with pytest.raises(WeightsError, match=name):
            natural.squeezenet(tmp_path / name)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_equal_captums(network: nn.Module, x: Tensor, layer: str) -> None:
    module = network.get_submodule(layer)
    with torch.no_grad():
        target = network(x).argmax(dim=1)
    for multiply, method in ((False, Gradient), (True, GradientXActivation)):
        expected = LayerGradientXActivation(network, module, multiply_by_inputs=multiply).attribute(x, target)
        close(method(network, layer).attribute(x), expected)
    close(GradCAM(network, layer)(x), LayerGradCam(network, module).attribute(x, target)[:, 0])


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning")
def test_the_input_gradient_equals_captums(network: nn.Module, x: Tensor) -> None:
    close(Gradient(network).attribute(x, ESPRESSO), Saliency(network).attribute(x, ESPRESSO, abs=False))


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_deeplift_equals_captums_above_the_pools(network: nn.Module, x: Tensor) -> None:
    expected = LayerDeepLift(network, network.get_submodule("features.11")).attribute(x, 0 * x, target=TRIPOD)
    close(DeepLift(network, "features.11").attribute(x, TRIPOD), expected, share=1e-4)


def test_integrated_gradients_equal_captums(network: nn.Module, x: Tensor) -> None:
    captum = LayerIntegratedGradients(network, network.get_submodule("features.10"))
    expected = captum.attribute(x, 0 * x, target=ESPRESSO, n_steps=4)
    close(IntegratedGradients(network, "features.10", steps=4).attribute(x, ESPRESSO), expected)


@pytest.mark.parametrize("layer", [None, *LAYERS])
def test_deeplift_is_complete(network: nn.Module, x: Tensor, layer: str | None) -> None:
    with torch.no_grad():
        change = (network(x) - network(0 * x))[:, CATS[-1]]
    total = DeepLift(network, layer).attribute(x, CATS[-1]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, change, rtol=1e-3, atol=1e-3)


def test_integrated_gradients_are_complete(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        change = (network(x) - network(0 * x))[[0, 1], [ESPRESSO, TRIPOD]]
    method = IntegratedGradients(network, "features.11", steps=20)
    total = method.attribute(x, torch.tensor([ESPRESSO, TRIPOD])).sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, change, rtol=0.01, atol=0)


@pytest.mark.parametrize("method", [GradientXActivation, GradCAM, DeepLift, partial(IntegratedGradients, steps=4)])
def test_each_class_is_found_where_it_is(
    natural: ModuleType,
    network: nn.Module,
    photographs: dict[str, Tensor],
    method: Callable[[nn.Module, str], ClassMethod],
) -> None:
    both = natural.normalise(photographs["chelsea"][:1]).clone()
    both[..., 114:] = natural.normalise(photographs["coffee"][:1])[..., 57:170]
    explain = method(network, "features.12")
    for target, half in ((CATS[-1], slice(0, 7)), (ESPRESSO, slice(6, 13))):
        (seen,) = explain(both, target).clamp(min=0)
        assert seen.shape == (13, 13)
        assert seen[:, half].sum() > 0.8 * seen.sum()


def test_what_is_removed_first_matters_most(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        target = network(x).argmax(dim=1)
    maps = GradientXActivation(network, "features.12")(x, target)
    maps = F.interpolate(maps[:, None], size=x.shape[2:], mode="bilinear")[:, 0]
    noise = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    step = 227 * 227 // 6
    deletion, insertion, by_chance = (
        curve_area(curve(network, x, target, saliency, Perturbation(step_px=step))).mean()
        for curve, saliency in ((deletion_curve, maps), (insertion_curve, maps), (insertion_curve, noise))
    )
    assert deletion < insertion - 0.2
    assert by_chance < insertion
