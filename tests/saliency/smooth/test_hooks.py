"""The forward hook, and what holds for all variants: captum inside, nesting, compiled networks, no traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import get_args

import pytest
import torch
from captum.attr import DeepLift, IntegratedGradients, LayerDeepLift, LayerIntegratedGradients
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.saliency import smooth
from medsd.saliency.smooth import Boundary, Box

Gradient = Callable[..., Tensor]
Context = AbstractContextManager[None]

X = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def convolution(kernel: int = 3, stride: int = 2) -> nn.Conv2d:
    torch.manual_seed(kernel)
    return nn.Conv2d(3, 4, kernel, stride, kernel // 2).double()


def mean_of_rolled(module: nn.Module, x: Tensor) -> Tensor:
    """Variant C as it is defined."""
    return sum(module(x.roll((a, b), (2, 3))) for a in (0, 1) for b in (0, 1)) / 4


@contextmanager
def released_forward_hooks(*modules: nn.Module) -> Iterator[None]:
    """Variant C as it is defined, on these modules."""
    handles = [
        module.register_forward_hook(
            lambda module, inputs, _output: (
                sum(module.forward(inputs[0].roll((a, b), (2, 3))) for a in (0, 1) for b in (0, 1)) / 4
            )
        )
        for module in modules
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_forward_hook_is_the_convolution_of_the_smoothed_input(kernel: int, input_gradient: Gradient) -> None:
    layer = convolution(kernel)
    upstream = torch.randn(layer(X).shape, dtype=torch.float64)
    defined, plain_of_smoothed = mean_of_rolled(layer, X), layer(Box((2, 2), "circular")(X))
    with smooth.backward_hook(layer):
        of_b = input_gradient(layer, X, upstream)
    with smooth.forward_hook(layer, stem=True):
        output, of_c = layer(X), input_gradient(layer, X, upstream)
    torch.testing.assert_close(output, defined, rtol=0, atol=1e-14)
    torch.testing.assert_close(output, plain_of_smoothed, rtol=0, atol=0)
    torch.testing.assert_close(of_c, of_b.roll((-1, -1), (2, 3)), rtol=0, atol=1e-14)
    assert (of_b - of_c).abs().max() > 0.01 * of_b.abs().max()


@pytest.mark.parametrize("kernel", [3, 4])
def test_symmetric_forward_and_backward_hook_of_a_convolution_agree(kernel: int, input_gradient: Gradient) -> None:
    """The symmetric box is its own adjoint, so nothing is moved."""
    layer = convolution(kernel)
    upstream = torch.randn(layer(X).shape, dtype=torch.float64)
    with smooth.backward_hook(layer, "symmetric"):
        of_b = input_gradient(layer, X, upstream)
    with smooth.forward_hook(layer, "symmetric", stem=True):
        of_c = input_gradient(layer, X, upstream)
    torch.testing.assert_close(of_c, of_b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("stem", [False, True])
def test_forward_hook_of_a_network_as_defined(small_resnet: nn.Module, input_gradient: Gradient, stem: bool) -> None:
    block = small_resnet[3]
    treated = [block.conv1, block.downsample, *([small_resnet[0]] if stem else [])]
    plain = small_resnet(X)
    with released_forward_hooks(*treated):
        expected, gradient = small_resnet(X), input_gradient(small_resnet, X)
    with smooth.forward_hook(small_resnet, stem=stem):
        torch.testing.assert_close(small_resnet(X), expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(input_gradient(small_resnet, X), gradient, rtol=0, atol=1e-14)
    assert (expected - plain).abs().max() > 1e-4
    assert torch.equal(small_resnet(X), plain)


def test_forward_hook_of_pooling(small_resnet: nn.Module) -> None:
    """Of the maximum it is the mean over the shifts, which the maximum of the mean is not; of the mean it is both."""
    for pool in (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)):
        expected = mean_of_rolled(pool, X)
        with smooth.forward_hook(pool, also=("max_pool", "average_pool")):
            torch.testing.assert_close(pool(X), expected, rtol=0, atol=1e-14)
    pool = nn.MaxPool2d(3, 2, 1)
    assert (pool(Box((2, 2), "circular")(X)) - mean_of_rolled(pool, X)).mean() < -0.1
    block = small_resnet[3]
    with released_forward_hooks(small_resnet[2], block.conv1, block.downsample):
        expected = small_resnet(X)
    with smooth.forward_hook(small_resnet, also=("max_pool",)):
        torch.testing.assert_close(small_resnet(X), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundary", get_args(Boundary))
def test_patchify_of_stride_four_has_no_checkerboard(boundary: Boundary, input_gradient: Gradient) -> None:
    layer, x = convolution(4, 4), torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    inner = slice(8, 24)
    plain = input_gradient(layer, x)[..., inner, inner]
    with smooth.backward_hook(layer, boundary, ("patchify",)):
        smoothed = input_gradient(layer, x)[..., inner, inner]
    expected = layer.weight.sum(dim=(0, 2, 3)).view(1, 3, 1, 1).expand_as(smoothed) / 16
    assert plain.std(dim=(2, 3)).min() > 0.1
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-14)


def test_a_stride_along_one_axis_is_smoothed_along_it_alone(input_gradient: Gradient) -> None:
    layer = nn.Conv2d(3, 4, 3, (1, 2), 1).double()
    plain = input_gradient(layer, X)
    with smooth.backward_hook(layer):
        smoothed = input_gradient(layer, X)
    torch.testing.assert_close(smoothed, (plain + plain.roll(1, 3)) / 2, rtol=0, atol=1e-15)


def test_maps_of_a_relu_network_are_smoother(
    input_gradient: Gradient, nyquist_share: Callable[[Tensor], float]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)).double()
    plain = input_gradient(network, X)
    assert nyquist_share(plain) > 0.1  # of white noise 0.06
    for context in (smooth.backward_hook(network), smooth.forward_hook(network, stem=True)):
        with context:
            smoothed = input_gradient(network, X)
        assert nyquist_share(smoothed) < 1e-28
        assert variation(smoothed) < 0.75 * variation(plain)


def variation(gradient: Tensor) -> float:
    scaled = gradient / gradient.abs().mean(dim=(2, 3), keepdim=True)
    return float(scaled.diff(dim=2).abs().mean() + scaled.diff(dim=3).abs().mean())


def target_change(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return (network(X) - network(0 * X))[:, 1]


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", "ignore:Input Tensor 0 did not already")
@pytest.mark.parametrize(
    ("method", "options", "tolerance"), [(DeepLift, {}, 1e-6), (IntegratedGradients, {"n_steps": 200}, 1e-3)]
)
def test_attributions_add_up_but_not_under_the_backward_hook(
    small_resnet: nn.Module, method: type, options: dict[str, int], tolerance: float
) -> None:
    x = X[:1, :, :16, :16]
    surrogate, _ = smooth.train_surrogate(small_resnet, [x], epochs=5)
    contexts: dict[str, Callable[[], Context]] = {
        "plain": nullcontext,
        "surrogate": lambda: smooth.surrogate(small_resnet, surrogate),
        "backward": lambda: smooth.backward_hook(small_resnet),
    }
    missed = {}
    for name, context in contexts.items():
        with context():
            summed = method(small_resnet).attribute(x, 0 * x, target=1, **options).sum().detach()
            change = (small_resnet(x) - small_resnet(0 * x))[0, 1].detach()
        missed[name] = float((summed - change).abs())
        assert change.abs() > 1e-3
    assert max(missed["plain"], missed["surrogate"]) < tolerance
    assert missed["backward"] > 10 * tolerance


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", "ignore:Input Tensor 0 did not already")
@pytest.mark.parametrize("method", [LayerDeepLift, LayerIntegratedGradients])
def test_captums_layer_methods_see_what_torchs_own_hooks_give(
    small_resnet: nn.Module, released_hooks: Callable[[nn.Module], Context], method: type
) -> None:
    def attribute() -> Tensor:
        return method(small_resnet, small_resnet[2]).attribute(X, 0 * X, target=0).detach()

    plain = attribute()
    with released_hooks(small_resnet):
        expected = attribute()
    with smooth.backward_hook(small_resnet):
        smoothed = attribute()
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert (smoothed - plain).abs().max() > 0.05 * plain.abs().max()


def test_nested_contexts_both_apply(input_gradient: Gradient) -> None:
    layer, box = convolution(), Box((2, 2), "circular")
    plain = input_gradient(layer, X)
    with smooth.backward_hook(layer), smooth.backward_hook(layer):
        twice = input_gradient(layer, X)
    torch.testing.assert_close(twice, box(box(plain)), rtol=0, atol=1e-15)


def test_a_compiled_network_is_smoothed_too(small_resnet: nn.Module, input_gradient: Gradient) -> None:
    with smooth.backward_hook(small_resnet):
        expected = input_gradient(small_resnet, X)
    compiled = torch.compile(small_resnet, backend="eager")
    plain = input_gradient(compiled, X)  # compiled here, without hooks
    with smooth.backward_hook(compiled):
        assert torch.equal(input_gradient(compiled, X), expected)
    assert torch.equal(input_gradient(compiled, X), plain)


@pytest.mark.parametrize("variant", ["backward", "forward", "surrogate"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(small_resnet: nn.Module, variant: str, fails: bool) -> None:
    surrogate = smooth.Surrogate({"0": (3, 6), "2": (6, 6), "3.conv1": (6, 8), "3.downsample": (6, 8)}, ("max_pool",))
    context = {
        "backward": lambda: smooth.backward_hook(small_resnet, also=("max_pool",)),
        "forward": lambda: smooth.forward_hook(small_resnet, also=("max_pool",)),
        "surrogate": lambda: smooth.surrogate(small_resnet, surrogate),
    }[variant]

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in small_resnet.modules())

    try:
        with context():
            assert hooks() == (4 if variant == "backward" else 3)
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert hooks() == 0


def test_what_cannot_be_is_named(small_resnet: nn.Module) -> None:
    for hook in (smooth.backward_hook, smooth.forward_hook):
        with pytest.raises(ConfigError, match="boundary='wrap'"), hook(small_resnet, "wrap"):  # type: ignore[arg-type]
            pass
        with pytest.raises(ConfigError, match="also='max_pol'"), hook(small_resnet, also=("max_pol",)):  # type: ignore[arg-type]
            pass
        with pytest.raises(NetworkError, match="no convolution of stride 2"), hook(nn.ReLU()):
            pass
    with pytest.raises(NetworkError, match="no strided module but the stem"), smooth.forward_hook(convolution()):
        pass
    assert not any(module._forward_pre_hooks for module in small_resnet.modules())


class ByName(nn.Module):
    """Gives its convolution the input by name."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool, self.second = nn.Conv2d(3, 4, 3, 2, 1), pool, nn.Conv2d(4, 4, 3, 2, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(input=self.pool(self.first(input=x)))
        return found


@pytest.mark.parametrize("context", [smooth.backward_hook, smooth.forward_hook])
def test_inputs_given_by_name_are_smoothed(context: Callable[[nn.Module], Context]) -> None:
    named = ByName(nn.Identity())
    placed = nn.Sequential(named.first, named.second)
    x, same = X.clone().requires_grad_(), X.clone().requires_grad_()
    with context(named):
        (found,) = torch.autograd.grad(named(x).pow(2).sum(), x)
    with context(placed):
        (expected,) = torch.autograd.grad(placed(same).pow(2).sum(), same)
    torch.testing.assert_close(found, expected)


def test_pools_that_return_indices_are_refused() -> None:
    network = ByName(nn.MaxPool2d(2, return_indices=True))
    with (
        pytest.raises(NetworkError, match="layer 'pool': a max pool that returns indices"),
        smooth.forward_hook(network, also=("max_pool",)),
    ):
        pass
