"""Which modules of a network leave a checkerboard in the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medsd.checks import check_choice
from medsd.errors import NetworkError

Also = Literal["max_pool", "average_pool", "patchify"]


@dataclass(frozen=True)
class Point:
    """A strided module of a network.

    Attributes:
        name: as in `named_modules`.
        module: a convolution or a pooling.
        stride: along rows and columns.
        stem: whether it is the network's first strided convolution.
    """

    name: str
    module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d
    stride: tuple[int, int]
    stem: bool

    def before(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Change the module's input, until the hook is removed."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            changed = change(_input_of(inputs, named))
            return ((changed, *inputs[1:]), named) if inputs else ((), {**named, "input": changed})

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def after(self, change: Callable[[Tensor, Tensor], Tensor | None]) -> RemovableHandle:
        """Change the module's output, given input and output, until the hook is removed; None leaves it."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            return change(_input_of(inputs, named), output)

        return self.module.register_forward_hook(hook, with_kwargs=True)


def strided_points(network: nn.Module, also: Sequence[Also] = ()) -> tuple[Point, ...]:
    """The modules whose checkerboard is smoothed, in module order.

    Every `Conv2d` of stride 2 is one, those of 1 x 1 shortcuts too, pooling is not: what the authors' released code
    (arXiv 2404.02282) takes. It looks at the stride along rows; here either axis counts (our choice). A module that
    runs several times is one point.

    Args:
        network: any module.
        also: more kinds (our choice): "max_pool" and "average_pool", of stride 2 or more; "patchify", convolutions of
            larger stride, such as ConvNeXt's stem.
    """
    for kind in also:
        check_choice("also", kind, get_args(Also))
    points: list[Point] = []
    stem: nn.Module | None = None
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            continue
        stride = _stride(module)
        if max(stride) < 2:
            continue
        if stem is None and isinstance(module, nn.Conv2d):
            stem = module
        found = _kind(module, stride)
        if found == "max_pool" and found in also and getattr(module, "return_indices", False):
            raise NetworkError(
                f"layer '{name}': a max pool that returns indices cannot be smoothed; leave 'max_pool' out"
            )
        if found in ("convolution", *also):
            points.append(Point(name, module, stride, module is stem))
    if not points:
        pooling = " or pooling" if {"max_pool", "average_pool"} & set(also) else ""
        raise NetworkError(f"no convolution of stride 2{pooling}, so there is nothing to smooth; use smoothing 'none'")
    return tuple(points)


def _input_of(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a convolution or pooling was given, by place or by the name that torch gives it."""
    x: Tensor = inputs[0] if inputs else named["input"]
    return x


def _stride(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int]:
    stride = module.stride
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[-1])


def _kind(module: nn.Module, stride: tuple[int, int]) -> str:
    if isinstance(module, nn.MaxPool2d):
        return "max_pool"
    if isinstance(module, nn.AvgPool2d):
        return "average_pool"
    return "convolution" if max(stride) == 2 else "patchify"
