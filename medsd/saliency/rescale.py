"""A network's functions differentiated by DeepLift's rules: beside their references, or against recorded ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from medsd.errors import NetworkError
from medsd.saliency.rules import Pair, graft, max_pool, pooled_with_places, rule_of

_MAX_POOLS = ("max_pool2d", "max_pool2d_with_indices")


class Rules(TorchFunctionMode):
    """Inside the block, functions of activations keep their values and are differentiated by DeepLift's rules.

    Works on the functions that a network calls and not on its modules, so that modules used twice, in-place ones and
    functions called without a module are all seen. What has no rule keeps its gradient, and maps then miss their sum:
    among others adaptive max pools, maxima, choices and products of other kinds (`maximum`, `where`, `einsum`,
    `addcmul`, `F.glu`, a convolution whose weights are activations), `nn.MultiheadAttention`, standard deviations,
    lengths by `vector_norm` and `F.normalize`, powers of a number, `log_softmax`, `F.rrelu`, scripted code.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rule = rule_of(name)
        if rule is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        known = [argument for argument in (*args, *kwargs.values()) if self.is_activation(argument)]
        if not known:
            return func(*args, **kwargs)
        writes = name.endswith("_") or bool(kwargs.get("inplace"))

        def detached(argument: Any) -> Any:
            argument = argument.detach() if isinstance(argument, Tensor) else argument
            return argument.clone() if isinstance(argument, Tensor) and writes else argument

        given = [detached(argument) for argument in args]
        named = {key: detached(argument) for key, argument in kwargs.items()}
        result = func(*given, **named)
        in_place = any(result is argument for argument in (*given, *named.values()))
        value, pairs = self.pairs(name, result, known)

        def paired(argument: Any) -> Any:
            return next((pair for its, pair in zip(known, pairs, strict=True) if its is argument), argument)

        options = {key: paired(argument) for key, argument in kwargs.items() if key != "inplace"}
        found = rule(func, value, *map(paired, args), **options)
        if found is None:
            return func(*args, **kwargs)
        grafted = graft(result, found)
        return args[0].copy_(grafted) if in_place else grafted

    @abstractmethod
    def is_activation(self, argument: Any) -> bool:
        """Whether an argument depends on the layer."""

    @abstractmethod
    def pairs(self, name: str, value: Tensor, activations: Sequence[Tensor]) -> tuple[Pair, list[Pair]]:
        """The function's value and its activations, each beside its reference."""


class Rescale(Rules):
    """For a batch of images followed by their references; only gradients of outputs of the first half are DeepLift's.

    Args:
        images: number B of images; the batch has 2 B, and is the first axis of every activation, alone or, as that of
            windows, with others behind it.
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
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        if x is None or name not in _MAX_POOLS or not torch.is_grad_enabled() or not self.is_activation(x):
            return super().__torch_function__(func, types, args, kwargs)
        kwargs.pop("input", None)
        after, places = pooled_with_places(x.detach(), args[1:], kwargs)
        pooled = graft(after, max_pool(_halves(after), _halves(places), _halves(x)))
        return (pooled, places) if name == "max_pool2d_with_indices" else pooled

    def is_activation(self, argument: Any) -> bool:
        return (
            isinstance(argument, Tensor)
            and argument.requires_grad
            and argument.ndim > 0
            and argument.shape[0] > 0
            and argument.shape[0] % (2 * self.images) == 0
        )

    def pairs(self, name: str, value: Tensor, activations: Sequence[Tensor]) -> tuple[Pair, list[Pair]]:
        return _halves(value), [_halves(activation) for activation in activations]


def _halves(both: Tensor) -> Pair:
    image, reference = both.chunk(2)
    return Pair(image, reference.detach())


class Call:
    """What a function of activations was called with on a uniform plane, and gave; lengths 1 along the map's axes."""

    def __init__(self, name: str, value: Tensor, activations: Sequence[Tensor]) -> None:
        self.name, self.value, self.activations = name, value, list(activations)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.value, *self.activations]


class OnPlane(Rules):
    """For images against references that were recorded, in calling order. Max pools keep their gradient.

    It is theirs by the rule, too: the references' maximum is the same at every place, so each window's change is that
    of its own maximum.

    Raises:
        NetworkError: the images call other functions than the recorded ones, or activations of other shapes.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self._calls: Iterator[Call] = iter(calls)

    def is_activation(self, argument: Any) -> bool:
        return isinstance(argument, Tensor) and argument.requires_grad

    def pairs(self, name: str, value: Tensor, activations: Sequence[Tensor]) -> tuple[Pair, list[Pair]]:
        call = next(self._calls, None)
        if call is None or call.name != name or len(call.activations) != len(activations):
            raise NetworkError(f"plane: the network calls other functions on another size of map ('{name}'), use tiles")
        pairs = [
            Pair(image, reference)
            for image, reference in zip([value, *activations], call.tensors, strict=True)
            if image.ndim == reference.ndim and _broadcasts(reference, image)
        ]
        if len(pairs) <= len(activations):
            raise NetworkError(f"plane: '{name}' takes activations that are no map of cells, use tiles")
        return pairs[0], pairs[1:]

    def check_all_called(self) -> None:
        """Raises NetworkError: the images did not call every recorded function."""
        if next(self._calls, None) is not None:
            raise NetworkError("plane: the network calls fewer functions on another size of map, use tiles")


def _broadcasts(small: Tensor, large: Tensor) -> bool:
    return all(its in (1, size) for its, size in zip(small.shape, large.shape, strict=True))
