"""Measures of features whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.evaluate.features import feature_health


def with_covariance(eigenvalues: np.ndarray, samples: int = 64) -> np.ndarray:
    """Features of exactly that diagonal covariance."""
    dim = len(eigenvalues)
    draw = np.random.default_rng(0).normal(size=(samples, dim + 1))
    draw[:, 0] = 1
    basis = np.linalg.qr(draw)[0][:, 1:]
    return basis * np.sqrt(eigenvalues * (samples - 1)) + 3


def test_uncorrelated_features_of_one_variance_are_of_full_rank() -> None:
    health = feature_health(with_covariance(np.full(8, 2.5)))
    assert health.mean_abs_correlation == pytest.approx(0, abs=1e-12)
    assert health.effective_rank == pytest.approx(8)
    assert health.top_eigenvalue_share == pytest.approx(1 / 8)
    assert health.dead_channels == 0


def test_one_direction_is_rank_one() -> None:
    line = np.random.default_rng(0).normal(size=(32, 1)) * np.array([1, -2, 3])
    health = feature_health(line)
    assert health.mean_abs_correlation == pytest.approx(1)
    assert health.effective_rank == pytest.approx(1)
    assert health.top_eigenvalue_share == pytest.approx(1)


def test_rank_of_unequal_directions() -> None:
    health = feature_health(with_covariance(np.array([4, 2, 1, 1])))
    assert health.effective_rank == pytest.approx(2**1.75)  # entropy of (1/2, 1/4, 1/8, 1/8) is 1.75 bits
    assert health.top_eigenvalue_share == pytest.approx(0.5)


@pytest.mark.parametrize("samples", [5, 20, 200])
def test_chance_correlation_of_independent_features(samples: int) -> None:
    """|r| of independent normals: r^2 is Beta(1/2, (N - 2) / 2), hence E|r| by gamma functions."""
    f = np.random.default_rng(1).normal(size=(samples, 300)) * np.linspace(1, 5, 300)
    expected = math.exp(math.lgamma((samples - 1) / 2) - math.lgamma(samples / 2)) / math.sqrt(math.pi)
    health = feature_health(f)
    assert health.mean_abs_correlation == pytest.approx(expected, rel=0.02)
    assert health.correlation_by_chance == pytest.approx(expected)
    if samples == 200:
        assert expected == pytest.approx(math.sqrt(2 / (math.pi * samples)), rel=0.01)


def test_correlation_is_that_of_numpy() -> None:
    rng = np.random.default_rng(2)
    f = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 7
    correlation = np.abs(np.corrcoef(f.T))
    expected = (correlation.sum() - 5) / 20
    assert feature_health(f).mean_abs_correlation == pytest.approx(expected, rel=1e-12)


def test_dead_channels_are_counted_and_leave_the_correlation_out() -> None:
    rng = np.random.default_rng(3)
    living = np.repeat(rng.normal(size=(50, 1)), 2, axis=1)  # correlate fully
    constant = np.full((50, 1), 0.3)
    faint = rng.normal(size=(50, 1)) * 1e-2
    health = feature_health(np.concatenate([living, constant, faint], axis=1))
    assert health.dead_channels == 2
    assert health.mean_abs_correlation == pytest.approx(1)


def test_dead_is_relative_to_the_mean_variance() -> None:
    variances = np.array([1, 1, 1, 0.55e-3, 0.65e-3])  # mean 0.6
    assert feature_health(with_covariance(variances)).dead_channels == 1
    assert feature_health(with_covariance(variances) * 1e-3).dead_channels == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(2, 8), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_ranges_and_invariances(seed: int, dim: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(12, dim)) @ rng.normal(size=(dim, dim))
    health = feature_health(f)
    assert 0 <= health.mean_abs_correlation <= 1 + 1e-12 or health.dead_channels >= dim - 1
    assert 1 - 1e-9 <= health.effective_rank <= dim + 1e-9
    assert 1 / dim - 1e-9 <= health.top_eigenvalue_share <= 1
    same = feature_health(f[rng.permutation(12)][:, rng.permutation(dim)] * scale + scale)
    for name in ("mean_abs_correlation", "effective_rank", "top_eigenvalue_share", "dead_channels"):
        assert getattr(same, name) == pytest.approx(getattr(health, name), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_collapsed_network_has_no_values(value: float) -> None:
    health = feature_health(torch.full((20, 4), value) * (1 + 1e-7 * torch.rand(20, 4)))
    assert health.dead_channels == 4
    assert math.isnan(health.mean_abs_correlation) and math.isnan(health.correlation_by_chance)
    assert math.isnan(health.effective_rank) and math.isnan(health.top_eigenvalue_share)


def test_one_channel_has_no_correlation() -> None:
    health = feature_health(np.arange(5.0)[:, None])
    assert math.isnan(health.mean_abs_correlation) and health.effective_rank == pytest.approx(1)


def test_tensors_of_any_kind_and_plain_floats_out() -> None:
    f = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    expected = feature_health(f.double().numpy())
    health = feature_health(f.requires_grad_())
    assert health == expected
    assert [type(value) for value in vars(health).values()] == [float, float, float, float, int]


def test_bad_features_in_words() -> None:
    with pytest.raises(DatasetError, match=r"features: shape \(1, 4\); give \(N, d\) of at least 2 samples"):
        feature_health(np.zeros((1, 4)))
    with pytest.raises(DatasetError, match="features: shape"):
        feature_health(np.zeros(4))
    with pytest.raises(DatasetError, match="features: not all are finite"):
        feature_health(np.array([[1.0, np.nan], [1, 2]]))


def test_two_samples_correlate_in_full_and_have_no_chance() -> None:
    health = feature_health(np.array([[0.0, 1.0], [1.0, 3.0]]))
    assert health.mean_abs_correlation == pytest.approx(1) and math.isnan(health.correlation_by_chance)
