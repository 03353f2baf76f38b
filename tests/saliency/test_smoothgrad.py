"""SmoothGrad: analytic answers, a loop by hand, captum's noise tunnel."""

from __future__ import annotations

from collections.abc import Callable

import captum.attr
import pytest
import timm
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.saliency.gradient import Gradient, SmoothGrad

Lively = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 2))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x**2).sum(dim=(2, 3))


@pytest.mark.parametrize("layer", [None, "0"])
def test_noise_does_not_matter_to_a_linear_network(images: Tensor, layer: str | None) -> None:
    value = SmoothGrad(linear(), layer, deviation=3.0)(images, 1)
    torch.testing.assert_close(value, Gradient(linear(), layer)(images, 1))


def test_a_quadratic_shows_the_mean_of_the_noise(images: Tensor) -> None:
    """d/dx of the sum of (x + noise)^2 is 2 (x + noise): the same shift for each image, and about 0."""
    value = SmoothGrad(Square(), deviation=0.5, samples=400).attribute(images, 1)
    shift = value[:, 1] / 2 - images[:, 1]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-5)
    assert float(shift.std()) == pytest.approx(0.5 / 20, rel=0.1)


def test_no_deviation_is_the_gradient_and_the_seed_matters(images: Tensor) -> None:
    torch.testing.assert_close(SmoothGrad(Square(), deviation=0.0)(images, 0), Gradient(Square())(images, 0))
    maps = [SmoothGrad(Square(), samples=2, seed=seed)(images, 0) for seed in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


@pytest.fixture(scope="module")
def resnet(lively: Lively) -> nn.Module:
    return lively(timm.create_model("resnet10t", num_classes=3))


def test_equals_a_loop_by_hand(resnet: nn.Module, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(3, 32, 32, generator=generator) for _ in range(4)]
    target = resnet(images).argmax(dim=1)  # without noise
    state = torch.get_rng_state()
    for layer in (None, "layer2"):
        expected = sum(Gradient(resnet, layer)(images + 0.7 * part, target) for part in noise) / 4
        value = SmoothGrad(resnet, layer, deviation=0.7, samples=4, seed=5)(images)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(torch.get_rng_state(), state)


class Sides(nn.Module):
    """Logits s and -s, s the sum of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(dim=(1, 2, 3))
        return torch.stack([total, -total], dim=1)


def test_the_class_is_the_one_predicted_without_noise() -> None:
    x = torch.full((1, 1, 4, 4), 1e-6)  # noise puts about half of the copies on the other side
    assert (SmoothGrad(Sides())(x) == 1).all()
    assert (SmoothGrad(Sides())(-x) == -1).all()


def test_agrees_with_captums_noise_tunnel(images: Tensor) -> None:
    """Two means over 300 draws each, as far apart as chance puts them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    image = images[:1, :, :12, :12]
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(network))
    expected = tunnel.attribute(image, nt_type="smoothgrad", nt_samples=300, stdevs=0.4, target=1, abs=False)
    value = SmoothGrad(network, deviation=0.4, samples=300).attribute(image, 1)
    each = torch.cat(
        [SmoothGrad(network, deviation=0.4, samples=1, seed=seed).attribute(image, 1) for seed in range(60)]
    )
    error = each.std(dim=0) * (2 / 300) ** 0.5
    standardised = ((value - expected)[0] / error).abs()
    assert standardised.max() < 6
    assert float((value - Gradient(network).attribute(image, 1))[0].div(error).abs().max()) > 12


@pytest.mark.parametrize(
    ("deviation", "samples", "key"), [(-0.1, 5, "deviation"), (float("nan"), 5, "deviation"), (0.1, 0, "samples")]
)
def test_bad_options_are_named(deviation: float, samples: int, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        SmoothGrad(Square(), deviation=deviation, samples=samples)
