"""ADCC and its parts against a loop after the released code, pytorch-grad-cam, and answers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy.stats import pearsonr
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.saliency.method import Target
from medsd.saliency.metrics.confidence import adcc, coherency, drop_and_increase
from medsd.saliency.metrics.perturb import at_pixels, unit_range

LABELS = torch.tensor([0, 2, 1, 1])


class WeightedMean:
    """Channels of the first convolution weighted by the class: a method with classes, cheap and not trivial."""

    layer = "0"

    def __init__(self, network: nn.Sequential) -> None:
        self.network, self.seen = network, []

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        self.seen.append(target)
        with torch.no_grad():
            features = self.network[0](x)
        weight = torch.linspace(-1, 1, 12).view(3, 4)[0 if target is None else target]
        return (features * weight.expand(len(x), -1)[:, :, None, None]).sum(dim=1)


class Fixed:
    layer = None

    def __init__(self, network: nn.Module, maps: Tensor) -> None:
        self.network, self.maps = network, maps

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        return self.maps


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 5, 3)
    ).train()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 13, 11, generator=torch.Generator().manual_seed(2))


def released(network: nn.Module, method: WeightedMean, image: Tensor, shares: Tensor, label: int) -> list[float]:
    """One image after the text of ADCC's code: drop, increase, coherency, complexity, ADCC."""
    network.eval()
    kept = image * shares
    with torch.no_grad():
        before = network(image[None]).softmax(1)[0, label].item()
        after = network(kept[None]).softmax(1)[0, label].item()
    drop = max(0.0, before - after) / before
    again = method(kept[None], torch.tensor([label]))[0]
    again = (again - again.min()) / (again.max() - again.min() + 1e-7)
    again = nn.functional.interpolate(again[None, None], image.shape[1:], mode="bilinear")[0, 0]
    correlation, _ = pearsonr(shares.double().ravel(), again.double().ravel())
    coherent, shown = (correlation + 1) / 2, shares.abs().sum().item() / shares.numel()
    return [drop, float(after > before), coherent, shown, 3 / (1 / coherent + 1 / (1 - shown) + 1 / (1 - drop))]


def test_equals_the_released_code(network, x):
    method = WeightedMean(network)
    found = adcc(network, method, x, LABELS)
    assert network.training
    shares = at_pixels(unit_range(method(x, LABELS)), x, "bilinear")
    for item, label in enumerate(LABELS.tolist()):
        expected = released(network, method, x[item], shares[item], label)
        values = [found.average_drop, found.increase, found.coherency, found.complexity, found.adcc]
        np.testing.assert_allclose([float(value[item]) for value in values], expected, atol=2e-6)
    again = adcc(network, method, x, LABELS, maps=method(x, LABELS))
    alone = adcc(network, method, x[2:3], LABELS[2:3])
    assert torch.equal(again.adcc, found.adcc) and float(alone.adcc) == pytest.approx(float(found.adcc[2]), abs=1e-6)
    network.eval()
    predicted = adcc(network, method, x)
    assert torch.equal(predicted.adcc, adcc(network, method, x, network(x).argmax(1)).adcc)
    assert all(target is not None for target in method.seen)


def test_drop_and_increase_are_grad_cams(network, x):
    shares = torch.rand(4, 13, 11, generator=torch.Generator().manual_seed(3))
    network.eval()
    targets = [ClassifierOutputSoftmaxTarget(label) for label in LABELS.tolist()]
    arguments = (x, shares.numpy(), targets, network)
    probability = network(x).softmax(1).gather(1, LABELS[:, None])[:, 0].detach()
    drop, rises = drop_and_increase(network, x, shares, LABELS)
    np.testing.assert_allclose(drop * probability, DropInConfidence()(*arguments), atol=1e-6)
    np.testing.assert_array_equal(rises, IncreaseInConfidence()(*arguments))
    assert 0 < rises.sum() < 4  # both happen
    assert not torch.stack(drop_and_increase(network, x, torch.ones_like(shares), LABELS)).any()  # nothing is hidden


def test_unit_range_and_how_many_are_flat():
    maps = torch.stack([torch.tensor([[-3.0, 1.0], [0.0, 5.0]]), torch.full((2, 2), 4.0), torch.zeros(2, 2)])
    maps[1, 0, 0] -= 3e-7  # below 1e-7 of it: rounding
    scaled = unit_range(maps)
    assert scaled.dtype == torch.float32 and scaled[0].tolist() == [[0, 0.5], [0.375, 1]]
    assert not scaled[1:].any() and int((scaled.amax(dim=(1, 2)) == 0).sum()) == 2
    values = torch.randn(1, 5, 5, dtype=torch.float64)
    expected = (values - values.min()) / (values.max() - values.min())
    torch.testing.assert_close(unit_range(values), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e-6, 3e37])
def test_a_maps_unit_does_not_matter(network, x, unit):
    """Gradients are small, and the range of what fits float32 may not fit it."""
    network.eval()
    values = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(5)).clamp(-9, 9)
    given, scaled = (adcc(network, Fixed(network, maps), x, LABELS) for maps in (values, values * unit))
    for name in ("adcc", "average_drop", "coherency", "complexity"):
        torch.testing.assert_close(getattr(scaled, name), getattr(given, name), rtol=0, atol=1e-5)
    assert given.adcc.min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resized_map_stays_in_its_range(dtype):
    """Weights of 1 but for rounding: a binary mask left 0 to 1, and was refused."""
    generator = torch.Generator().manual_seed(0)
    for side in range(3, 23):
        maps = (torch.rand(8, 7, 5, generator=generator) < 0.7).to(dtype)
        resized = at_pixels(maps, torch.empty(8, 1, 10 * side + 1, 7 * side), "bilinear")
        assert resized.amin() >= 0 and resized.amax() <= 1


