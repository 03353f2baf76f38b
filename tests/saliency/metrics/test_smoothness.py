"""Smoothness against closed forms, torchmetrics, and the checkerboards that strides leave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import total_variation as torchmetrics_variation

from medsd.errors import DatasetError
from medsd.saliency.metrics.smoothness import normalised_variation, nyquist_energy


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checkerboard(side: int) -> Tensor:
    places = torch.arange(side)
    return (1 - 2 * ((places[:, None] + places) % 2)).double()[None, None]


@pytest.mark.parametrize("side", [8, 9, 56])
def test_variation_in_closed_form(side):
    board = checkerboard(side)
    stripes = board[:, :, :1].expand(-1, -1, side, -1)
    # Of an odd side the mean is not 0: the step is still 2, the mean magnitude 1 - mean^2.
    for pattern, steps in ((board, 2 * side * (side - 1)), (stripes, side * (side - 1))):
        magnitude = 1 - float(pattern.mean()) ** 2
        expected = 2 * steps / side**2 / magnitude
        assert float(normalised_variation(pattern)) == pytest.approx(expected, abs=1e-10)
    if side % 2 == 0:
        assert float(normalised_variation(board)) == pytest.approx(4 - 4 / side, abs=1e-10)
        assert float(normalised_variation(stripes)) == pytest.approx(2 - 2 / side, abs=1e-10)
    ramp = torch.arange(side, dtype=torch.float64).expand(1, 1, side, side)
    assert float(normalised_variation(ramp)) == pytest.approx(4 / side, rel=2 / side)
    assert float(normalised_variation(torch.full_like(ramp, 7.0))) == 0


def test_variation_of_white_noise():
    assert float(normalised_variation(noise(1, 64, 56, 56))) == pytest.approx(2 * math.sqrt(2) * 55 / 56, rel=2e-3)


def test_variation_is_torchmetrics_on_the_normalised_map():
    values = noise(3, 5, 7, 6) * torch.tensor([1e-3, 1.0, 40.0])[:, None, None, None]
    centred = values - values.mean(dim=(2, 3), keepdim=True)
    scaled = centred / centred.abs().mean(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    expected = torchmetrics_variation(scaled, reduction="none") / values[0].numel()
    np.testing.assert_allclose(normalised_variation(values), expected, rtol=1e-12)


def test_a_dead_channel_is_guarded_and_an_image_stands_alone():
    values = noise(2, 3, 8, 8)
    values[0, 1] = 1e-9 * noise(8, 8)
    both = normalised_variation(values)
    assert float(both[0]) < float(normalised_variation(values[:1, [0, 2]])) * 0.68  # a third counts as nearly constant
    assert float(both[1]) == pytest.approx(float(normalised_variation(values[1:])))


@given(st.floats(0.01, 100), st.floats(-10, 10), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_variation_sees_no_offset_scale_or_flip(scale, offset, seed):
    values = noise(1, 2, 5, 6, seed=seed)
    expected = float(normalised_variation(values))
    assert float(normalised_variation(values * scale + offset)) == pytest.approx(expected, rel=1e-8)
    assert float(normalised_variation(-values.flip(2))) == pytest.approx(expected, rel=1e-10)
    assert float(normalised_variation(values.transpose(2, 3))) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("kernel", "block"), [(1, [[1, 0], [0, 0]]), (3, [[1, 2], [2, 4]]), (7, [[9, 12], [12, 16]])])
def test_energy_of_what_a_stride_leaves(kernel, block):
    """The gradient of a constant through a strided convolution repeats a 2 x 2 block: its energy is known."""
    block = torch.tensor(block, dtype=torch.float64)
    gradient = block.repeat(8, 8)[None, None]
    constant = float(block.mean()) ** 2
    assert float(nyquist_energy(gradient)) == pytest.approx(1 - constant / float((block**2).mean()), abs=1e-12)
    # The same block comes out of autograd, away from the border.
    image = torch.zeros(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    F.conv2d(image, weight, stride=2, padding=kernel // 2).sum().backward()
    assert torch.equal(image.grad[0, 0, 10:12, 10:12], block)


def test_energy_vanishes_under_the_box_and_smoothing_halves_the_variation():
    """Spec of arXiv 2404.02282: a random 3 x 3 stride-2 convolution, a constant upstream gradient, circular box."""
    image = torch.zeros(1, 16, 32, 32, dtype=torch.float64, requires_grad=True)
    padded = F.pad(image, (1, 1, 1, 1), mode="circular")
    F.conv2d(padded, noise(8, 16, 3, 3, seed=1), stride=2).sum().backward()
    gradient = image.grad
    smooth = sum(gradient.roll((a, b), dims=(2, 3)) for a in (0, 1) for b in (0, 1)) / 4
    assert float(nyquist_energy(gradient)) > 0.5
    assert float(nyquist_energy(smooth)) < 1e-25
    assert float(normalised_variation(gradient)) > 1.5 and float(normalised_variation(smooth)) < 1e-6


def test_energy_of_waves():
    side = 16
    angle = 2 * math.pi * torch.arange(side, dtype=torch.float64) / side
    wave = (3 * angle).cos()[:, None] * (5 * angle).cos()
    assert float(nyquist_energy(wave[None, None])) == pytest.approx(0, abs=1e-25)
    board = checkerboard(side)[0, 0]
    stripes = board[:1].expand(side, -1)
    for pattern in (board, stripes, stripes.T):
        assert float(nyquist_energy(pattern[None, None])) == pytest.approx(1, abs=1e-12)
    # Energies add up over channels: 1/4 of a wave, 1 of the board, 4 of a constant.
    mixed = torch.stack([wave, board, torch.full_like(wave, 2.0)])
    assert float(nyquist_energy(mixed[None])) == pytest.approx(1 / 5.25, abs=1e-12)
    white = float(nyquist_energy(noise(1, 64, 32, 32)))
    assert white == pytest.approx((2 * 32 - 1) / 32**2, rel=0.1)


def test_energy_of_odd_sides_zeros_lines_and_tiny_maps():
    odd = torch.full((1, 1, 9, 7), 5.0, dtype=torch.float64)
    odd[:, :, :8, :6] = noise(1, 1, 8, 6)
    assert float(nyquist_energy(odd)) == pytest.approx(float(nyquist_energy(odd[:, :, :8, :6])), abs=1e-14)
    assert float(nyquist_energy(torch.zeros(1, 2, 6, 6))) == 0
    assert float(nyquist_energy(torch.ones(1, 2, 1, 1))) == 0
    assert float(nyquist_energy(torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]]))) == pytest.approx(1)
    assert float(nyquist_energy(odd * 1e-200)) == pytest.approx(float(nyquist_energy(odd)))


def test_bad_input_is_named():
    for function in (normalised_variation, nyquist_energy):
        for wrong in (torch.rand(2, 4, 4), torch.rand(1, 0, 4, 4), torch.full((1, 1, 2, 2), math.nan)):
            with pytest.raises(DatasetError, match=r"attributions|saliency"):
                function(wrong)
