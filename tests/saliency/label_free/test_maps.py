"""Label-free maps: tensors whose answers are known, the released EigenCAM, and what must not change them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.label_free.decomposition import decompose
from medsd.saliency.label_free.maps import channel_energy, eigencam, mean_map, mtsm, multivec_eigencam, tsm

MapFunction = Callable[[Tensor], Tensor]

TUCKER: dict[str, MapFunction] = {
    "tsm": tsm,
    "tsm half": partial(tsm, ranks="half"),
    "tsm 1 1 1": partial(tsm, ranks=(1, 1, 1)),
    "mtsm a": mtsm,
    "mtsm b": partial(mtsm, weights="b"),
    "mtsm c": partial(mtsm, weights="c"),
    "mtsm half": partial(mtsm, ranks="half"),
}
DECOMPOSED: dict[str, MapFunction] = {
    **TUCKER,
    "eigencam": eigencam,
    "multivec": multivec_eigencam,
    "multivec c": partial(multivec_eigencam, weights="c"),
    "multivec uncentred": partial(multivec_eigencam, centred=False),
}
ALL: dict[str, MapFunction] = {
    **DECOMPOSED,
    "reference": partial(eigencam, variant="reference"),
    "mean": mean_map,
    "energy": channel_energy,
}


def features_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.relu(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def norm(maps: Tensor) -> Tensor:
    """Each map to 0 .. 1 exactly."""
    flat = maps.double().flatten(1)
    least, greatest = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    return ((flat - least) / (greatest - least)).reshape(maps.shape)


def two_blobs() -> Tensor:
    """Two squares of 3 x 3 on 8 x 8 with orthogonal unit channel vectors, amplitudes 3 and 2: s = (9, 6)."""
    features = torch.zeros(1, 20, 8, 8, dtype=torch.float64)
    features[0, :10, 1:4, 1:4] = 3 / 10**0.5
    features[0, 10:, 4:7, 5:8] = 2 / 10**0.5
    return features


@pytest.mark.parametrize(
    ("name", "second"), [("tsm", 0), ("mtsm a", 4 / 9), ("mtsm b", 2 / 3), ("mtsm c", 2 / 3), ("mean", 2 / 3)]
)
def test_two_blobs_tell_the_weightings_apart(name: str, second: float) -> None:
    features = two_blobs()
    torch.testing.assert_close(
        decompose(features).values[0, :3], torch.tensor([9.0, 6, 0]).double(), rtol=0, atol=1e-10
    )
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[1:4, 1:4], expected[4:7, 5:8] = 1, second
    # Weights c normalise inside, with the small constant of the released code.
    atol = 1e-6 if name == "mtsm c" else 1e-12
    torch.testing.assert_close(norm(ALL[name](features))[0], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("weights", "first"), [("a", 9 * 9 / 3 / 20), ("b", 9 / 3 / 20), ("c", 9)])
def test_two_blobs_before_normalising(weights: str, first: float) -> None:
    assert mtsm(two_blobs(), weights=weights)[0, 2, 2] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_rank_one_is_its_blob(name: str) -> None:
    rows = torch.arange(7, dtype=torch.float64)
    blob = torch.exp(-((rows[:, None] - 2) ** 2) / 4 - (rows[None] - 4) ** 2 / 3)
    channels = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = ALL[name]((channels[:, None, None] * blob)[None])
    if name in ("reference", "energy") or name.startswith("multivec"):
        centred = blob - blob.mean()
        expected = {"reference": centred, "energy": blob**2, "multivec uncentred": blob}.get(name, centred.abs())
        correlation = np.corrcoef(value[0].flatten(), expected.flatten())[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-6)
        assert name == "reference" or correlation > 0  # LAPACK's sign may be either
    else:
        atol = 1e-6 if name == "mtsm c" else 1e-12
        torch.testing.assert_close(norm(value)[0], norm(blob[None])[0], rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64, 7, 7), (5, 9, 8)])
def test_all_maps_together_hold_the_channel_energy(shape: tuple[int, int, int]) -> None:
    features = features_of((2, *shape)) + 0.1
    image = features[0].flatten(1).numpy()
    left, values, right = np.linalg.svd(image, full_matrices=False)
    each = np.abs(left.T @ image) / shape[0]  # m_j by the definition
    np.testing.assert_allclose(each, values[:, None] * np.abs(right) / shape[0], atol=1e-13 * values[0])
    energy = channel_energy(features)[0].flatten().numpy()
    np.testing.assert_allclose(shape[0] ** 2 * np.square(each).sum(axis=0), energy, rtol=1e-12)
    np.testing.assert_allclose(tsm(features)[0].flatten(), each[0], rtol=1e-10)
    np.testing.assert_allclose(mtsm(features)[0].flatten(), values @ each, rtol=1e-10)
    np.testing.assert_allclose(mtsm(features, weights="b")[0].flatten(), each.sum(axis=0), rtol=1e-10)
    ranged = [(m - m.min()) / np.ptp(m) for m in each]
    np.testing.assert_allclose(mtsm(features, weights="c")[0].flatten(), values @ ranged, rtol=1e-5)


def test_full_ranks_are_the_matrix_methods() -> None:
    features = features_of((3, 40, 5, 5))
    for weights in ("a", "b", "c"):
        torch.testing.assert_close(
            mtsm(features, weights=weights), multivec_eigencam(features, centred=False, weights=weights)
        )
    centred = features - features.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(multivec_eigencam(features), mtsm(centred), rtol=1e-10, atol=0)
    torch.testing.assert_close(eigencam(features).abs() / 40, tsm(centred), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DECOMPOSED)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_unit_order_and_mixing_of_channels_do_not_matter(name: str, seed: int) -> None:
    features, function = features_of((1, 24, 4, 4), seed), DECOMPOSED[name]
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    expected = norm(function(features))
    for changed in (
        features * 1e3,
        features * 1e-3,
        features[:, torch.randperm(24, generator=generator)],
        torch.einsum("dc,bchw->bdhw", rotation, features),
    ):
        torch.testing.assert_close(norm(function(changed)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ALL if name != "reference"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_flips_commute_and_images_stay_apart(name: str, seed: int) -> None:
    features, function = features_of((3, 18, 4, 5), seed) * torch.tensor([1, 1e-2, 1e3])[:, None, None, None], ALL[name]
    maps = function(features)
    scale = maps.abs().amax(dim=(1, 2), keepdim=True)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    for axis in (-1, -2):
        close(function(features.flip(axis)).flip(axis) / scale, maps / scale)
    if "half" not in name and "1 1 1" not in name:  # truncated, rows are fitted before columns
        close(function(features.mT).mT / scale, maps / scale)
    close(torch.cat([function(image[None]) for image in features]) / scale, maps / scale)
    close(function(features[[2, 0, 1]])[[1, 2, 0]] / scale, maps / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(512, 4, 4), (256, 7, 7), (64, 7, 7), (49, 7, 7), (60, 8, 8), (3, 10, 9), (9, 1, 3), (4, 1, 1)]
)
def test_reference_equals_the_released_code_with_its_sign(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    plain = torch.randn(6, *shape, generator=generator).to(dtype)
    blob = torch.outer(torch.arange(shape[1]) == shape[1] // 2, torch.arange(shape[2]) == shape[2] // 2)
    structured = torch.rand(6, shape[0], 1, 1, generator=generator).to(dtype) * blob + 0.01 * plain.relu()
    features = torch.cat([plain, plain.relu(), structured])
    expected = get_2d_projection(features.numpy().copy())
    value = eigencam(features, variant="reference")
    assert value.dtype == torch.float32
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert (np.abs(value.numpy() - expected) <= 1e-5 * scale).all()
    ours, values = eigencam(features).numpy(), decompose(features, centred=True).values
    sign = np.sign((ours * expected).sum(axis=(1, 2), keepdims=True))
    firm = (values[:, 0] > 1.02 * values[:, 1:2].sum(dim=1)).numpy()  # in float32 the others turn
    assert (np.abs(sign * expected - ours) <= 1e-4 * scale)[firm].all()
    assert firm.any() or shape[1:] == (1, 1)


def test_fixed_sign_puts_the_active_place_above() -> None:
    rows = torch.arange(7, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    features, centres = [], []
    for _ in range(40):
        row, column = (int(torch.randint(7, (), generator=generator)) for _ in range(2))
        blob = torch.exp(-((rows[:, None] - row) ** 2 + (rows[None] - column) ** 2) / 3)
        strength = torch.rand(100, 1, 1, generator=generator)
        features.append(strength * blob + 0.05 * torch.rand(100, 7, 7, generator=generator))
        centres.append(row * 7 + column)
    maps = eigencam(torch.stack(features))
    assert maps.flatten(1).argmax(dim=1).tolist() == centres
    torch.testing.assert_close(eigencam(-torch.stack(features)), maps)  # features of either sign


@pytest.mark.parametrize("name", ALL)
def test_maps_of_nothing_are_defined(name: str) -> None:
    assert not ALL[name](torch.zeros(2, 30, 5, 5)).any()
    constant = torch.linspace(0.1, 1, 30)[None, :, None, None].expand(1, 30, 4, 4)
    value = ALL[name](constant)
    assert torch.isfinite(value).all()
    assert float(value.max() - value.min()) <= 1e-6  # no structure; to rounding in the features' precision
    if name in ("eigencam", "multivec", "mtsm c"):
        assert not value.any()
    assert torch.isfinite(ALL[name](torch.rand(1, 6, 1, 1))).all()


@pytest.mark.parametrize("name", ALL)
def test_computes_in_float64_without_a_graph(name: str) -> None:
    features = features_of((2, 30, 5, 5)).requires_grad_()
    value = ALL[name](features)
    assert value.shape == (2, 5, 5) and not value.requires_grad
    assert value.dtype == (torch.float32 if name == "reference" else torch.float64)
    halves = features.detach().half()
    torch.testing.assert_close(ALL[name](halves), ALL[name](halves.float()))


def test_signed_maps_have_both_signs_and_magnitudes_do_not() -> None:
    features = torch.randn(1, 30, 5, 5, generator=torch.Generator().manual_seed(0))
    for name, function in ALL.items():
        assert (function(features).min() < 0) == (name in ("eigencam", "reference", "mean")), name


@pytest.mark.parametrize("function", [eigencam, tsm])
def test_a_small_gap_is_logged(function: MapFunction, caplog: pytest.LogCaptureFixture) -> None:
    wave = torch.cos(torch.pi * (torch.arange(8) + 0.5) / 8)  # of mean 0
    features = torch.zeros(3, 2, 8, 8)
    features[:, 0], features[:, 1] = wave, wave[:, None]  # one along x, one along y: orthogonal, equally strong
    features[:, 0] *= torch.tensor([1.0, 1.04, 1.06])[:, None, None]
    with caplog.at_level(logging.WARNING):
        function(features[2:])
        assert not caplog.records
        function(features)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["2 of 3 images"]


def test_options_that_do_not_exist_are_told() -> None:
    features = features_of((1, 8, 3, 3))
    with pytest.raises(ConfigError, match="centred='no': must be true or false"):
        multivec_eigencam(features, centred="no")
    with pytest.raises(ConfigError, match="variant='fixed'"):
        eigencam(features, variant="fixed")
    for function in (mtsm, multivec_eigencam):
        with pytest.raises(ConfigError, match="weights='d'"):
            function(features, weights="d")


@pytest.mark.parametrize("name", ALL)
def test_bad_features_are_told(name: str) -> None:
    for features in (torch.zeros(3, 4, 4), torch.full((1, 3, 4, 4), float("nan")), torch.zeros(0, 3, 4, 4)):
        with pytest.raises(DatasetError, match=r"^features"):
            ALL[name](features)
