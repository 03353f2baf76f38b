"""Gradients of a network's output with respect to a hidden layer, in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from medsd.errors import NetworkError


@dataclass
class HiddenLayer:
    """A tapped layer.

    Attributes:
        name: of the layer in its network, or "input".
        instead: (B, C, h, w); if set, the layers above are given this and not what the layer gives.
    """

    name: str = "input"
    instead: Tensor | None = None
    _activations: list[Tensor] = field(default_factory=list)

    @property
    def activation(self) -> Tensor:
        """The activation of the last forward pass, (B, C, h, w), a leaf that requires grad.

        A layer that runs several times in one pass is taken as it ran last.

        Raises:
            NetworkError: the layer did not run.
        """
        if not self._activations:
            raise NetworkError(f"layer '{self.name}': not reached by the forward pass; choose another layer")
        return self._activations[-1]


@contextmanager
def tapped(network: nn.Module, layer: nn.Module | None) -> Iterator[HiddenLayer]:
    """Cut the graph at a layer: what lies below runs without one, what lies above is differentiable from there.

    No parameter receives a gradient. Hooks and `requires_grad` flags are put back at the end, also after an error.

    Args:
        network: any module.
        layer: a module of it, cut at its output; None cuts at the network's input.

    Raises:
        NetworkError: while the network runs, where the layer gives no map (B, C, h, w).
    """
    names = {module: name for name, module in network.named_modules()}
    tap = HiddenLayer("input" if layer is None else names.get(layer, type(layer).__name__))

    def cut(output: object, inputs: tuple[Tensor, ...]) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise NetworkError(
                f"layer '{tap.name}': it gives {given}, no map (B, C, h, w); choose a convolutional layer"
            )
        leaf = (output if tap.instead is None else tap.instead).detach()
        if any(output is given for given in inputs):
            leaf = leaf.clone()  # a layer in place, or none: others may hold its input and write to it
        tap._activations[:] = [leaf.requires_grad_()]
        return leaf.clone()  # layers above may work in place, which a leaf does not allow

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    if layer is None:
        handle = network.register_forward_pre_hook(lambda _module, inputs: (cut(inputs[0], ()), *inputs[1:]))
    else:
        handle = layer.register_forward_hook(lambda _module, inputs, output: cut(output, inputs))
    try:
        yield tap
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
