"""Gradients of a network's output with respect to a hidden layer, in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.modes import map_of_layer, uncompiled
from medsd.networks.symmetry import upright
from medsd.networks.tokens import TokenGrid, token_grid


@dataclass
class HiddenLayer:
    """A tapped layer.

    Attributes:
        name: of the layer in its network, or "input".
        instead: (B, C, h, w); if set, the layers above are given this and not what the layer gives, where it runs last
            (as in the pass before).
        turned: makes of what the layer gives, each time it runs, what the layers above are given.
        grid: of a layer of tokens, whose patches are the map; the others stay what the layer gave. None of maps.
    """

    name: str = "input"
    instead: Tensor | None = None
    turned: Callable[[Tensor], Tensor] | None = None
    grid: TokenGrid | None = None
    _activations: list[Tensor] = field(default_factory=list)
    _runs: int = 0
    _last: int = 0

    @property
    def activation(self) -> Tensor:
        """The activation of the last forward pass, (B, C, h, w), a leaf that requires grad.

        A layer that runs several times in one pass is taken as it ran last.
        """
        if not self._activations:
            raise NetworkError(f"layer '{self.name}': not reached by the forward pass; choose another layer")
        return self._activations[-1]


@contextmanager
def tapped(network: nn.Module, layer: nn.Module | None) -> Iterator[HiddenLayer]:
    """Cut the graph at a layer: what lies below runs without one, what lies above is differentiable from there.

    No parameter receives a gradient; compiled networks run uncompiled, symmetric ones see images as they are. Hooks and
    `requires_grad` flags are put back at the end, also after an error.

    Args:
        network: any module.
        layer: a module of it, cut at its output; None cuts at the network's input.
    """
    names = {module: name for name, module in network.named_modules()}
    images: list[Tensor] = []
    tap = HiddenLayer("input" if layer is None else names.get(layer, type(layer).__name__))

    def start(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tap._runs, tap._last = 0, tap._runs or tap._last
        images[:] = [inputs[0]]
        # A network may write to its input, which is the caller's.
        return (cut(inputs[0], ()) if layer is None else inputs[0].clone(), *inputs[1:])

    def cut(given: object, inputs: tuple[object, ...]) -> Tensor:
        tokens = given if isinstance(given, Tensor) and given.ndim == 3 else None
        tap.grid = token_grid(network, tap.name, images[0]) if tokens is not None and images else None
        output = map_of_layer(tap.name, given, images[0] if images else None, tap.grid)
        output = output if tap.turned is None else tap.turned(output)
        tap._runs += 1
        leaf = (output if tap.instead is None or tap._runs != tap._last else tap.instead).detach()
        if any(_shares_memory(leaf, each) for each in inputs):
            leaf = leaf.clone()  # a layer in place, a view, or none: others may hold its input and write to it
        tap._activations[:] = [leaf.requires_grad_()]
        if tokens is not None and tap.grid is not None:
            return tap.grid.with_map(tokens, leaf)
        return leaf.clone()  # layers above may work in place, which a leaf does not allow

    if any(isinstance(module, torch.jit.ScriptModule) for module in (network, layer)):
        raise NetworkError(f"layer '{tap.name}': scripted modules take no hooks; give the network as it was before")
    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(start).remove)
        if layer is not None:
            stack.callback(layer.register_forward_hook(lambda _module, inputs, output: cut(output, inputs)).remove)
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.is_inference():
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        stack.enter_context(uncompiled())
        stack.enter_context(upright(network))
        yield tap


def _shares_memory(first: Tensor, second: object) -> bool:
    return isinstance(second, Tensor) and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
