"""DeepLift's rules: ratios of changes for every way to call a nonlinearity, and for max pools that overlap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.saliency.rescale import Rescale

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.relu": torch.relu,
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "Tensor.relu_": lambda x: x.relu_(),
    "input by name": lambda x: F.relu(input=x),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.LeakyReLU": nn.LeakyReLU(0.2, inplace=True),
    "nn.PReLU": nn.PReLU().requires_grad_(False),
    "nn.ELU": nn.ELU(),
    "nn.GELU": nn.GELU(),
    "nn.SiLU": nn.SiLU(inplace=True),
    "nn.Mish": nn.Mish(),
    "nn.Sigmoid": nn.Sigmoid(),
    "nn.Tanh": nn.Tanh(),
    "nn.Softplus": nn.Softplus(),
    "nn.Hardswish": nn.Hardswish(inplace=True),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.Hardtanh": nn.Hardtanh(),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "abs": torch.abs,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_ratio_of_the_changes_stands_in_for_the_slope(name: str) -> None:
    function = FUNCTIONS[name]
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nn.Module.double(function) if isinstance(function, nn.Module) else None
    weight = torch.arange(1.0, 13, dtype=torch.float64).view(3, 4)
    before = x.clone().requires_grad_()
    with Rescale(3):
        given = before * 1  # the function may write to it
        after = function(given)
        kept = given if after is given else after
    expected = function(x.clone())
    assert torch.equal(after.detach(), expected)
    assert torch.equal(kept.detach(), expected)
    (gradient,) = torch.autograd.grad((weight * after[:3]).sum(), before)
    change = x[:3] - x[3:]
    torch.testing.assert_close(gradient[:3], weight * (expected[:3] - expected[3:]) / change, rtol=1e-12, atol=1e-12)
    assert (gradient[3:] == 0).all()


def test_in_place_functions_stay_in_place() -> None:
    x = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    with Rescale(1):
        given = x * 1
        nn.ReLU(inplace=True)(given)  # its return value is thrown away
    assert given.tolist() == [[0], [2]]
    assert torch.autograd.grad(given[0, 0], x)[0][0].item() == pytest.approx(2 / 3)


def test_what_is_no_batch_of_images_and_references_keeps_its_slope() -> None:
    x = torch.tensor([-1.0, 3.0], requires_grad=True)
    with Rescale(2):
        after = torch.relu(x)
    assert torch.autograd.grad(after.sum(), x)[0].tolist() == [0, 1]


def test_without_a_change_the_slope_stays() -> None:
    x = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]], requires_grad=True)
    with Rescale(1):
        after = torch.relu(x)
    assert torch.autograd.grad(after[0].sum(), x)[0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("name", ["nn.GELU", "nn.SiLU", "nn.Sigmoid", "nn.Hardswish", "nn.LeakyReLU"])
def test_a_small_change_has_a_ratio_and_no_rounding(name: str) -> None:
    """Of 1e-6 of the argument float32 keeps no digit of the quotient, which came out wrong by half."""
    torch.manual_seed(0)
    x, change = torch.rand(500) + 0.5, torch.logspace(-7, 0, 500)
    both = torch.stack([x + change, x])[:, None]

    exact = both.double()
    weight = torch.ones(1, 1, 500)
    expected = multipliers(FUNCTIONS[name], exact, weight)[0, 0]
    moved = (exact[0] - exact[1])[0] > 1e-5
    by_hand = (FUNCTIONS[name](exact[:1].clone()) - FUNCTIONS[name](exact[1:].clone()))[0, 0] / (exact[0] - exact[1])[0]
    torch.testing.assert_close(expected[moved], by_hand[moved], rtol=1e-9, atol=0)
    torch.testing.assert_close(multipliers(FUNCTIONS[name], both, weight)[0, 0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (nn.Hardshrink(0.5), 0.499, 0.501),
        (nn.Threshold(1.0, 0.0), 0.999, 1.001),
        (nn.ReLU6(), 5.99, 6.01),
        (nn.Hardswish(), 2.995, 3.005),
        (torch.sin, 99.76, 100.24),
    ],
)
def test_a_kink_or_a_jump_within_a_small_change_is_not_lost(
    function: Callable[[Tensor], Tensor], low: float, high: float
) -> None:
    both = torch.tensor([[[high]], [[low]]])
    (given,) = multipliers(function, both, torch.ones(1, 1, 1)).flatten() * (both[0] - both[1]).flatten()
    change = function(both[0].double()) - function(both[1].double())
    torch.testing.assert_close(given.double(), change.flatten()[0], rtol=1e-3, atol=1e-6)


def multipliers(function: Callable[[Tensor], Tensor], both: Tensor, weight: Tensor) -> Tensor:
    """Of the weighted sum of a function of images and references (2 B, ...), for the images."""
    given = both.clone().requires_grad_()
    with Rescale(len(both) // 2):
        after = function(given * 1)
    (gradient,) = torch.autograd.grad((weight * after[: len(both) // 2]).sum(), given)
    return gradient[: len(both) // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 20.0, -20.0, 104.0, -104.0, 300.0, 1000.0])
def test_a_softmax_whose_sides_lie_apart_loses_nothing(apart: float, dtype: torch.dtype) -> None:
    """From 104 on the lower side's powers are 0 in float32, and maps were not finite; near rows are as they were."""
    both = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    near = both.clone()
    both[:2, 1] += apart
    both[2:, 1, 2] -= torch.inf
    both[:2, 1, 2] -= torch.inf
    weight = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = multipliers(lambda x: x.softmax(-1), both.to(dtype), weight.to(dtype)).double()
    shares = both.softmax(-1)
    expected = (weight * (shares[:2] - shares[2:])).sum(dim=-1)
    change = torch.where(both[:2].isfinite(), both[:2] - both[2:], 0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    grown = 2e-3 if 0 < abs(apart) < 36 and dtype == torch.float64 else tolerance  # powers differ by exp(20)
    torch.testing.assert_close((found * change).sum(dim=-1), expected, rtol=0, atol=grown)
    alone = multipliers(lambda x: x.softmax(-1), near.to(dtype), weight.to(dtype)).double()
    torch.testing.assert_close(found[:, [0, 2]], alone[:, [0, 2]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", ["is_causal", "enable_gqa"])
def test_attention_without_a_rule_keeps_its_gradient(option: str) -> None:
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    gradients = []
    for block in (nullcontext(), Rescale(1)):
        with block:
            after = F.scaled_dot_product_attention(x, x * 2, x + 1, **{option: True})
        gradients += torch.autograd.grad(after[0].square().sum(), x)
    torch.testing.assert_close(*gradients)


def test_a_mask_of_attention_may_be_an_activation() -> None:
    """SAM's depends on the query; Swin's is one for each window of the batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64, generator=generator)
    masks = {
        "of the query": lambda q: q.tanh()[..., :5],
        "of each": lambda q: torch.arange(100.0, dtype=torch.float64).view(2, 2, 5, 5).sin().repeat(2, 1, 1, 1),
        "bool of each": lambda q: (torch.arange(100).view(2, 2, 5, 5) % 7 > 1).repeat(2, 1, 1, 1),
        "one": lambda q: torch.arange(25.0, dtype=torch.float64).view(1, 1, 5, 5).cos(),
    }
    for name, mask in masks.items():
        for named in (True, False):

            def attend(x: Tensor, mask: Callable[[Tensor], Tensor] = mask, named: bool = named) -> Tensor:
                given = mask(x)
                if named:
                    return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=given)
                return F.scaled_dot_product_attention(x, x * 2, x + 1, given)

            weight = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=generator)
            found = multipliers(attend, x, weight)
            after = attend(x)
            expected = (weight * (after[:2] - after[2:])).sum(dim=(1, 2, 3))
            sums = (found * (x[:2] - x[2:])).sum(dim=(1, 2, 3))
            torch.testing.assert_close(
                sums, expected, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_what_is_no_batch_of_images_and_baselines_keeps_its_gradient() -> None:
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    with Rescale(1):
        after = torch.relu(x)
        without_graph = torch.relu(x.detach())
    assert torch.autograd.grad(after.sum(), x)[0].tolist() == [0, 1, 1]
    assert not without_graph.requires_grad
    assert type(torch.relu(x).grad_fn).__name__ == "ReluBackward0"  # outside nothing is changed


def test_overlapping_windows_add_up_by_hand() -> None:
    """A 9 that wins two windows of a pool of 4 in steps of 2 takes the change of both."""
    x = torch.zeros(2, 1, 4, 8)
    x[0, 0, 0] = torch.tensor([0.0, 0, 9, 0, 0, 0, 1, 0])
    x.requires_grad_()
    with Rescale(1):
        after = F.max_pool2d(x, (4, 4), stride=2)
    assert after[0].flatten().tolist() == [9, 9, 1]
    (gradient,) = torch.autograd.grad(after[0].sum(), x)
    assert (gradient[0] * x[0].detach()).sum() == 9 + 9 + 1
    assert gradient[0, 0, 0].tolist() == [0, 0, 2, 0, 0, 0, 1, 0]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    kernel=st.integers(2, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    ceil_mode=st.booleans(),
    steps=st.sampled_from([1, 3]),
)
def test_max_pools_lose_nothing(seed: int, kernel: int, stride: int, padding: int, ceil_mode: bool, steps: int) -> None:
    """Attributions sum to each image's own change; with ties too (`steps` of 1 rounds to whole numbers)."""
    x = torch.randn(4, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (x.mul(steps).round() / steps).requires_grad_()
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
    with Rescale(2):
        after = pool(x)
    assert torch.equal(after, pool(x.detach()))
    weight = torch.randn(after[:2].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((weight * after[:2]).sum(), x)
    total = (gradient[:2] * (x[:2] - x[2:])).sum(dim=(1, 2, 3))
    expected = (weight * (after[:2] - after[2:])).sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)


def test_indices_come_along() -> None:
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    expected = F.max_pool2d(x.detach(), 2, return_indices=True)
    with Rescale(1):
        after, places = F.max_pool2d(x, 2, return_indices=True)
        again = torch.max_pool2d(x, 2)
    assert torch.equal(after, expected[0])
    assert torch.equal(places, expected[1])
    assert torch.equal(again, expected[0])
