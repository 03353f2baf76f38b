"""Gradient, gradient x activation and Grad-CAM at the input or a hidden layer; and what all class methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import evaluating
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.saliency.method import (
    Output,
    Target,
    check_images,
    check_logits,
    check_output,
    explained_output,
    finite,
    layer_named,
    targets_of,
)


@dataclass(frozen=True, eq=False)
class ClassMethod(ABC):
    """A `Method` that explains a class.

    Args:
        network: gives logits (B, K); any module. It runs in eval mode and is left as it was.
        layer: a module's name, explained at its output; None is the input.
        output: what is explained, see `medsd.saliency.method.Output`.

    Raises:
        NetworkError: no such layer.
        ConfigError: no such output.
    """

    network: nn.Module
    layer: str | None = None
    output: Output = "logit"

    def __post_init__(self) -> None:
        check_output(self.output)
        _ = self.module

    @property
    def module(self) -> nn.Module | None:
        """The module named `layer`; None for the input."""
        return None if self.layer is None else layer_named(self.network, self.layer)

    @abstractmethod
    def attribute(self, x: Tensor, target: Target = None) -> Tensor:
        """Attributions (B, C, h, w) at the layer, before channels become one; arguments and errors as `Method`."""

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w): see `medsd.saliency.method.Method`."""
        return self.maps_of(self.attribute(x, target), x)

    def maps_of(self, attribution: Tensor, x: Tensor) -> Tensor:
        """Attributions (B, C, h, w) of images (B, ...) as maps (B, h, w), float32.

        Raises:
            NetworkError: not one an image, or not finite.
        """
        if len(attribution) != len(x):
            raise NetworkError(
                f"layer '{self.layer}': gives {len(attribution)} maps for {len(x)} images; choose another"
            )
        return finite(self.over_channels(attribution), self.layer)

    def over_channels(self, attribution: Tensor) -> Tensor:
        """Attributions (B, C, h, w) as maps (B, h, w): the plain signed mean, as in arXiv 2404.02282's code."""
        return attribution.mean(dim=1)


@dataclass(frozen=True)
class Explanation:
    """Maps (B, h, w) as a `Method` gives them, logits (B, K) of the same pass, and the class numbers (B,) explained."""

    maps: Tensor
    logits: Tensor
    target: Tensor


@dataclass(frozen=True)
class GradientPass:
    """Activation and gradient at the layer (B, C, h, w), logits (B, K), class numbers (B,), all detached."""

    activation: Tensor
    gradient: Tensor
    logits: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class Gradient(ClassMethod):
    """The gradient of the output with respect to the layer (Simonyan et al., arXiv 1312.6034, signed).

    One forward and one backward pass; the layers below the layer run without a graph.
    """

    def attribute(self, x: Tensor, target: Target = None) -> Tensor:
        return self.weigh(gradient_pass(self, x, target))

    def weigh(self, passed: GradientPass) -> Tensor:
        """Attributions (B, C, h, w) of a pass."""
        return passed.gradient

    def explain(self, x: Tensor, target: Target = None) -> Explanation:
        """Maps and logits from one pass; arguments and errors as `Method`."""
        passed = gradient_pass(self, x, target)
        return Explanation(self.maps_of(self.weigh(passed), x), passed.logits, passed.target)


@dataclass(frozen=True, eq=False)
class GradientXActivation(Gradient):
    """Gradient times activation; at the input, input x gradient (Shrikumar et al., arXiv 1605.01713)."""

    def weigh(self, passed: GradientPass) -> Tensor:
        return passed.gradient * passed.activation


@dataclass(frozen=True, eq=False)
class GradCAM(Gradient):
    """Channels weighted by their mean gradient and summed (Selvaraju et al., arXiv 1610.02391), without its ReLU.

    What speaks against the class stays in the map, negative (our choice); clamp at 0 for the paper's map.

    Raises:
        ConfigError: no layer, beside what every class method raises.
    """

    def __post_init__(self) -> None:
        if self.layer is None:
            raise ConfigError("layer: GradCAM needs a hidden layer; name one, such as the last with a map")
        super().__post_init__()

    def weigh(self, passed: GradientPass) -> Tensor:
        return passed.gradient.mean(dim=(2, 3), keepdim=True) * passed.activation

    def over_channels(self, attribution: Tensor) -> Tensor:
        return attribution.sum(dim=1)


@contextmanager
def explaining(network: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Inside: eval mode, and gradients whatever the caller switched off. Yields the images (B, C, H, W), detached.

    Raises:
        DatasetError: not (B, C, H, W) float, or empty.
        NetworkError: the network was made in inference mode, which has no gradients.
    """
    check_images(x)
    if any(tensor.is_inference() for tensor in chain(network.parameters(), network.buffers())):
        raise NetworkError(f"{type(network).__name__} was made under torch.inference_mode; make it outside")
    with torch.inference_mode(False), torch.enable_grad(), evaluating(network):
        yield x.clone() if x.is_inference() else x.detach()


def class_numbers(logits: Tensor, target: Target) -> Tensor:
    """As `targets_of`, a tensor that autograd may keep.

    Raises:
        ConfigError: outside the classes, or not one an image.
    """
    return targets_of(logits, target).clone()


def gradient_at(hidden: HiddenLayer, explained: Tensor) -> Tensor:
    """The gradient (B, C, h, w) of the sum of what is explained (B,) with respect to a tapped layer.

    Raises:
        NetworkError: the layer was not reached, or the output does not depend on it.
    """
    activation, gradient = hidden.activation, None
    if explained.requires_grad:
        (gradient,) = torch.autograd.grad(explained.sum(), activation, allow_unused=True)
    if gradient is None:
        raise NetworkError(f"layer '{hidden.name}': the output does not depend on it; choose another layer")
    return gradient


def gradient_pass(method: ClassMethod, x: Tensor, target: Target) -> GradientPass:
    """One forward and one backward pass of the method's network; arguments and errors as `Method`."""
    with explaining(method.network, x) as images, tapped(method.network, method.module) as hidden:
        logits = check_logits(method.network(images), len(images))
        numbers = class_numbers(logits, target)
        gradient = gradient_at(hidden, explained_output(logits, numbers, method.output))
        return GradientPass(hidden.activation.detach(), gradient, logits.detach(), numbers)
