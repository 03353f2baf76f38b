"""Masking against plain loops, and on networks whose answer to masking is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.metrics.masking import SHARES, masking_curve, random_masking_curve
from medsd.saliency.metrics.perturb import baseline_image, perturbed_logits, pixel_ranks
from medsd.saliency.metrics.scoring import Perturbation


class PixelSum(nn.Module):
    """Class 1 where the weighted sum of the pixels, plus a bias, is above 0; counts the images it has seen."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias, self.seen, self.modes = weight, bias, 0, set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.modes.add(self.training)
        evidence = (x * self.weight).sum(dim=(1, 2, 3)) + self.bias
        return torch.stack([torch.zeros_like(evidence), evidence], dim=1)


def network_and_images(images: int = 4, side: int = 6) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    convolution = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)
    ).double()
    for parameter in convolution.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(images, 3, side, side, generator=generator, dtype=torch.float64)
    saliency = torch.randn(images, side, side, generator=generator, dtype=torch.float64)
    return convolution.eval(), x, torch.arange(images) % 3, saliency


def curve_by_loops(network: nn.Module, image: Tensor, label: int, saliency: Tensor, fill: Tensor) -> list[list[float]]:
    """Correct and probability, one pixel after the other."""
    order = np.argsort(-np.abs(saliency.numpy().ravel()), kind="stable")
    height, width = saliency.shape
    rows = []
    for tenth in range(10):
        masked = image.clone()
        for place in order[: tenth * height * width // 10]:
            masked[:, place // width, place % width] = fill
        logits = network(masked[None])[0].detach()
        rows.append([float(logits.argmax() == label), float(logits.softmax(0)[label])])
    return rows


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_equals_masking_pixel_by_pixel(fill):
    network, x, labels, saliency = network_and_images(side=5)  # 25 pixels: shares round down
    curve = masking_curve(network, x, labels, saliency, Perturbation(fill, batch_size=7))
    assert curve.shares.tolist() == pytest.approx(list(SHARES))
    for item in range(len(x)):
        colour = x[item].mean(dim=(1, 2)) if fill == "mean" else torch.zeros(3, dtype=torch.float64)
        expected = curve_by_loops(network, x[item], int(labels[item]), saliency[item], colour)
        found = torch.stack([curve.correct[item], curve.probability[item]], dim=1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_true_map_loses_the_class_at_once_and_a_false_one_never():
    """Only the four middle pixels count; each image is of class 1 while one of them is left."""
    weight = torch.zeros(4, 4)
    weight[1:3, 1:3] = 1
    network = PixelSum(weight, bias=-0.5)
    x = torch.ones(3, 1, 4, 4)
    labels = torch.ones(3, dtype=torch.int64)
    shares = (0.0, 0.25, 0.5, 0.75)
    true = masking_curve(network, x, labels, weight.expand(3, -1, -1), Perturbation("zero"), shares)
    false = masking_curve(network, x, labels, (1 - weight).expand(3, -1, -1), Perturbation("zero"), shares)
    assert true.correct.tolist() == [[1, 0, 0, 0]] * 3
    assert false.correct.tolist() == [[1, 1, 1, 1]] * 3
    assert true.area.tolist() == pytest.approx([1 / 6] * 3)  # half of the first of three steps
    assert false.area.tolist() == pytest.approx([1.0] * 3)


def test_the_sign_of_the_map_does_not_count():
    network, x, labels, saliency = network_and_images()
    one, other = (masking_curve(network, x, labels, sign * saliency) for sign in (1, -1))
    assert torch.equal(one.probability, other.probability)


def test_network_ends_in_the_mode_it_was_in_and_works_in_eval_mode():
    network = PixelSum(torch.ones(4, 4)).train()
    x = torch.randn(2, 1, 4, 4)
    masking_curve(network, x, torch.zeros(2, dtype=torch.int64), torch.rand(2, 4, 4))
    assert network.training and network.modes == {False} and network.seen == 2 * len(SHARES)


def test_random_control_masks_as_many_pixels_by_chance():
    """A network that counts: P(right) falls as the hypergeometric law says."""
    weight = torch.zeros(10, 10)
    weight[0, 0] = 1
    network = PixelSum(weight, bias=-0.5)
    x, labels = torch.ones(400, 1, 10, 10), torch.ones(400, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    curve = random_masking_curve(network, x, labels, 5, Perturbation("zero", None, generator, 4000))
    expected = 1 - torch.tensor(SHARES)  # the one pixel that counts is still there
    assert (curve.correct.mean(dim=0) - expected).abs().max() < 0.04
    assert ((curve.correct * 5).round() - curve.correct * 5).abs().max() < 1e-5  # a mean of five draws
    again = random_masking_curve(
        network, x, labels, 5, Perturbation("zero", None, torch.Generator().manual_seed(0), 999)
    )
    assert torch.equal(curve.correct, again.correct)


def test_equal_pixels_are_ordered_at_random():
    maps = torch.zeros(2000, 2, 2)
    maps[:, 0, 0] = 1
    ranks = pixel_ranks(maps, torch.Generator().manual_seed(0))
    assert (ranks[:, 0, 0] == 0).all()
    means = ranks.flatten(1)[:, 1:].double().mean(dim=0)
    assert (means - 2).abs().max() < 0.06


@given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_ranks_are_an_order_of_falling_values(values, seed):
    maps = torch.tensor(values, dtype=torch.float32).view(1, 3, 4)
    ranks = pixel_ranks(maps, torch.Generator().manual_seed(seed)).flatten()
    assert sorted(ranks.tolist()) == list(range(12))
    falling = maps.flatten()[ranks.argsort()]
    assert (falling.diff() <= 0).all()


def test_blur_is_rises_kernel():
    """By hand: a point becomes the kernel, whose square holds the whole weight, equal along both axes."""
    x = torch.zeros(1, 2, 21, 21)
    x[0, 0, 10, 10] = 1
    blurred = baseline_image(x, "blur")
    assert blurred[0, 1].abs().max() == 0
    kernel = blurred[0, 0, 5:16, 5:16]
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6) and float(blurred[0, 0].sum()) == pytest.approx(
        1, abs=1e-6
    )
    # A Gaussian of sigma 5 cut at 20 px, its tails reflected at the edges of 11 px.
    weight = np.exp(-(np.arange(-20, 21) ** 2) / 50)
    reflected = np.zeros(11)
    for offset, value in zip(range(-20, 21), weight / weight.sum(), strict=True):
        place = (5 + offset) % 22
        reflected[place if place < 11 else 21 - place] += value
    np.testing.assert_allclose(kernel, np.outer(reflected, reflected), atol=1e-6)


@pytest.mark.parametrize(
    "shares", [(), (0.5,), (0.5, 0.5), (0.5, 0.1), (-0.1, 0.5), (0.0, 1.1), (0.0, float("nan")), ("0", "1")]
)
def test_shares_must_rise_within_0_to_1(shares):
    network, x, labels, saliency = network_and_images()
    with pytest.raises(ConfigError, match="shares"):
        masking_curve(network, x, labels, saliency, shares=shares)


def test_bad_maps_and_choices_are_named():
    network, x, labels, saliency = network_and_images()
    for wrong in (saliency[:, :3], saliency[:2], saliency.flatten(1), saliency.log()):
        with pytest.raises(DatasetError, match="saliency"):
            masking_curve(network, x, labels, wrong)
    with pytest.raises(ConfigError, match="baseline='median'"):
        masking_curve(network, x, labels, saliency, Perturbation("median"))
    with pytest.raises(ConfigError, match="draws=0"):
        random_masking_curve(network, x, labels, draws=0)


def test_replacing_all_or_nothing():
    network, x, _, saliency = network_and_images()
    logits = perturbed_logits(network, x, -x, pixel_ranks(saliency), [0, 36])
    np.testing.assert_allclose(logits[:, 0], network(x).detach(), rtol=1e-5)
    np.testing.assert_allclose(logits[:, 1], network(-x).detach(), rtol=1e-5)


def test_labels_outside_the_classes_are_refused():
    two = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match="target=5: the network has 2 classes"):
        masking_curve(two, torch.rand(2, 3, 8, 8), torch.tensor([0, 5]), torch.rand(2, 8, 8))
