"""A network above a layer on an endless uniform plane: what every function of it sees there, one vector each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from medsd.errors import NetworkError
from medsd.networks.modes import is_out_of_memory
from medsd.saliency.rescale import Call, OnPlane
from medsd.saliency.rules import Pair

_SIDES = ((16, 24), (64, 96))  # pairs of sides of uniform maps, in cells of the layer
_UNEVEN = 1e-3  # of the largest value; rounding in float32 stays a hundred times below


class EndlessPlane(TorchFunctionMode):
    """Inside the block maps have no border: padding continues them, where networks pad with a number.

    A uniform map then stays uniform through every convolution and pooling, however small it is, and holds what the
    middle of a large one would.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        continued = _CONTINUED.get(getattr(func, "__name__", ""), func)
        return continued(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    size = [step * (side - 1) for side, step in zip(weight.shape[2:], _pair(dilation), strict=True)]
    if padding == "same":
        first = [total // 2 for total in size]
        last = [total - before for total, before in zip(size, first, strict=True)]
    else:
        first = last = [0, 0] if padding == "valid" else _pair(padding)
    if any(first) or any(last):
        input = F.pad(input, (first[1], last[1], first[0], last[0]), mode="replicate")
    return F.conv2d(input, weight, bias, stride, 0, dilation, groups)


def _avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, divisor_override is not None, divisor_override)


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if input.ndim == 4 and len(pad) <= 4 and mode == "constant":
        return F.pad(input, (*pad, *[0] * (4 - len(pad))), mode="replicate")
    return F.pad(input, list(pad), mode, value)


_CONTINUED: Mapping[str, Callable[..., Any]] = {"conv2d": _conv2d, "avg_pool2d": _avg_pool2d, "pad": _pad}


def _pair(size: Any) -> list[int]:
    values = [size] if isinstance(size, int) else list(size)
    return values * 2 if len(values) == 1 else values


class _Recorder(OnPlane):
    """Keeps what functions that have a rule are called with, which then keep their gradient."""

    def __init__(self) -> None:
        super().__init__([])
        self.calls: list[Call] = []

    def pairs(self, name: str, value: Tensor, activations: Sequence[Tensor]) -> tuple[Pair, list[Pair]]:
        pairs = [Pair(part, part.detach()) for part in (value, *activations)]
        self.calls.append(Call(name, value.clone(), [pair.reference.clone() for pair in pairs[1:]]))
        return pairs[0], pairs[1:]


def uniform(vector: Tensor, side: int) -> Tensor:
    """The map (1, C, side, side) that is the vector (C,) everywhere."""
    return vector.view(1, -1, 1, 1).expand(1, -1, side, side)


def recorded_calls(run: Callable[[Tensor], Tensor], vector: Tensor) -> list[Call]:
    """What the functions of a network that have a rule are called with on an endless uniform plane.

    Args:
        run: gives an output of a map (1, C, h, w) that requires grad, the same function of it whatever its size.
        vector: (C,), of the type and on the device of such maps.

    Raises:
        NetworkError: the network is no function of cells and their neighbours.
    """
    return _settled(lambda side: _record(run, vector, side))


def plane_output(run: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """What a fully convolutional network gives a cell of an endless uniform plane, (K,).

    Args:
        run: a map (1, C, h, w) to a map (1, K, h', w').
        vector: (C,), of the type and on the device of such maps; where it requires grad, so does the output.

    Raises:
        NetworkError: its output is no map of cells that are alike on a uniform map.
    """

    def output(side: int) -> list[Call]:
        with torch.set_grad_enabled(vector.requires_grad), EndlessPlane():
            found = run(uniform(vector, side))
        if found.ndim != 4:
            raise NetworkError(f"plane: the output is {tuple(found.shape)}, no map (1, K, h, w), use tiles")
        return [Call("output", found, [])]

    return _settled(output)[0].value.flatten()


def _settled(record: Callable[[int], list[Call]]) -> list[Call]:
    """The calls on uniform maps, one place of each, found by comparing maps of two sizes."""
    reason = ""
    for sides in _SIDES:
        try:
            small, large = (record(side) for side in sides)
            return [_one_place(*pair) for pair in zip(small, large, strict=True)]
        except (RuntimeError, ValueError, NetworkError) as error:  # also maps smaller than a kernel
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
    raise NetworkError(f"plane: the network is no function of cells and their neighbours ({reason}); map it by tiles")


def _record(run: Callable[[Tensor], Tensor], vector: Tensor, side: int) -> list[Call]:
    with torch.enable_grad(), _Recorder() as recorder, EndlessPlane():
        run(uniform(vector.detach(), side).clone().requires_grad_())
        calls: list[Call] = recorder.calls
    return calls


def _one_place(small: Call, large: Call) -> Call:
    if (small.name, len(small.tensors)) != (large.name, len(large.tensors)):
        raise NetworkError("it calls other functions on another size of map")
    value, *activations = (_middle(f"'{large.name}'", *pair) for pair in zip(small.tensors, large.tensors, strict=True))
    return Call(large.name, value, activations)


def _middle(name: str, small: Tensor, large: Tensor) -> Tensor:
    """The larger of an activation of two sizes, at the middle along the axes that grew, which keep a length of 1."""
    if small.ndim != large.ndim or small.shape == large.shape:
        raise NetworkError(f"{name} takes or gives {tuple(large.shape)} whatever the size of the map")
    axes = [axis for axis, sizes in enumerate(zip(small.shape, large.shape, strict=True)) if sizes[0] != sizes[1]]
    values = large.detach()
    if float((values.amax(axes) - values.amin(axes)).max()) > _UNEVEN * float(values.abs().max()):
        raise NetworkError(f"{name} differs from place to place on a uniform map")
    for axis in axes:
        large = large.narrow(axis, large.shape[axis] // 2, 1)
    return large.clone()
