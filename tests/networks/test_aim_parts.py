"""Masks are drawn with the law of the sigmoid and carry its gradient, in full precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from medsd.networks.aim_parts import gumbel_mask, hard_mask

DRAWS = 400_000


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_a_position_is_open_with_the_probability_of_the_sigmoid(logit: float, temperature: float) -> None:
    mask = gumbel_mask(torch.full((DRAWS,), logit), temperature, noise=True, generator=draw())
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.002)


def test_the_law_is_that_of_the_two_logit_gumbel_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.stack((torch.full((DRAWS,), 0.7), torch.zeros(DRAWS)), dim=1)
    softmax = F.gumbel_softmax(logits, tau=1, hard=True, dim=1)[:, 0]
    mask = gumbel_mask(torch.full((DRAWS,), 0.7), 1.0, noise=True, generator=draw())
    assert float(mask.mean()) == pytest.approx(float(softmax.mean()), abs=0.003)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1 / 6), (5.0, 0.0485)])
def test_mean_gradient_at_0(temperature: float, expected: float) -> None:
    # With logistic noise the sigmoid at T = 1 is uniform: E s(1 - s) = 1/2 - 1/3.
    logits = torch.zeros(DRAWS, requires_grad=True)
    gumbel_mask(logits, temperature, noise=True, generator=draw()).sum().backward()
    assert float(logits.grad.mean()) == pytest.approx(expected, rel=0.01)


def test_gradient_without_noise_is_that_of_the_sigmoid() -> None:
    logits = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    gumbel_mask(logits, 2.0, noise=False).sum().backward()
    soft = torch.sigmoid(logits.detach() / 2)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 2)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.floats(0.1, 10))
def test_without_noise_the_value_is_the_threshold_exactly(values: list[float], temperature: float) -> None:
    logits = torch.tensor(values, requires_grad=True)
    expected = torch.tensor([float(value >= 0) for value in values])
    assert torch.equal(gumbel_mask(logits, temperature, noise=False), expected)
    assert torch.equal(hard_mask(logits), expected)
    assert not hard_mask(logits).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    logits = torch.linspace(-3, 3, 1000).to(dtype)
    full = logits.double() if dtype == torch.float64 else logits.float()
    expected = gumbel_mask(full, 1.0, noise=True, generator=draw(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = gumbel_mask(logits, 1.0, noise=True, generator=draw(5))
    assert mask.dtype == full.dtype
    assert torch.equal(mask, expected)


def test_noise_comes_from_the_given_generator_alone() -> None:
    logits, before = torch.zeros(1000), torch.get_rng_state()
    first, again = (gumbel_mask(logits, 1.0, noise=True, generator=draw(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, gumbel_mask(logits, 1.0, noise=True, generator=draw(8)))


def test_no_draw_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_options: torch.zeros(shape))
    logits = torch.zeros(3, requires_grad=True)
    mask = gumbel_mask(logits, 5.0, noise=True)
    mask.sum().backward()
    assert torch.equal(mask, torch.zeros(3))
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("noise", [True, False])
def test_nan_stays_nan(noise: bool) -> None:
    logits = torch.tensor([1.0, math.nan, -1.0])
    assert gumbel_mask(logits, 1.0, noise).isnan().tolist() == [False, True, False]
    assert hard_mask(logits).isnan().tolist() == [False, True, False]
