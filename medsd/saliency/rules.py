"""DeepLift's rules: how the change of a function passes back to its arguments, in place of slopes.

Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences", arXiv
1704.02685, Rescale rule; computed as a gradient with the slopes replaced (Ancona et al., arXiv 1711.06104). Products of
two activations are no subject of that paper: each factor gets its change times the mean of the other, the Shapley value
of two players, so that nothing is lost (our choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions of one tensor, element by element, by the names that torch, torch.nn.functional and Tensor give them; and
# AIM's threshold.
_NAMES = (
    "abs atan celu clamp clamp_max clamp_min clip cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh "
    "hard_mask leaky_relu log log1p logsigmoid mish pow __pow__ prelu reciprocal relu relu6 rsqrt selu sigmoid silu "
    "sin softplus softshrink softsign sqrt square tanh tanhshrink threshold _threshold"
)

_ROUNDING = 4  # units in the last place, of what a function gives at either side


class Pair(NamedTuple):
    """An activation of the images (B, ...), differentiable, and its reference, which broadcasts to it."""

    image: Tensor
    reference: Tensor

    def through(self, linear: Callable[[Tensor], Tensor]) -> Pair:
        """Both through a linear function."""
        return Pair(linear(self.image), linear(self.reference))


Rule = Callable[..., Tensor | None]
"""Called with the function, its value (a `Pair`, not differentiable), and its arguments, activations among them as
`Pair`; gives a tensor of the value's shape (B, ...) whose gradient is the rule's, or None where it has nothing to say.
"""


def graft(value: Tensor, differentiable: Tensor) -> Tensor:
    """This value (B or more, ...), with the gradient of another tensor (B, ...) for its first B; the value is taken."""
    grafted: Tensor = _Graft.apply(differentiable, value)  # type: ignore[no-untyped-call]
    return grafted


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        ctx.length = len(differentiable)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][: ctx.length], None


def ratio(after: Pair, before: Pair, slope: Callable[[], Tensor], exact: bool = False) -> Tensor:
    """The function's change over its argument's, (B, ...); the slope where that has no digits, or nothing changed.

    Where changes are a small share d of the argument, rounding is eps / d of the quotient, and the slope in the middle
    is off by about d^2 / 24 in a smooth function: least together near the cube root of eps (5e-3 in float32, where
    either is at most 2e-5). A kink or a jump between the two sides makes the quotient another by more than rounding
    does, and it is kept. `exact` says that both changes are free of rounding.
    """
    image, reference = before.image.detach(), before.reference
    change, eps = image - reference, torch.finfo(image.dtype).eps
    size = torch.maximum(image.abs(), reference.abs())
    # So written that nan, of two infinite values, counts as no change.
    moved = change.abs() > (0.0 if exact else eps ** (1 / 3)) * size
    found = (after.image - after.reference) / change
    if moved.is_cpu and bool(moved.all()):  # spares the slope; a GPU would have to be waited for, function by function
        return found
    slopes = slope()
    rounding = _ROUNDING * eps * (torch.maximum(after.image.abs(), after.reference.abs()) + slopes.abs() * size)
    return torch.where(moved | ((found - slopes).abs() * change.abs() > rounding), found, slopes)


def _elementwise(func: Callable[..., Tensor], value: Pair, *args: Any, **kwargs: Any) -> Tensor | None:
    x = args[0] if args else kwargs.pop("input")
    if not isinstance(x, Pair):
        return None

    def slope() -> Tensor:
        given = _middle(x).requires_grad_()
        after = func(given.clone(), *args[1:], **kwargs)
        return torch.autograd.grad(after.sum(), given)[0] if after.requires_grad else torch.zeros_like(given)

    return x.image * ratio(value, x, slope)


def _applied(func: Callable[[Tensor], Tensor], x: Pair) -> Pair:
    """A function of one element."""
    value = Pair(func(x.image.detach()), func(x.reference))
    found = _elementwise(func, value, x)
    assert found is not None
    return Pair(graft(value.image, found), value.reference)


def _multiplied(a: Pair, b: Pair, operation: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Pair:
    """A product, element by element or of matrices: (a + a0) / 2 (b - b0) + (b + b0) / 2 (a - a0) is its change."""
    linear = operation(a.image, _middle(b)) + operation(_middle(a), b.image)
    value = operation(a.image.detach(), b.image.detach())
    return Pair(graft(value, linear), operation(a.reference, b.reference))


def _middle(x: Pair) -> Tensor:
    return (x.image.detach() + x.reference) / 2


def _mul(func: Callable[..., Tensor], value: Pair, input: Any, other: Any, **_: Any) -> Tensor | None:
    return _multiplied(input, other).image if isinstance(input, Pair) and isinstance(other, Pair) else None


def _matmul(func: Callable[..., Tensor], value: Pair, input: Any, other: Any, **_: Any) -> Tensor | None:
    if isinstance(input, Pair) and isinstance(other, Pair):
        return _multiplied(input, other, torch.matmul).image
    return None


def _div(
    func: Callable[..., Tensor], value: Pair, input: Any, other: Any, rounding_mode: str | None = None, **_: Any
) -> Tensor | None:
    if not isinstance(other, Pair) or rounding_mode:
        return None
    inverse = _applied(torch.reciprocal, other)
    return _multiplied(input, inverse).image if isinstance(input, Pair) else input * inverse.image


def _reversed_div(func: Callable[..., Tensor], value: Pair, other: Any, input: Any) -> Tensor | None:
    return _div(func, value, input, other)


def _softmax(
    func: Callable[..., Tensor], value: Pair, input: Any, dim: int | None = None, dtype: Any = None, **_: Any
) -> Tensor | None:
    if not isinstance(input, Pair) or dim is None:
        return None
    return _soft(input if dtype is None else input.through(lambda x: x.to(dtype)), dim).image


def _soft(x: Pair, dim: int) -> Pair:
    tops = x.through(lambda part: part.detach().amax(dim, keepdim=True))
    far = (tops.image - tops.reference).abs() > _far_apart(x.image.dtype)
    if not bool(far.any()):
        return _soft_near(x, dim)
    # Each rule sees rows that it has numbers for: what is not finite would stay so behind a choice, times 0.
    near, log = _soft_near(x.through(lambda part: part.where(~far, 0)), dim), _soft_far(x, dim)
    return Pair(*(torch.where(far, *parts) for parts in zip(log, near, strict=True)))


def _far_apart(dtype: torch.dtype) -> float:
    """Between the largest of images' and reference's arguments: powers of the one are rounding beside the other's."""
    return -math.log(torch.finfo(dtype).eps)