def test_all_and_nothing(network, x):
    """A map of 1: no drop, complexity 1; a map of 0: drop 1 - p(c|0) / y, complexity 0. Neither explains: ADCC 0."""
    network.eval()
    ones, zeros = torch.ones(4, 13, 11), torch.zeros(4, 13, 11)
    assert drop_and_increase(network, x, ones, LABELS)[0].abs().max() == 0
    before, empty = (network(images).softmax(1).gather(1, LABELS[:, None])[:, 0] for images in (x, torch.zeros_like(x)))
    expected = (1 - empty / before).clamp(min=0).detach()
    np.testing.assert_allclose(drop_and_increase(network, x, zeros, LABELS)[0], expected, atol=1e-6)
    flat = adcc(network, Fixed(network, torch.full((4, 6, 5), 2.0)), x, LABELS)
    assert flat.adcc.tolist() == flat.coherency.tolist() == flat.complexity.tolist() == [0] * 4


def test_the_harmonic_mean_by_hand(network, x):
    """A fixed map is coherent with itself; half of it shown: ADCC = 3 / (1 + 2 + 1 / (1 - drop))."""
    network.eval()
    halves = torch.zeros(4, 13, 11)
    halves[:, :, 6:] = 1
    halves[:, 0, 5] = halves[:, 1, 5] = 0.5
    found = adcc(network, Fixed(network, halves), x, LABELS)
    assert found.coherency.tolist() == pytest.approx([1] * 4, abs=1e-6)
    shown = float(halves[0].mean())
    for value, drop in zip(found.adcc.tolist(), found.average_drop.tolist(), strict=True):
        assert value == pytest.approx(3 / (1 + 1 / (1 - shown) + 1 / (1 - drop)), abs=1e-6)
    opposite = coherency(Fixed(network, -halves), x, halves, LABELS)
    assert opposite.tolist() == pytest.approx([0] * 4, abs=1e-6)


def test_similarity_needs_no_classes(x):
    """The embedding is the channels' mean: what is kept of one image is known."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else x[:, :2]

    encoder = Mean()
    image = torch.ones(1, 3, 4, 4)
    shares = torch.ones(1, 4, 4)
    shares[0, :2] = 0
    assert float(drop_and_increase(encoder, image, shares, score="similarity")[0]) == pytest.approx(0, abs=1e-6)
    image[:, 1, :2], image[:, 1, 2:] = 7, -1  # means (1, 3); of the lower half (0.5, -0.5): a negative cosine counts 0
    assert float(drop_and_increase(encoder, image, shares, score="similarity")[0]) == 1
    image[:, 1, 2:] = 0  # (1, 3.5) and (0.5, 0)
    expected = 1 - 1 / math.hypot(1, 3.5)
    assert float(drop_and_increase(encoder, image, shares, score="similarity")[0]) == pytest.approx(expected, abs=1e-6)
    assert float(drop_and_increase(encoder, image, shares, score="similarity")[1]) == 0
    found = adcc(encoder, Fixed(encoder, shares), image, score="similarity")
    assert float(found.adcc) == pytest.approx(3 / (1 + 2 + 1 / (1 - expected)), abs=1e-5)
    assert encoder.training
    with pytest.raises(NetworkError, match="the embedding of an image is 0"):
        drop_and_increase(encoder, image * 0, shares, score="similarity")
    with pytest.raises(NetworkError, match="logits"):
        drop_and_increase(encoder, image, shares)


def test_nothing_to_lose_is_no_drop(x):
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, -1e4]]).expand(len(x), -1)

    assert drop_and_increase(Never(), x, torch.rand(4, 13, 11), 1)[0].tolist() == [0] * 4


def test_bad_input_is_named(network, x):
    shares = torch.rand(4, 13, 11)
    for wrong, words in ((shares * 2, "use `unit_range`"), (shares - 1, "use `unit_range`"), (shares / 0, "finite")):
        with pytest.raises(DatasetError, match=words):
            drop_and_increase(network, x, wrong)
    with pytest.raises(DatasetError, match="at_pixels"):
        drop_and_increase(network, x, shares[:, :6])
    for odd in (x.byte(), x[0], x[:0]):
        with pytest.raises(DatasetError, match=r"^images"):
            adcc(network, Fixed(network, shares), odd)
    with pytest.raises(DatasetError, match="3 maps of 4 images"):
        adcc(network, Fixed(network, shares[:3]), x)
    with pytest.raises(ConfigError, match="did you mean 'similarity'"):
        drop_and_increase(network, x, shares, score="similar")
    with pytest.raises(ConfigError, match="resize='cubic'"):
        adcc(network, WeightedMean(network), x, resize="cubic")
    with pytest.raises(ConfigError, match="target=3"):
        drop_and_increase(network, x, shares, 3)


def test_rounding_is_no_increase():
    """Shares of nearly 1 leave cosines of nearly 1, on either side of it."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(64, 3, 16, 16)
    assert drop_and_increase(encoder, x, torch.full((64, 16, 16), 0.9999), score="similarity")[1].sum() == 0
