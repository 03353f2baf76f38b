"""Agreement against scipy, and what constant and tied maps give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from medsd.errors import DatasetError
from medsd.saliency.metrics.agreement import rank_correlation

VALUES = st.lists(st.integers(-2, 2), min_size=12, max_size=12).filter(lambda values: len(set(values)) > 1)


def maps(batch: int = 3, side: int = 15, seed: int = 0) -> torch.Tensor:
    rough = torch.randn(batch, 1, side, side + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.avg_pool2d(rough, 3, stride=1)[:, 0] * 50


@given(VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_spearman_is_scipys_with_ties(first, second):
    found = rank_correlation(*(torch.tensor(v, dtype=torch.float32).view(1, 3, 4) for v in (first, second)))
    assert float(found) == pytest.approx(float(spearmanr(first, second).statistic), abs=1e-12)


def test_spearman_of_a_batch_and_what_does_not_change_it():
    first, second = maps(), maps(seed=1)
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlation(first, second), expected, atol=1e-12)
    np.testing.assert_allclose(rank_correlation(first.exp(), second), expected, atol=1e-12)
    np.testing.assert_allclose(rank_correlation(first, first), 1, atol=1e-12)
    np.testing.assert_allclose(rank_correlation(first, -first), -1, atol=1e-12)


def test_constant_maps_are_undefined():
    first = maps(2)
    flat = first.clone()
    flat[1] = 4.0
    for found in (rank_correlation(first, flat), rank_correlation(flat, first), rank_correlation(flat, flat)):
        assert found.isnan().tolist() == [False, True]


def test_bad_input_is_named():
    first = maps(2, 9)
    with pytest.raises(DatasetError, match="resize one to the other"):
        rank_correlation(first, first[:, :5])
    with pytest.raises(DatasetError, match="finite"):
        rank_correlation(first, first.log())