def _soft_near(x: Pair, dim: int) -> Pair:
    """Powers over their sum."""
    powers = _powers(x, dim)
    return _multiplied(powers, _applied(torch.reciprocal, powers.through(lambda part: part.sum(dim, keepdim=True))))


def _soft_far(x: Pair, dim: int) -> Pair:
    """The same number by logarithms (our choice): powers of what each argument is above the logarithm of their sum.

    Its multipliers are shares; those of the quotient grow as the powers' own ratio does, beyond all numbers.
    """
    sums = _powers(x, dim).through(lambda part: part.sum(dim, keepdim=True))
    logs = x.through(lambda part: part.detach().logsumexp(dim, keepdim=True))
    slopes = ratio(logs, sums, lambda: 1 / _middle(sums))
    logs = Pair(graft(logs.image, sums.image * slopes), logs.reference)
    return _applied(torch.exp, Pair(x.image - logs.image, x.reference - logs.reference))


def _powers(x: Pair, dim: int) -> Pair:
    # The same number off both, so that it changes nothing.
    top = torch.maximum(*x.through(lambda part: part.detach().amax(dim, keepdim=True)))
    return _applied(torch.exp, x.through(lambda part: part - top))


def _attention(
    func: Callable[..., Tensor],
    value: Pair,
    query: Any,
    key: Any,
    value_: Any,
    attn_mask: Tensor | Pair | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Scaled dot products: of two, softmax, of two."""
    if not all(isinstance(part, Pair) for part in (query, key, value_)) or is_causal or dropout_p or enable_gqa:
        return None
    factor = query.image.shape[-1] ** -0.5 if scale is None else scale
    scores = _multiplied(query.through(lambda x: x * factor), key.through(lambda x: x.mT), torch.matmul)
    if attn_mask is not None:
        masks = _mask_of(attn_mask, scores)
        scores = Pair(*(_masked(*parts) for parts in zip(scores, masks, strict=True)))
    return _multiplied(_soft(scores, -1), value_, torch.matmul).image


def _mask_of(mask: Tensor | Pair, scores: Pair) -> Pair:
    """The masks of the images and of their references, which may be activations, or one for all."""
    if isinstance(mask, Pair):
        return mask
    each = mask.ndim == scores.image.ndim and len(mask) == 2 * len(scores.image)
    return Pair(*mask.chunk(2)) if each else Pair(mask, mask)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _norm(x: Pair, axes: list[int], eps: float, centred: bool = True) -> Pair:
    """Mean, square, reciprocal root and product."""
    if centred:
        x = x.through(lambda part: part - part.mean(axes, keepdim=True))
    power = _applied(torch.square, x).through(lambda part: part.mean(axes, keepdim=True) + eps)
    return _multiplied(x, _applied(torch.rsqrt, power))


def _layer_norm(
    func: Callable[..., Tensor],
    value: Pair,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor | None:
    return _last_axes_norm(input, normalized_shape, weight, eps, centred=True)  # a shift changes no gradient


def _rms_norm(
    func: Callable[..., Tensor],
    value: Pair,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    return _last_axes_norm(input, normalized_shape, weight, eps, centred=False)


def _last_axes_norm(
    input: Any, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, centred: bool
) -> Tensor | None:
    if not isinstance(input, Pair):
        return None
    eps = torch.finfo(input.image.dtype).eps if eps is None else eps
    found = _norm(input, list(range(-len(normalized_shape), 0)), eps, centred).image
    return found if weight is None else found * weight


def _group_norm(
    func: Callable[..., Tensor],
    value: Pair,
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not isinstance(input, Pair):
        return None
    found = _norm(input.through(lambda x: x.reshape(len(x), num_groups, -1)), [-1], eps).image.view_as(input.image)
    return found if weight is None else found * weight.view(-1, *[1] * (found.ndim - 2))


def _length(
    func: Callable[..., Tensor], value: Pair, input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Tensor | None:
    """The Euclidean length along axes, of global response normalisation."""
    if not isinstance(input, Pair) or p not in (2, "fro") or dim is None:
        return None
    power = _applied(torch.square, input).through(lambda part: part.sum(dim, keepdim=keepdim))
    return _applied(torch.sqrt, power).image


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_NAMES.split(), _elementwise),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "__imul__"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__itruediv__", "__idiv__", "__div__"), _div),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), _reversed_div),
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), _matmul),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "group_norm": _group_norm,
    "norm": _length,
}


def rule_of(name: str) -> Rule | None:
    """The rule of a function by its name, in place or not."""
    return RULES.get(name) or RULES.get(name.removesuffix("_"))


def max_pool(value: Pair, places: Pair, x: Pair) -> Tensor:
    """Each window's change goes to the place of the larger of its two maxima.

    There the input changed by as much or more and with the same sign, so the ratio lies between 0 and 1. An input that
    wins several windows gets the sum.
    """
    # Of places where the reference's maximum is the same, the image's own.
    tied = x.reference.flatten(2).gather(2, places.image.flatten(2)).view_as(value.reference) == value.reference
    winner = torch.where(tied | (value.image >= value.reference), *places)
    winners = x.through(lambda part: part.flatten(2).gather(2, winner.flatten(2)).view_as(winner))
    # Both changes are differences of the same numbers, free of rounding however small.
    return winners.image * ratio(value, winners, lambda: torch.ones_like(value.image), exact=True)


def pooled_with_places(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and places of `max_pool2d`'s arguments, whatever it was asked for."""
    options = {key: option for key, option in kwargs.items() if key != "return_indices"}
    pooled: tuple[Tensor, Tensor] = F.max_pool2d_with_indices(x, *args, **options)
    return pooled
