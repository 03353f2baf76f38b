"""Deletion and insertion against a loop written after RISE's text, and on a network with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 13 * 11, 3)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 13, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def saliency() -> Tensor:
    return torch.randn(3, 13, 11, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rise_baseline(image: Tensor, kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(image)
    if kind == "mean":
        return image.mean(dim=(1, 2), keepdim=True) * torch.ones_like(image)
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(point, 5))
    weight = torch.zeros(3, 3, 11, 11, dtype=torch.float64)
    for channel in range(3):
        weight[channel, channel] = kernel
    return nn.functional.conv2d(image[None], weight, padding=5)[0]


def rise(network: nn.Module, start: Tensor, end: Tensor, label: int, saliency: Tensor, step: int) -> list[float]:
    """One image: a step's pixels are copied from `end` before each further look."""
    order = np.flip(np.argsort(saliency.numpy().ravel()))
    image, width, probabilities = start.clone(), saliency.shape[1], []
    for number in range(-(-len(order) // step) + 1):
        probabilities.append(float(network(image[None]).softmax(1)[0, label]))
        for place in order[number * step : (number + 1) * step]:
            row, column = divmod(int(place), width)
            image[:, row, column] = end[:, row, column]
    return probabilities


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur"])
@pytest.mark.parametrize("step_px", [7, 13, 143, 500])
def test_equals_a_plain_loop(network, x, saliency, baseline, step_px):
    deletion = deletion_curve(network, x, LABELS, saliency, baseline, step_px, batch_size=10)
    insertion = insertion_curve(network, x, LABELS, saliency, baseline, step_px)
    for item, (image, label) in enumerate(zip(x, LABELS.tolist(), strict=True)):
        other = rise_baseline(image, baseline)
        for found, start, end in ((deletion, image, other), (insertion, other, image)):
            expected = rise(network, start, end, label, saliency[item], step_px)
            np.testing.assert_allclose(found[item], expected, atol=1e-6)
            area = (sum(expected) - expected[0] / 2 - expected[-1] / 2) / (len(expected) - 1)
            assert float(curve_area(found)[item]) == pytest.approx(area, abs=1e-6)


def test_defaults_are_hundredths_zero_and_blur(network, x, saliency):
    assert torch.equal(
        deletion_curve(network, x, LABELS, saliency), deletion_curve(network, x, LABELS, saliency, "zero", 1)
    )
    assert torch.equal(
        insertion_curve(network, x, LABELS, saliency), insertion_curve(network, x, LABELS, saliency, "blur", 1)
    )
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 30, 2))
    curve = deletion_curve(wide, torch.randn(1, 3, 20, 30), torch.tensor([0]), torch.rand(1, 20, 30))
    assert curve.shape == (1, 101)  # 600 pixels, 6 a step


class Share(nn.Module):
    """The probability of class 1 is the mean of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.logit(
                torch.stack([1 - x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1).clamp(1e-7, 1)
            ).nan_to_num(posinf=99)
            / 2
        )


def test_areas_by_hand():
    """Pixels 0.4, 0.3, 0.2, 0.1 (times 2.5 each quarter): probabilities are sums of what is left."""
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 2, 2)
    label = torch.tensor([1])
    deletion = deletion_curve(Share(), x, label, x[:, 0], step_px=1)[0]
    assert deletion.tolist() == pytest.approx([0.25, 0.15, 0.075, 0.025, 0], abs=1e-4)
    insertion = insertion_curve(Share(), x, label, x[:, 0], "zero", 1)[0]
    assert insertion.tolist() == pytest.approx([0, 0.1, 0.175, 0.225, 0.25], abs=1e-4)
    assert float(curve_area(deletion[None])) == pytest.approx(0.09375, abs=1e-4)
    # The worst order of pixels has the most left on the way.
    worst = curve_area(deletion_curve(Share(), x, label, -x[:, 0], step_px=1))
    assert float(worst) == pytest.approx(0.15625, abs=1e-4)


def test_bad_input_is_named(network, x, saliency):
    for function in (deletion_curve, insertion_curve):
        with pytest.raises(ConfigError, match="step_px=0"):
            function(network, x, LABELS, saliency, step_px=0)
        with pytest.raises(ConfigError, match="baseline"):
            function(network, x, LABELS, saliency, "noise")
        with pytest.raises(DatasetError, match="finite"):
            function(network, x, LABELS, saliency / 0)
        with pytest.raises(DatasetError, match="a \\(H, W\\) map an image"):
            function(network, x, LABELS, saliency[:, :5])
