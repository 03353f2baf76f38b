"""The modes of decorrelation: known values, analytic gradients, invariances, groups, precision."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import ConfigError, TrainingError
from medsd.evaluate.features import feature_health
from medsd.objectives.decorrelation import Mode, decorrelation_loss, default_group_size

MODES: tuple[Mode, ...] = ("cov", "zca", "corr")


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
    (gradient,) = torch.autograd.grad(decorrelation_loss(f), f)
    centred = f.detach() - f.detach().mean(dim=0)
    covariance = torch.cov(centred.T).reshape(dim, dim)
    expected = 4 / ((batch - 1) * dim) * centred @ (covariance - torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["cov", "corr"])
def test_gradcheck(mode: Mode) -> None:
    f = (features(5, 4) / 2).requires_grad_()
    assert float(f.detach().var(dim=0).min()) < 1  # the hinge takes part
    assert torch.autograd.gradcheck(lambda f: decorrelation_loss(f, mode), f)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 12), dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_zca_by_scipy_its_target_taking_no_gradient(batch: int, dim: int, seed: int) -> None:
    f = features(batch, dim, seed).requires_grad_()
    loss = decorrelation_loss(f, "zca", eps=1e-2)
    (gradient,) = torch.autograd.grad(loss, f)
    values = f.detach().numpy()
    centred = values - values.mean(axis=0)
    covariance = np.cov(values.T).reshape(dim, dim) + 1e-2 * np.eye(dim)
    distance = centred - centred @ np.linalg.inv(scipy.linalg.sqrtm(covariance))
    assert float(loss.detach()) == pytest.approx((distance**2).mean(), rel=1e-9)
    np.testing.assert_allclose(gradient, 2 / (batch * dim) * distance, rtol=1e-8, atol=1e-10)


def test_corr_by_numpy() -> None:
    f = features(30, 5) / 3
    scales = np.sqrt(np.diag(np.cov(f.numpy().T)))
    correlation = np.corrcoef(f.numpy().T)
    expected = ((correlation**2).sum() - 5) / 20 + 0.1 * np.maximum(1 - scales, 0).mean()
    assert float(decorrelation_loss(f, "corr")) == pytest.approx(expected, abs=1e-3)  # its epsilons take that


def test_zca_vanishes_for_whitened_features_as_eps_does() -> None:
    f = whitened(32, 8)
    assert float(decorrelation_loss(f, "zca", eps=1e-3)) == pytest.approx(31 / 32 * (1 - 1.001**-0.5) ** 2)
    assert float(decorrelation_loss(f, "zca", eps=1e-9)) < 1e-16


def test_corr_of_whitened_and_of_identical_channels() -> None:
    assert float(decorrelation_loss(whitened(32, 8), "corr")) < 1e-24
    twice = whitened(32, 1).repeat(1, 2)
    assert float(decorrelation_loss(twice, "corr")) == pytest.approx(1, abs=1e-4)
    assert float(decorrelation_loss(-twice * torch.tensor([1.0, -3.0]), "corr")) == pytest.approx(1, abs=1e-4)
    dead = torch.full((32, 2), 3.0, dtype=torch.float64)
    assert float(decorrelation_loss(dead, "corr")) == pytest.approx(0.1 * 0.99)


def test_value_by_numpy_like_definition() -> None:
    f = features(9, 4)
    total = 0.0
    for i in range(4):
        for j in range(4):
            a, b = f[:, i] - f[:, i].mean(), f[:, j] - f[:, j].mean()
            total += float((a * b).sum() / 8 - float(i == j)) ** 2
    assert float(decorrelation_loss(f)) == pytest.approx(total / 4, rel=1e-12)


def test_zero_for_whitened_features_and_one_for_dead_ones() -> None:
    assert float(decorrelation_loss(whitened(32, 8))) < 1e-24
    assert float(decorrelation_loss(torch.full((32, 8), 3.0, dtype=torch.float64))) == pytest.approx(1)


def test_floor_when_the_batch_is_smaller_than_the_features() -> None:
    batch, dim = 8, 24
    assert float(decorrelation_loss(whitened(dim + 1, batch - 1).T[:, :dim])) > 0  # any features are above the floor
    # The best that rank B - 1 can do: B - 1 unit directions among d.
    directions = torch.linalg.qr(features(dim, batch - 1)).Q.T
    best = whitened(batch, batch - 1) @ directions
    floor = (dim - batch + 1) / dim
    assert float(decorrelation_loss(best)) == pytest.approx(floor, rel=1e-12)
    for seed in range(5):
        assert float(decorrelation_loss(features(batch, dim, seed))) > floor


@settings(max_examples=25, deadline=None)
@given(mode=st.sampled_from(MODES), seed=st.integers(0, 1000), offset=st.floats(-50, 50))
def test_invariances(mode: Mode, seed: int, offset: float) -> None:
    f = features(10, 6, seed)
    value = decorrelation_loss(f, mode)
    generator = torch.Generator().manual_seed(seed)
    samples, channels = torch.randperm(10, generator=generator), torch.randperm(6, generator=generator)
    for same in (f + offset * torch.arange(6), f[samples], f[:, channels], -f):
        torch.testing.assert_close(decorrelation_loss(same, mode), value, rtol=1e-9, atol=1e-12)
    grouped = decorrelation_loss(f, mode, 2, torch.Generator().manual_seed(seed))
    moved = (f + offset)[samples]
    again = decorrelation_loss(moved, mode, 2, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(again, grouped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["cov", "zca"])
def test_rotation_leaves_it_and_scale_does_not(mode: Mode) -> None:
    f = features(10, 6)
    value = decorrelation_loss(f, mode)
    rotation = torch.linalg.qr(features(6, 6, 5)).Q
    torch.testing.assert_close(decorrelation_loss(f @ rotation, mode), value, rtol=1e-9, atol=0)
    assert not torch.isclose(decorrelation_loss(2 * f, mode), value, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1, 100), min_size=6, max_size=6), st.integers(0, 1000))
def test_corr_is_free_of_scale_above_the_hinge(scales: list[float], seed: int) -> None:
    f = whitened(20, 6) @ (torch.eye(6) * 20 + features(6, 6, seed)).double()
    value = decorrelation_loss(f, "corr")
    assert float(value) > 1e-3
    scaled = decorrelation_loss(f * torch.tensor(scales), "corr")
    torch.testing.assert_close(scaled, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("group_size", "sizes"), [(2, [2, 2, 2, 1]), (3, [3, 2, 2]), (6, [4, 3]), (7, [7])])
def test_groups_are_averaged(mode: Mode, group_size: int, sizes: list[int]) -> None:
    f = features(10, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    parts = [decorrelation_loss(f[:, group], mode) for group in order.split(sizes)]
    loss = decorrelation_loss(f, mode, group_size, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, torch.stack(parts).mean(), rtol=1e-9, atol=0)


def test_groups_are_drawn_anew_until_every_pair_has_met() -> None:
    """Two identical channels among independent ones cost nothing but where they meet."""
    f = whitened(40, 8)
    f[:, 7] = f[:, 2]
    generator = torch.Generator().manual_seed(0)
    losses = [float(decorrelation_loss(f, "corr", 2, generator)) for _ in range(200)]
    met = sum(loss > 0.1 for loss in losses)
    assert met / 200 == pytest.approx(1 / 7, abs=0.07)
    assert sum(losses) / met == pytest.approx(1 / 4, abs=1e-3)


def test_draws_follow_the_generator_alone() -> None:
    f = features(10, 7)
    state = torch.get_rng_state()
    first, second = (decorrelation_loss(f, "cov", 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    decorrelation_loss(f, "cov", generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("batch", "dim", "expected"), [(64, 512, 32), (65, 512, 32), (1024, 512, None), (1023, 512, 511), (3, 8, 2)]
)
def test_default_group_size(batch: int, dim: int, expected: int | None) -> None:
    assert default_group_size(batch, dim) == expected


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(2, 300), dim=st.integers(2, 300))
def test_default_groups_follow_the_rule_of_thumb(batch: int, dim: int) -> None:
    size = default_group_size(batch, dim)
    assert size is None or 2 <= size <= dim
    assert (size or dim) <= max(2, batch / 2)
    if batch % 2 == 0 and batch >= 4:
        assert -(-dim // (size or dim)) == -(-2 * dim // batch)


@pytest.mark.parametrize(("mode", "group_size"), [("cov", None), ("zca", None), ("zca", 8), ("corr", None)])
def test_minimising_it_widens_the_features(mode: Mode, group_size: int | None) -> None:
    """ReLU features of a small network end less correlated, of a higher rank, and alive."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 16, generator=generator)
    weights = (torch.randn(16, 16, generator=generator) / 4).requires_grad_()
    bias = torch.zeros(16, requires_grad=True)
    optimiser = torch.optim.Adam([weights, bias], lr=0.02)

    def relu_features() -> torch.Tensor:
        return (x @ (torch.ones(16, 16) / 16 + weights) + bias).relu()

    before = feature_health(relu_features())
    for _ in range(150):
        optimiser.zero_grad()
        decorrelation_loss(relu_features(), mode, group_size, generator).backward()
        optimiser.step()
    after = feature_health(relu_features())
    assert after.mean_abs_correlation < before.mean_abs_correlation / 2
    assert after.effective_rank > before.effective_rank + 1
    assert after.dead_channels == 0


