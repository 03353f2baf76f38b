"""Gradients of a network's output with respect to a hidden layer, in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from medsd.errors import NetworkError


@dataclass
class HiddenLayer:
    """The activation of a tapped layer, once the network has run: (B, C, h, w), a leaf that requires grad."""

    _activations: list[Tensor] = field(default_factory=list)

    @property
    def activation(self) -> Tensor:
        """The activation of the last forward pass.

        Raises:
            NetworkError: the layer did not run.
        """
        if not self._activations:
            raise NetworkError("the hidden layer was not reached by the forward pass; choose another layer")
        return self._activations[-1]


@contextmanager
def tapped(network: nn.Module, layer: nn.Module) -> Iterator[HiddenLayer]:
    """Cut the graph at a layer: what lies below runs without one, what lies above is differentiable from there.

    No parameter receives a gradient. Hooks and `requires_grad` flags are put back at the end, also after an error.
    """
    tap = HiddenLayer()

    def cut(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        tap._activations[:] = [leaf]
        return leaf.clone()  # layers above may work in place, which a leaf does not allow

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    handle = layer.register_forward_hook(cut)
    try:
        yield tap
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
