"""DeepLift's rules: changes of nonlinearities pass back as ratios, where gradients would be slopes.

Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences", arXiv
1704.02685, Rescale rule; computed as a gradient with the slopes replaced (Ancona et al., arXiv 1711.06104).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions of one tensor, element by element, by the names that torch, torch.nn.functional and Tensor give them.
_NAMES = (
    "abs atan celu clamp clamp_max clamp_min clip cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh "
    "leaky_relu log log1p logsigmoid mish pow __pow__ prelu reciprocal relu relu6 rsqrt selu sigmoid silu sin softplus "
    "softshrink softsign sqrt square tanh tanhshrink threshold _threshold"
)
_ELEMENTWISE = frozenset(_NAMES.split())
_MAX_POOLS = ("max_pool2d", "max_pool2d_with_indices")
_LEAST_CHANGE = 1e-10  # below it the ratio is the slope, as in captum


class Rescale(TorchFunctionMode):
    """Inside the block, a batch of images followed by their baselines is differentiated by DeepLift's rules.

    Works on the functions that a network calls and not on its modules, so that modules used twice, in-place ones and
    functions called without a module are all seen. What has no rule (products of activations, softmax, layer
    normalisation, adaptive max pools, scripted code) keeps its gradient. Only gradients of outputs of the first half
    are DeepLift's; the second half receives none.

    Args:
        images: number B of images; the batch has 2 B, and is the first axis of every activation.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad and x.shape[:1] == (2 * self.images,):
            options = {key: value for key, value in kwargs.items() if key != "input"}
            if name.removesuffix("_") in _ELEMENTWISE:
                return _elementwise(func, x, args[1:], options)
            if name in _MAX_POOLS:
                return _max_pool(func, x, args[1:], options)
        return func(*args, **kwargs)


def _elementwise(func: Callable[..., Tensor], x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The function's values, with the ratio of the changes as slope; written to `x` where the function is in place."""
    before = x.detach().requires_grad_()
    given = before.clone()
    after = func(given, *args, **kwargs)
    (slope,) = torch.autograd.grad(after.sum(), before)
    value = _with_slope(x, after.detach(), _ratio(after.detach(), x.detach(), slope.chunk(2)[0]))
    return x.copy_(value) if after is given else value


def _max_pool(func: Callable[..., Any], x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Each window's change goes to the place of the larger of its two maxima.

    There the input changed by as much or more and with the same sign, so the ratio lies between 0 and 1. An input that
    wins several windows gets the sum.
    """
    options = {key: value for key, value in kwargs.items() if key != "return_indices"}
    after, places = F.max_pool2d_with_indices(x.detach(), *args, **options)
    (value, reference), (place, reference_place) = after.chunk(2), places.chunk(2)
    winner = torch.where(value >= reference, place, reference_place).repeat(2, 1, 1, 1)
    winners = x.flatten(2).gather(2, winner.flatten(2)).view_as(after)
    pooled = _with_slope(winners, after, _ratio(after, winners.detach(), torch.ones_like(value)))
    return (pooled, places) if func.__name__ == "max_pool2d_with_indices" else pooled


def _ratio(after: Tensor, before: Tensor, slope: Tensor) -> Tensor:
    """Change of the second argument's function over its own change, (B, ...), from batches (2 B, ...)."""
    (image_after, reference_after), (image, reference) = after.chunk(2), before.chunk(2)
    change = image - reference
    # So written that nan, of two infinite values, counts as no change; in float16 the limit itself is 0.
    return torch.where(change.abs() > _LEAST_CHANGE, (image_after - reference_after) / change, slope)


def _with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A tensor of these values (2 B, ...) whose derivative by the first half of `x` is the slope (B, ...)."""
    given: Tensor = _Slope.apply(x, value, slope)  # type: ignore[no-untyped-call]
    return given


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        gradient = gradients[0].chunk(2)[0] * slope
        return torch.cat([gradient, torch.zeros_like(gradient)]), None, None
