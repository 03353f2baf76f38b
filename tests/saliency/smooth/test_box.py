"""The box against its definition: where it is zero, where it leaves things, and what it was for stride 2."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from medsd.errors import ConfigError
from medsd.saliency.smooth import Boundary, Box
from medsd.saliency.smooth.box import SmoothedGradient

BOUNDARIES = get_args(Boundary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stride_two_is_what_slides_were_mapped_with_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 17, 24, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows = x + x.roll(1, dims=2)
    assert torch.equal(Box((2, 2), "circular")(x), (rows + rows.roll(1, dims=3)) / 4)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    assert torch.equal(Box((2, 2), "symmetric")(x), (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("down", "across"), [(2, 2), (3, 3), (4, 4), (2, 1), (1, 4), (4, 3)])
def test_it_is_scipys_filter(down: int, across: int, boundary: Boundary) -> None:
    x = np.random.default_rng(0).normal(size=(14, 13))
    mode = "wrap" if boundary == "circular" else "reflect"  # scipy's reflect mirrors about the edge
    expected = x
    for axis, stride in ((0, down), (1, across)):
        if boundary == "circular":  # the mean of a pixel and those before it
            expected = ndimage.uniform_filter1d(expected, stride, axis, mode=mode, origin=(stride - 1) // 2)
        else:
            taps = np.ones(stride) if stride % 2 else np.convolve(np.ones(stride), np.ones(2))
            expected = ndimage.correlate1d(expected, taps / taps.sum(), axis, mode=mode)
    smoothed = Box((down, across), boundary)(torch.from_numpy(x)[None, None])[0, 0]
    np.testing.assert_allclose(smoothed.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("stride", [2, 3, 4, 5, 8])
def test_every_harmonic_of_the_stride_is_wiped_out(stride: int, boundary: Boundary) -> None:
    box, place = Box((stride, stride), boundary), torch.arange(6 * stride, dtype=torch.float64)
    for harmonic in range(1, stride // 2 + 1):
        wave = torch.cos(2 * torch.pi * harmonic * place / stride + 0.3)
        for x in (wave.view(1, 1, -1, 1).expand(1, 1, -1, 20), wave.view(1, 1, 1, -1).expand(1, 1, 20, -1)):
            inner = box(x)[..., stride:-stride, stride:-stride]
            assert inner.abs().max() < 1e-14, (stride, harmonic)
    constant = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(box(constant), constant, rtol=1e-15, atol=0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_symmetric_is_its_own_adjoint_and_loses_nothing(down: int, across: int, height: int, width: int) -> None:
    """Whatever the size, be it smaller than the box."""
    generator = torch.Generator().manual_seed(height * 10 + width)
    x, y = torch.randn(2, 1, 1, height, width, dtype=torch.float64, generator=generator)
    box = Box((down, across), "symmetric")
    torch.testing.assert_close((box(x) * y).sum(), (x * box(y)).sum(), rtol=0, atol=1e-13)
    torch.testing.assert_close(box(x).sum(), x.sum(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("stride", [(2, 2), (3, 1), (4, 4)])
def test_the_copies_add_up_to_the_smoothed(stride: tuple[int, int], boundary: Boundary) -> None:
    x = torch.randn(1, 2, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box = Box(stride, boundary)
    weights, copies = zip(*box.copies(x), strict=True)
    total: Tensor = sum(weight * copy for weight, copy in zip(weights, copies, strict=True))
    torch.testing.assert_close(total, box(x), rtol=0, atol=1e-14)
    assert sum(weights) == pytest.approx(1, abs=1e-14)


def test_an_unknown_boundary_is_named() -> None:
    words = r"boundary='symetric': use one of circular, symmetric; did you mean 'symmetric'"
    with pytest.raises(ConfigError, match=words):
        Box((2, 2), "symetric")  # type: ignore[arg-type]


def test_gradients_of_torch_func_are_smoothed_too() -> None:
    box = Box((2, 2), "circular")
    x, weight = torch.randn(3, 1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 2.0

    def value(image: Tensor) -> Tensor:
        smoothed: Tensor = SmoothedGradient.apply(image, box)  # type: ignore[no-untyped-call]
        return weight * smoothed.pow(3).sum()

    found = torch.func.vmap(torch.func.grad(value))(x)
    torch.testing.assert_close(found, torch.stack([box(3 * weight * image**2) for image in x]))
