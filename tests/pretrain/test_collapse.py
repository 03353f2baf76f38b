"""Collapse measures at spectra that are known, and beside MONAI's metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.embedding_collapse import EmbeddingCollapseMetric
from torch import Tensor

from medsd.errors import DatasetError
from medsd.pretrain.collapse import alignment, collapse_warning, spectrum, uniformity


def noise(samples: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_isotropic_noise_uses_every_direction() -> None:
    found = spectrum(noise(20_000, 32))
    assert found.effective_rank > 31.9 and found.participation_ratio > 31.8
    assert found.directions == 32 and found.samples == 20_000
    assert found.mean_abs_correlation == pytest.approx(math.sqrt(2 / (math.pi * 20_000)), rel=0.15)
    torch.testing.assert_close(found.singular_values.sum(), torch.tensor(1.0).double(), rtol=1e-2, atol=0)
    assert collapse_warning(found) is None


def test_data_of_rank_five_has_five_directions() -> None:
    found = spectrum(noise(4000, 5) @ noise(5, 32, seed=1))
    assert found.directions == 5 and found.effective_rank < 5
    assert int((found.singular_values > 1e-6 * found.singular_values[0]).sum()) == 5


def test_two_directions_of_known_shares() -> None:
    """Unit vectors on the axes, three times as many on the first."""
    axes = torch.eye(4, dtype=torch.float64)[:2]
    found = spectrum(torch.cat([axes[:1], -axes[:1]] * 3 + [axes[1:], -axes[1:]]) * 7)
    shares = np.array([0.75, 0.25])
    assert found.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))
    assert found.participation_ratio == pytest.approx(1 / float((shares**2).sum()))
    assert found.directions == 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(2, 8))
def test_the_length_of_vectors_and_turns_do_not_matter(seed: int, dim: int) -> None:
    f = noise(20, dim, seed) + 0.5
    found = spectrum(f)
    turned = spectrum((f * torch.rand(20, 1, dtype=torch.float64).add(0.1)) @ torch.linalg.qr(noise(dim, dim, seed))[0])
    assert turned.effective_rank == pytest.approx(found.effective_rank, rel=1e-6)
    assert 1 <= found.effective_rank <= dim + 1e-9
    assert 1 <= found.participation_ratio <= found.effective_rank + 1e-9  # order 2 below order 1 (Renyi)
    direct = torch.linalg.svdvals(torch.cov(F.normalize(f, dim=1).T))
    torch.testing.assert_close(found.singular_values, direct, rtol=1e-6, atol=1e-12)


def test_warnings_in_words() -> None:
    narrow = spectrum(noise(400, 1) @ noise(1, 64, 1) + 1e-3 * noise(400, 64, 2) + 1)
    line = collapse_warning(narrow, "embeddings")
    assert line is not None and "\n" not in line
    assert line.startswith("embeddings: collapsing, ") and "of 64 directions" in line
    rising = collapse_warning(narrow, before=narrow.effective_rank / 2) or ""
    assert "still rising" in rising and "pretrain_epochs" in rising and "\n" not in rising
    assert collapse_warning(narrow, "embeddings", before=2 * narrow.effective_rank) == line
    few = spectrum(noise(8, 64))  # 7 directions at most can be seen: no collapse for that
    assert collapse_warning(few) is None
    same = spectrum(torch.full((10, 4), 0.3) * (1 + 1e-7 * torch.rand(10, 4)))
    assert math.isnan(same.effective_rank) and math.isnan(same.mean_abs_correlation) and same.directions == 0
    assert "all are the same" in (collapse_warning(same) or "")


def test_alignment_and_uniformity() -> None:
    basis = torch.eye(3)
    assert alignment(basis * 2, basis) == 0
    assert alignment(basis, -basis) == pytest.approx(4)
    assert alignment(basis, basis.roll(1, 0)) == pytest.approx(2)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    f = noise(30, 6)
    unit = F.normalize(f, dim=1)
    pairs = torch.triu_indices(30, 30, 1)
    squares = (unit[pairs[0]] - unit[pairs[1]]).square().sum(1)
    assert uniformity(f) == pytest.approx(float((-2 * squares).exp().mean().log()), rel=1e-5)
    assert uniformity(noise(2000, 16)) < uniformity(noise(2000, 16) + 1)


def test_what_monais_metric_measures() -> None:
    """1 - rank / (most that can be), its rank of the singular values of features and not of their covariance."""
    f = noise(50, 8) @ torch.diag(torch.tensor([4.0, 2, 1, 1, 0.5, 0.2, 0.1, 0.1])).double()
    scores = EmbeddingCollapseMetric()(f)
    values = torch.linalg.svdvals(f - f.mean(dim=0))
    shares = values / values.sum()
    rank = float((-(shares * shares.log()).sum()).exp())
    assert float(scores["effective_rank_score"]) == pytest.approx(1 - rank / 8, abs=1e-5)
    assert rank > spectrum(f).effective_rank
    assert scores["centroid_similarity"] is None and scores["separation"] is None and scores["domain_shift"] is None


def test_bad_features_in_words() -> None:
    with pytest.raises(DatasetError, match=r"features: shape \(1, 4\)"):
        spectrum(np.zeros((1, 4)))
    with pytest.raises(DatasetError, match="not all are finite"):
        spectrum(torch.tensor([[1.0, math.nan], [0, 1]]))
