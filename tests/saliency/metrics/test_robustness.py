"""Infidelity and sensitivity against captum called by hand, and on linear networks whose answer is known."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.saliency.gradient import Gradient
from medsd.saliency.method import Target
from medsd.saliency.metrics.robustness import Noise, infidelity, sensitivity

LABELS = torch.tensor([0, 2, 1])


class Linear(nn.Module):
    """Two logits of one channel: 0 and the pixels times a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        evidence = (x[:, 0] * self.weight).sum(dim=(1, 2))
        return torch.stack([torch.zeros_like(evidence), evidence], dim=1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 5, 3)
    ).train()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 13, 11, generator=torch.Generator().manual_seed(2))


def draws(kind: str, samples: int, seed: int, shape: torch.Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return [torch.empty(shape).normal_(generator=generator) for _ in range(samples)]
    return [torch.empty(shape).uniform_(-1, 1, generator=generator) for _ in range(samples)]


def at_pixels(maps: Tensor, images: Tensor) -> Tensor:
    return nn.functional.interpolate(maps[:, None], images.shape[2:], mode="nearest")


@pytest.mark.parametrize("normalise", [True, False])
def test_infidelity_is_captums(network, x, normalise):
    method = Gradient(network, "0")
    found = infidelity(method, x, LABELS, noise=Noise(0.3, 6, 4), normalise=normalise)
    assert network.training
    network.eval()
    noise = torch.stack(draws("normal", 6, 4, x.shape[1:])) * 0.3
    changes = noise.repeat(3, 1, 1, 1)
    expected = captum_infidelity(
        network,
        lambda images: (changes, images - changes),
        x,
        at_pixels(method(x, LABELS), x).expand_as(x),
        target=LABELS,
        n_perturb_samples=6,
        normalize=normalise,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_sensitivity_is_captums(network, x):
    network.eval()
    method = Gradient(network, "0")
    noise = torch.stack(draws("uniform", 5, 3, x.shape[1:])) * 0.1
    expected = sensitivity_max(
        lambda images, target: (at_pixels(method(images[0] if isinstance(images, tuple) else images, target), x),),
        x,
        lambda images: images + noise.repeat(3, 1, 1, 1),
        n_perturb_samples=5,
        target=LABELS,
    )
    np.testing.assert_allclose(sensitivity(method, x, LABELS, Noise(0.1, 5, 3)), expected, rtol=1e-4, atol=1e-7)


def test_sensitivity_by_its_definition(network, x):
    network.eval()
    method, noise = Gradient(network, None), draws("uniform", 4, 0, x.shape[1:])
    clean = method(x, LABELS).flatten(1)
    changes = torch.stack([(method(x + 0.02 * e, LABELS).flatten(1) - clean).norm(dim=1) for e in noise])
    expected = (changes / clean.norm(dim=1)).amax(dim=0)
    assert expected.min() > 0
    np.testing.assert_allclose(sensitivity(method, x, LABELS, Noise(0.02, 4)), expected, rtol=1e-4)


def test_of_a_linear_network():
    """The gradient has no infidelity and does not move; of another map it is (deviation * |map - weight|)^2."""
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(5))
    network, x = Linear(weight), torch.randn(2, 1, 8, 9)
    method = Gradient(network, None)
    for normalise in (True, False):
        assert infidelity(method, x, 1, normalise=normalise).max() < 1e-9
    assert sensitivity(method, x, 1).max() < 1e-6
    wrong = weight.expand(2, -1, -1) + torch.tensor([0.5, 1.0])[:, None, None]
    found = infidelity(method, x, 1, wrong, Noise(0.1, 4000, batch_size=9000), normalise=False)
    np.testing.assert_allclose(found, [0.01 * 0.25 * 72, 0.01 * 72], rtol=0.1)
    # Normalised, a map of another unit is as good, and the other class's constant logit needs none.
    assert infidelity(method, x, 1, 50 * weight.expand(2, -1, -1)).max() < 1e-6
    assert infidelity(method, x, 0, 50 * weight.expand(2, -1, -1)).max() < 1e-6


def test_an_image_stands_alone_whatever_the_batch_and_seeds_are_kept(network, x):
    network.eval()
    method = Gradient(network, "0")
    state = torch.random.get_rng_state()
    for measure in (infidelity, sensitivity):
        seven = partial(Noise, 0.1, samples=7)
        whole = measure(method, x, LABELS, noise=seven())
        alone = torch.cat([measure(method, x[i : i + 1], LABELS[i : i + 1], noise=seven()) for i in range(3)])
        np.testing.assert_allclose(whole, alone, rtol=1e-3)
        np.testing.assert_allclose(whole, measure(method, x, LABELS, noise=seven(batch_size=1)), rtol=1e-3)
        assert torch.equal(whole, measure(method, x, LABELS, noise=seven()))
        assert not torch.equal(whole, measure(method, x, LABELS, noise=seven(seed=1)))
        predicted = measure(method, x, None, noise=seven())
        np.testing.assert_allclose(predicted, measure(method, x, network(x).argmax(1), noise=seven()), rtol=1e-6)
    assert torch.equal(state, torch.random.get_rng_state())


def test_label_free_methods_and_one_class_for_all(network, x):
    class MeanOfChannels:
        def __init__(self, network: nn.Module) -> None:
            self.network, self.layer, self.targets = network, None, []

        def __call__(self, x: Tensor, target: Target = None) -> Tensor:
            self.targets.append(target)
            return x.mean(dim=1)

    method = MeanOfChannels(nn.Conv2d(3, 4, 3))  # maps: no classes
    scores = sensitivity(method, x, noise=Noise(0.5, 3))
    noise = torch.stack([e.mean(dim=0) for e in draws("uniform", 3, 0, x.shape[1:])]) * 0.5
    expected = noise.flatten(1).norm(dim=1).max() / x.mean(dim=1).flatten(1).norm(dim=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert method.targets == [None, None]
    with pytest.raises(NetworkError, match="logits"):
        infidelity(method, x)
    one = Gradient(network, None)
    for measure in (infidelity, sensitivity):
        assert torch.equal(measure(one, x, 2), measure(one, x, torch.tensor([2, 2, 2])))


def test_bad_input_is_named(network, x):
    method = Gradient(network, None)
    with pytest.raises(ConfigError, match="size=0"):
        Noise(0)
    with pytest.raises(ConfigError, match="samples=0"):
        Noise(0.1, samples=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        Noise(0.1, batch_size=0)
    with pytest.raises(ConfigError, match="seed='a'"):
        Noise(0.1, seed="a")
    with pytest.raises(DatasetError, match="images"):
        sensitivity(method, x[0])
    with pytest.raises(DatasetError, match="2 maps of 3 images"):
        infidelity(method, x, LABELS, torch.rand(2, 13, 11))
    for measure in (infidelity, sensitivity):
        with pytest.raises(ConfigError, match="target"):
            measure(method, x, torch.tensor([0, 1]))


def test_infidelity_of_what_is_explained_is_zero() -> None:
    """A gradient of a linear network accounts for every change, of the logit or of the evidence."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 5, 3)).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    one_channel = nn.Sequential(nn.Flatten(), nn.Linear(25, 3)).double()
    for output in ("logit", "evidence"):
        found = infidelity(Gradient(one_channel, None, output), x[:, :1], normalise=False)
        assert found.abs().max() < 1e-10
    crossed = infidelity(Gradient(linear), x, maps=Gradient(linear, None, "evidence")(x))
    assert crossed.min() > 1e-6
