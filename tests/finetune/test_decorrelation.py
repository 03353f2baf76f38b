"""Mode `cov`: known values, analytic gradient, invariances, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import TrainingError
from medsd.finetune.decorrelation import covariance_penalty


def features(batch: int, dim: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(batch, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw @ torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) / 3 + 2


def whitened(batch: int, dim: int) -> torch.Tensor:
    """Features whose covariance is the identity: orthonormal columns orthogonal to the constant."""
    basis = torch.cat([torch.ones(batch, 1, dtype=torch.float64), features(batch, dim)], dim=1)
    return torch.linalg.qr(basis).Q[:, 1:] * (batch - 1) ** 0.5


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 12), dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_gradient_is_the_analytic_one(batch: int, dim: int, seed: int) -> None:
    f = features(batch, dim, seed).requires_grad_()
    (gradient,) = torch.autograd.grad(covariance_penalty(f), f)
    centred = f.detach() - f.detach().mean(dim=0)
    covariance = torch.cov(centred.T).reshape(dim, dim)
    expected = 4 / ((batch - 1) * dim) * centred @ (covariance - torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(covariance_penalty, features(5, 4).requires_grad_())


def test_value_by_numpy_like_definition() -> None:
    f = features(9, 4)
    total = 0.0
    for i in range(4):
        for j in range(4):
            a, b = f[:, i] - f[:, i].mean(), f[:, j] - f[:, j].mean()
            total += float((a * b).sum() / 8 - float(i == j)) ** 2
    assert float(covariance_penalty(f)) == pytest.approx(total / 4, rel=1e-12)


def test_zero_for_whitened_features_and_one_for_dead_ones() -> None:
    assert float(covariance_penalty(whitened(32, 8))) < 1e-24
    assert float(covariance_penalty(torch.full((32, 8), 3.0, dtype=torch.float64))) == pytest.approx(1)


def test_floor_when_the_batch_is_smaller_than_the_features() -> None:
    batch, dim = 8, 24
    assert float(covariance_penalty(whitened(dim + 1, batch - 1).T[:, :dim])) > 0  # any features are above the floor
    # The best that rank B - 1 can do: B - 1 unit directions among d.
    directions = torch.linalg.qr(features(dim, batch - 1)).Q.T
    best = whitened(batch, batch - 1) @ directions
    floor = (dim - batch + 1) / dim
    assert float(covariance_penalty(best)) == pytest.approx(floor, rel=1e-12)
    for seed in range(5):
        assert float(covariance_penalty(features(batch, dim, seed))) > floor


def test_invariances() -> None:
    f = features(10, 6)
    value = covariance_penalty(f)
    order, channels = torch.randperm(10), torch.randperm(6)
    rotation = torch.linalg.qr(features(6, 6, 5)).Q
    for same in (f + torch.randn(6, dtype=torch.float64), f[order], f[:, channels], -f, f @ rotation):
        torch.testing.assert_close(covariance_penalty(same), value, rtol=1e-11, atol=0)
    assert not torch.isclose(covariance_penalty(2 * f), value, rtol=1e-3)


@pytest.mark.parametrize("batch", [0, 1])
def test_one_sample_is_refused_in_words(batch: int) -> None:
    with pytest.raises(TrainingError, match=f"batch_size={batch}: .* raise batch_size") as caught:
        covariance_penalty(torch.zeros(batch, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    f = (features(64, 16) * 20).to(dtype)  # covariances of some thousands: squares overflow float16
    value = covariance_penalty(f)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), covariance_penalty(f.double()), rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(covariance_penalty(f), value)


def test_autocast_does_not_lower_the_precision() -> None:
    f = features(64, 16)
    for g in (f, f.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = covariance_penalty(g)
        assert inside.dtype == g.dtype
        assert torch.equal(inside, covariance_penalty(g))