@pytest.mark.parametrize(("mode", "hint"), [("zac", "; did you mean 'zca'?"), ("layer", "")])
def test_unknown_mode_in_words(mode: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decorrelation_loss(features(4, 4), mode)  # type: ignore[arg-type]
    assert str(caught.value) == f"mode='{mode}': use one of cov, zca, corr{hint}"


def test_impossible_groups_and_eps_in_words() -> None:
    for group_size in (0, 1, 5):
        with pytest.raises(ConfigError, match=f"group_size={group_size}: must lie in 2 to 4"):
            decorrelation_loss(features(6, 4), "cov", group_size)
    with pytest.raises(ConfigError, match="eps=0: must be a number above 0"):
        decorrelation_loss(features(6, 4), "zca", eps=0)


def test_features_that_are_not_finite() -> None:
    f = features(6, 4)
    f[2, 1] = torch.nan
    assert decorrelation_loss(f, "cov").isnan() and decorrelation_loss(f, "corr").isnan()
    with pytest.raises(TrainingError, match=r"features: .* lower the learning rate"):
        decorrelation_loss(f, "zca")


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_one_sample_is_refused_in_words(batch: int, mode: Mode) -> None:
    with pytest.raises(TrainingError, match=f"batch_size={batch} at once: .* raise batch_size") as caught:
        decorrelation_loss(torch.zeros(batch, 4), mode)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    f = (features(64, 16) * 20).to(dtype)  # covariances of some thousands: squares overflow float16
    value = decorrelation_loss(f)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), decorrelation_loss(f.double()), rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decorrelation_loss(f), value)


def test_autocast_does_not_lower_the_precision() -> None:
    f = features(64, 16)
    for mode in MODES:
        for g in (f, f.float()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = decorrelation_loss(g, mode)
            assert inside.dtype == g.dtype
            assert torch.equal(inside, decorrelation_loss(g, mode))
