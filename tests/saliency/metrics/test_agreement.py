"""Agreement against scipy and scikit-image, and what constant and tied maps give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity as skimage_similarity

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.metrics.agreement import rank_correlation, structural_similarity
from medsd.saliency.metrics.confidence import unit_range

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


@pytest.mark.parametrize("window", [3, 7, 13])
def test_ssim_is_scikit_images_on_unit_range(window):
    first, second = maps(), maps(seed=1)
    scaled = [unit_range(values).numpy() for values in (first, second)]
    expected = [skimage_similarity(a, b, win_size=window, data_range=1.0) for a, b in zip(*scaled, strict=True)]
    np.testing.assert_allclose(structural_similarity(first, second, window), expected, atol=1e-12)
    single = structural_similarity(first.float(), second.float(), window)
    np.testing.assert_allclose(single, expected, atol=1e-5)


def test_ssim_of_equal_scaled_and_inverted_maps():
    first = maps()
    np.testing.assert_allclose(structural_similarity(first, first * 7 - 3), 1, atol=1e-6)
    assert (structural_similarity(first, -first) < 0).all()


def test_constant_maps_are_undefined():
    first = maps(2)
    flat = first.clone()
    flat[1] = 4.0
    for function in (rank_correlation, structural_similarity):
        for found in (function(first, flat), function(flat, first), function(flat, flat)):
            assert found.isnan().tolist() == [False, True]


def test_bad_input_is_named():
    first = maps(2, 9)
    for function in (rank_correlation, structural_similarity):
        with pytest.raises(DatasetError, match="resize one to the other"):
            function(first, first[:, :5])
        with pytest.raises(DatasetError, match="finite"):
            function(first, first.log())
    for window in (1, 4, 9):
        with pytest.raises(ConfigError, match=f"window_px={window}"):
            structural_similarity(first, first, window)


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1e6])
def test_similarity_does_not_depend_on_the_unit(factor):
    first, second = maps(), maps(seed=1)
    np.testing.assert_allclose(
        structural_similarity(first, factor * second), structural_similarity(first, second), rtol=1e-6
    )
