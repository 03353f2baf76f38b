"""Whitening of Med-MoCo: shuffled ZCA, IterNorm against its own spectrum, and the plain encoder that leaves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError, TrainingError
from medsd.networks.whitening import inverse_root, newton_inverse_root
from medsd.pretrain.whitening import IterNorm, ShuffledWhitening, put_iter_norm, without_iter_norm


def features(samples: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated, off centre, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(samples, dim, dtype=torch.float64, generator=generator)
    return draw @ torch.randn(dim, dim, dtype=torch.float64, generator=generator) / 3 + 2


def plain_newton(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """The released loop."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    scaled = covariance + eps * identity
    trace = scaled.trace()
    p = identity
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ (scaled / trace)
    return p / trace.sqrt()


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 8), iterations=st.integers(1, 7), seed=st.integers(0, 100))
def test_coupled_and_plain_newton_are_one_polynomial(dim: int, iterations: int, seed: int) -> None:
    covariance = torch.cov(features(20, dim, seed).T).reshape(dim, dim)
    found = newton_inverse_root(covariance, 1e-3, iterations)
    torch.testing.assert_close(found, plain_newton(covariance, 1e-3, iterations), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_newton_comes_to_the_root_in_single_precision(spread: float) -> None:
    values = torch.logspace(0, -float(np.log10(spread)), 64, dtype=torch.float64)
    basis = torch.linalg.qr(features(64, 64))[0]
    covariance = (basis * values) @ basis.T
    exact = inverse_root(covariance, 1e-9)
    found = newton_inverse_root(covariance.float(), 1e-9, 20).double()
    assert float((found - exact).norm() / exact.norm()) < 2e-2
    plain = plain_newton(covariance.float(), 1e-9, 20).double()
    assert not float((plain - exact).norm() / exact.norm()) < 1


def test_newton_takes_matrices_in_a_batch_and_its_gradient_is_right() -> None:
    stack = torch.stack([torch.cov(features(9, 4, seed).T) for seed in range(3)])
    one_by_one = torch.stack([newton_inverse_root(one, 1e-2, 5) for one in stack])
    torch.testing.assert_close(newton_inverse_root(stack, 1e-2, 5), one_by_one)
    assert torch.autograd.gradcheck(lambda s: newton_inverse_root(s, 1e-2, 5), stack[0].requires_grad_())
    with pytest.raises(ConfigError, match="iterations=0"):
        newton_inverse_root(stack, 1e-2, 0)


@pytest.mark.parametrize(("dim", "left"), [(16, 0.97), (64, 0.59), (512, 0.11), (2048, 0.028)])
def test_five_iterations_whiten_less_the_more_channels(dim: int, left: float) -> None:
    """White input: all directions share the variance evenly, r = 1 / d."""
    p = 1.0
    for _ in range(5):
        p = 1.5 * p - 0.5 * p**3 / dim
    assert p**2 / dim == pytest.approx(left, abs=0.006)
    if dim <= 64:
        root = newton_inverse_root(torch.eye(dim, dtype=torch.float64), 1e-12, 5)
        torch.testing.assert_close(root @ root, torch.eye(dim, dtype=torch.float64) * p**2 / dim)


def test_zca_on_a_map_leaves_l_over_l_plus_eps() -> None:
    maps = features(5 * 6 * 7, 8).view(5, 6, 7, 8).movedim(-1, 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whitened = ShuffledWhitening(8, 1e-2)(maps, order)
    assert whitened.shape == maps.shape
    before, after = (torch.cov(each.movedim(1, -1).flatten(0, 2).T) for each in (maps, whitened))
    values = torch.linalg.eigvalsh(before)
    torch.testing.assert_close(torch.linalg.eigvalsh(after), values / (values + 1e-2), rtol=0, atol=1e-9)
    # ZCA does not turn: the order of channels does not matter where all are one group.
    torch.testing.assert_close(whitened, ShuffledWhitening(8, 1e-2)(maps, torch.arange(8)))


def test_groups_are_the_neighbours_of_the_order() -> None:
    pooled, order = features(30, 7), torch.tensor([4, 0, 6, 2, 1, 5, 3])
    whitened = ShuffledWhitening(3, 1e-3)(pooled, order)
    covariance = torch.cov(whitened.T)
    for group in ([4, 0, 6], [2, 1], [5, 3]):  # even sizes
        own = covariance[group][:, group]
        assert float((own - torch.eye(len(group))).abs().max()) < 0.05
    assert float(covariance[0, 1].abs()) > 1e-3
    assert ShuffledWhitening(64)(pooled, order).shape == (30, 7)  # all channels where there are fewer


def test_gradcheck_of_shuffled_whitening() -> None:
    order = torch.tensor([3, 1, 0, 2])
    whitening = ShuffledWhitening(2, 1e-2)
    assert torch.autograd.gradcheck(lambda x: whitening(x, order), features(6, 4).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: whitening(x, order), features(8, 4).view(2, 2, 2, 4).movedim(-1, 1).requires_grad_()
    )


def test_half_precision_is_whitened_in_single() -> None:
    maps = torch.randn(4, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = ShuffledWhitening(4)(maps.bfloat16(), torch.arange(8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ShuffledWhitening(4)(maps.bfloat16().float(), torch.arange(8)))


def test_a_batch_smaller_than_a_group_in_words() -> None:
    with pytest.raises(
        TrainingError, match=r"group_size=8: a batch gives 6 samples .*; raise pretrain_batch_size, or lower acc"
    ) as caught:
        ShuffledWhitening(8)(features(6, 16), torch.arange(16))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="group_size=1"):
        ShuffledWhitening(1)
    with pytest.raises(ConfigError, match="eps=0"):
        ShuffledWhitening(eps=0)


def layer_with_affine(dim: int, momentum: float = 1.0) -> IterNorm:
    layer = IterNorm(dim, momentum=momentum).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, dim))
        layer.bias.copy_(torch.linspace(-1, 1, dim))
    return layer


def test_iter_norm_leaves_each_direction_what_newton_says() -> None:
    maps = features(4 * 5 * 5, 6).view(4, 5, 5, 6).movedim(-1, 1)
    flat = maps.movedim(1, -1).flatten(0, 2)
    covariance = torch.cov(flat.T, correction=0)
    found = IterNorm(6, eps=1e-5).double()(maps).movedim(1, -1).flatten(0, 2)
    values, vectors = torch.linalg.eigh(covariance)
    share = (values + 1e-5) / (values + 1e-5).sum()
    p = torch.ones(6, dtype=torch.float64)
    for _ in range(5):
        p = 1.5 * p - 0.5 * p**3 * share
    expected = p**2 * values / (values + 1e-5).sum()
    left = (vectors.T @ torch.cov(found.T, correction=0) @ vectors).diagonal()
    torch.testing.assert_close(left, expected, rtol=1e-9, atol=1e-12)


def test_iter_norm_in_eval_mode_is_its_last_batch_and_a_convolution() -> None:
    maps = features(3 * 4 * 4, 5).view(3, 4, 4, 5).movedim(-1, 1)
    layer = layer_with_affine(5)
    trained = layer(maps)
    variance = trained.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(layer.weight.square() * layer.running_variance, variance)
    layer.eval()
    torch.testing.assert_close(layer(maps), trained, rtol=0, atol=1e-9)
    torch.testing.assert_close(nn.functional.conv2d(maps, *layer.as_convolution()), trained, rtol=0, atol=1e-9)


def test_iter_norm_averages_its_first_batches_evenly() -> None:
    layer = layer_with_affine(4, momentum=0.1)
    batches = [features(40, 4, seed).view(10, 2, 2, 4).movedim(-1, 1) for seed in range(4)]
    for batch in batches:
        layer(batch)
    mean = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    torch.testing.assert_close(layer.running_mean, mean)


def test_gradcheck_of_iter_norm() -> None:
    layer = layer_with_affine(3)
    maps = features(2 * 2 * 2, 3).view(2, 2, 2, 3).movedim(-1, 1).requires_grad_()
    assert torch.autograd.gradcheck(layer, maps)


@pytest.mark.parametrize(("name", "layer"), [("test_resnet", "layer4.0.bn2"), ("resnet18", "layer4.1.bn2")])
def test_what_leaves_is_the_plain_encoder_and_the_same_function(name: str, layer: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, global_pool="")
    encoder = copy.deepcopy(plain)
    nn.init.uniform_(encoder.get_submodule(layer).weight, 0.5, 1.5)  # timm starts it at 0
    assert put_iter_norm(encoder) == layer
    assert isinstance(encoder.get_submodule(layer), IterNorm)
    encoder.train()
    for _ in range(2):
        encoder(torch.randn(4, 3, 64, 64))
    encoder.eval()
    left = without_iter_norm(encoder, layer).eval()
    assert {key: value.shape for key, value in left.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected, found = encoder(images), left(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # In training mode it does not start with other statistics: the branch keeps about its size.
        left.train()
        outputs: list[Tensor] = []
        left.get_submodule(layer).register_forward_hook(lambda _m, _i, output: outputs.append(output.clone()))
        left(images)
        branch = encoder.get_submodule(layer)
        assert isinstance(branch, IterNorm)
        asked = branch.running_variance.sqrt() * branch.weight
        torch.testing.assert_close(outputs[0].std(dim=(0, 2, 3)), asked, rtol=0.1, atol=1e-3)


def test_networks_without_such_a_layer_in_words() -> None:
    with pytest.raises(NetworkError, match=r"decorrelation='w1': .* has no plain BatchNorm .* or 'w2'"):
        put_iter_norm(nn.Sequential(nn.Conv2d(3, 8, 1)))
    with pytest.raises(NetworkError, match="decorrelation='w1': no convolution stands before '1'"):
        put_iter_norm(nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8)))
