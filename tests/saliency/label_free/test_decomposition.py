"""Channel vectors and values against numpy's SVD, tensorly's Tucker of the whole tensor, and where rank is lost."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker
from torch import Tensor

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.label_free.decomposition import LEAST_VALUE, checked_ranks, decompose, tucker

SHAPES = [(40, 5, 4), (20, 4, 5), (6, 7, 9), (1, 3, 3), (5, 1, 1), (3, 1, 2)]


def features_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.relu(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def blobs(channels: int, side: int, noise: float) -> Tensor:
    """(1, channels, side, side): three bumps with channels of their own, and noise."""
    generator = torch.Generator().manual_seed(4)
    places = torch.arange(side, dtype=torch.float64)
    image = noise * torch.rand(channels, side, side, generator=generator, dtype=torch.float64)
    for row, column, strength in ((1, 2, 3.0), (side - 2, 1, 2.0), (3, side - 2, 1.0)):
        bump = torch.exp(-((places[:, None] - row) ** 2) / 3 - (places[None] - column) ** 2 / 2)
        image += strength * torch.rand(channels, 1, 1, generator=generator, dtype=torch.float64) * bump
    return image[None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
def test_equals_the_svd(shape: tuple[int, int, int], centred: bool) -> None:
    features = features_of((3, *shape))
    components = decompose(features, centred)
    places = shape[1] * shape[2]
    assert components.maps.shape == (3, min(shape[0], places), *shape[1:])
    for image, maps, values in zip(features.flatten(2).numpy(), components.maps, components.values, strict=True):
        matrix = image - image.mean(axis=1, keepdims=True) if centred else image
        _, expected, vectors = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(values, expected, atol=2e-8 * np.linalg.norm(image))
        firm = expected > 1e-3 * expected[0]
        np.testing.assert_allclose(values[firm], expected[firm], rtol=1e-10)
        aligned = np.abs((maps.flatten(1).numpy() * vectors).sum(axis=1))
        np.testing.assert_allclose(aligned[firm], expected[firm], rtol=1e-10)


def test_spectrum_is_the_singular_values() -> None:
    features = features_of((2, 30, 4, 4)).float()
    expected = np.linalg.svd(features.double().flatten(2).numpy(), compute_uv=False)
    values = decompose(features).values
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values, expected, rtol=1e-10)
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(300, 7, 7), (12, 9, 9)])
def test_components_beyond_the_rank_are_zero(rank: int, shape: tuple[int, int, int]) -> None:
    left, right = features_of((shape[0], rank), 1) + 0.1, features_of((rank, shape[1] * shape[2]), 2) + 0.1
    components = decompose((left @ right).reshape(1, *shape))
    assert (components.values[0, :rank] > 0).all()
    assert not components.values[0, rank:].any()
    assert not components.maps[0, rank:].any()


def test_a_value_well_above_rounding_is_kept_and_one_below_dropped() -> None:
    features = torch.zeros(1, 50, 4, 4, dtype=torch.float64)
    for channel, size in enumerate((1.0, 4 * LEAST_VALUE, LEAST_VALUE / 4)):
        features[0, channel, 0, channel] = size
    values = decompose(features).values[0]
    assert values[1] == pytest.approx(4 * LEAST_VALUE, rel=1e-2)
    assert not values[2:].any()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_have_nothing_when_centred(value: float, dtype: torch.dtype) -> None:
    features = (torch.linspace(0.3, 1, 64, dtype=dtype) * value)[None, :, None, None].expand(1, 64, 7, 7)
    components = decompose(features, centred=True)
    assert not components.maps.any() and not components.values.any()
    if value:
        assert (decompose(features).values[0] > 0).sum() == 1


def test_full_ranks_are_tensorlys_vectors_and_core() -> None:
    features = features_of((1, 60, 4, 5))
    image = features[0].numpy()
    core, factors = tensorly_tucker(image, rank=(20, 4, 5))
    left, singular, _ = np.linalg.svd(image.reshape(60, 20), full_matrices=False)
    cosines = np.abs((factors[0] * left).sum(axis=0))
    np.testing.assert_array_less(1 - 1e-10, cosines)
    components = tucker(features)
    np.testing.assert_allclose(np.linalg.norm(core.reshape(20, -1), axis=1), components.values[0], rtol=1e-10)
    np.testing.assert_allclose(singular, components.values[0], rtol=1e-10)
    projections = np.tensordot(factors[0], image, axes=(0, 0))
    np.testing.assert_allclose(np.abs(projections), components.maps[0].abs(), atol=1e-10 * singular[0])
    maps = components.maps[0].flatten(1)
    products = maps @ maps.T  # all-orthogonal, as the core's unfolding is
    torch.testing.assert_close(products, components.values[0].square().diag(), rtol=0, atol=1e-10 * singular[0] ** 2)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((200, 7, 7), (4, 3, 3)),
        ((200, 7, 7), (16, 4, 4)),
        ((200, 7, 7), (1, 1, 1)),
        ((10, 8, 6), (10, 4, 3)),
        ((64, 6, 6), (6, 2, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["relu", "blobs"])
def test_truncated_equals_tensorly_on_the_whole_tensor(
    shape: tuple[int, int, int], ranks: tuple[int, int, int], kind: str
) -> None:
    features = features_of((1, *shape)) if kind == "relu" else blobs(shape[0], shape[1], 0.02)[..., : shape[2]]
    image = features[0].numpy()
    core, factors = tensorly_tucker(image, rank=ranks, n_iter_max=40, tol=1e-9)
    components = tucker(features, ranks, n_iter_max=40, tol=1e-9)
    assert components.maps.shape == (1, ranks[0], *shape[1:])
    np.testing.assert_allclose(components.values[0], np.linalg.norm(core.reshape(ranks[0], -1), axis=1), rtol=1e-6)
    projections = np.tensordot(factors[0], image, axes=(0, 0))
    difference = np.abs(np.abs(projections) - components.maps[0].abs().numpy()).max()
    assert difference < 1e-6 * np.abs(projections).max()
    # What the decomposition explains of the tensor: |core|^2, for a tensor of the same norm.
    error = 1 - np.square(core).sum() / np.square(image).sum()
    assert 1 - float(components.values.square().sum()) / np.square(image).sum() == pytest.approx(error, abs=1e-6)


def test_truncation_changes_something_and_fewer_ranks_explain_less() -> None:
    features = blobs(100, 8, 0.3)
    explained = [float(tucker(features, ranks).values.square().sum()) for ranks in ((1, 1, 1), (2, 2, 2), "half", None)]
    assert explained == sorted(explained) and explained[0] < explained[-1]
    assert explained[-1] == pytest.approx(float(features.square().sum()))
    first, truncated = tucker(features).maps[0, 0].abs(), tucker(features, (1, 1, 1)).maps[0, 0].abs()
    cosine = float((first * truncated).sum() / first.norm() / truncated.norm())
    assert 0.9 < cosine < 1 - 1e-6


def test_truncated_twice_is_the_same() -> None:
    features = features_of((2, 50, 6, 6))
    once, again = tucker(features, "half"), tucker(features, "half")
    assert torch.equal(once.maps, again.maps) and torch.equal(once.values, again.values)


def test_the_callers_tensorly_backend_stays() -> None:
    try:
        with tensorly.backend_context("pytorch"):
            tucker(features_of((1, 20, 4, 4)), "half")
            assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")


def test_zeros_among_images_are_zeros() -> None:
    features = features_of((3, 30, 5, 5))
    features[1] = 0
    for ranks in (None, "half", (1, 1, 1)):
        components = tucker(features, ranks)
        assert not components.maps[1].any() and not components.values[1].any()
        assert components.maps[0].any() and components.maps[2].any()


def test_ranks_in_numbers() -> None:
    assert checked_ranks(None, (1, 2048, 7, 7)) == (49, 7, 7)
    assert checked_ranks(None, (1, 16, 7, 7)) == (16, 7, 7)
    assert checked_ranks("half", (1, 2048, 7, 7)) == (16, 4, 4)
    assert checked_ranks("half", (1, 3, 8, 6)) == (3, 4, 3)
    assert checked_ranks("half", (1, 5, 1, 1)) == (1, 1, 1)
    # Half of a long strip, or of a single channel, is more than the other two can fill.
    assert checked_ranks("half", (1, 1, 5, 3)) == (1, 2, 2)
    assert checked_ranks("half", (1, 2, 20, 1)) == (2, 2, 1)
    assert checked_ranks((3, 7, 7), (1, 2048, 7, 7)) == (3, 7, 7)


@pytest.mark.parametrize(
    "ranks",
    [
        *((50, 7, 7), (2048, 7, 7), (0, 3, 3), (4, 8, 3), (4, 3, 8), (-1, 2, 2), (10, 3, 3), (1, 2, 3)),
        *("quarter", (3, 3), (3.0, 3, 3), (True, 3, 3), (1, 2, 3, 4), 5),
    ],
)
def test_ranks_that_cannot_be_are_told(ranks: object) -> None:
    with pytest.raises(ConfigError, match=r"^ranks=") as caught:
        tucker(features_of((1, 64, 7, 7)), ranks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"n_iter_max": 0}, {"tol": 0.0}, {"tol": float("nan")}])
def test_options_that_cannot_be_are_told(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        tucker(features_of((1, 8, 3, 3)), "half", **options)


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(1, 3, 4, 4, dtype=torch.int64),
        torch.zeros(0, 3, 4, 4),
        torch.zeros(1, 3, 0, 4),
        torch.full((1, 3, 4, 4), float("nan")),
        torch.full((1, 3, 4, 4), float("inf")),
    ],
)
def test_bad_features_are_told(features: Tensor) -> None:
    for function in (decompose, tucker):
        with pytest.raises(DatasetError, match=r"^features"):
            function(features)


@given(seed=st.integers(0, 10_000), batch=st.integers(2, 5), ranks=st.sampled_from([None, "half", (2, 2, 1)]))
@settings(max_examples=12, deadline=None)
def test_images_do_not_see_each_other(seed: int, batch: int, ranks: object) -> None:
    features = features_of((batch, 12, 4, 3), seed) * torch.logspace(-3, 3, batch)[:, None, None, None]
    together = tucker(features, ranks)
    alone = [tucker(features[i : i + 1], ranks) for i in range(batch)]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    permuted = tucker(features[order], ranks)
    for i, single in enumerate(alone):
        scale = float(single.values[0, 0])
        torch.testing.assert_close(together.values[i], single.values[0], rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(together.maps[i, 0].abs(), single.maps[0, 0].abs(), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(permuted.values, together.values[order], rtol=1e-10, atol=0)


def test_truncated_vectors_that_carry_nothing_are_zero() -> None:
    """HOOI fills them with vectors of its own choice, which another basis of the channels would turn."""
    features = torch.zeros(1, 8, 4, 4, dtype=torch.float64)
    features[:, 0] = 3
    features[:, 1, :, :2] = 2
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    features[:, 5] = 0.5 * alternating[:, None] * alternating
    components = tucker(features, (4, 2, 2))
    carried = components.values > 0
    assert carried.any() and not carried.all()
    assert components.maps[~carried].abs().max() == 0 and components.maps[carried].flatten(1).norm(dim=1).min() > 0
    mixing = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    mixed = tucker(torch.einsum("ij,bjhw->bihw", mixing, features), (4, 2, 2))
    torch.testing.assert_close(mixed.maps.abs().sum(dim=1), components.maps.abs().sum(dim=1), rtol=1e-9, atol=1e-12)
