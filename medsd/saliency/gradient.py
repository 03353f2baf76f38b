"""Gradients of a class at the input or a hidden layer: plain, times activation, Grad-CAM, SmoothGrad."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.checks import check_number
from medsd.errors import ConfigError, NetworkError
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.saliency.method import Attribution, ClassMethod, Target, targets_of


@dataclass(frozen=True, eq=False)
class Gradient(ClassMethod):
    """The gradient of the output with respect to the layer (Simonyan et al., arXiv 1312.6034, signed).

    One forward and one backward pass; the layers below the layer run without a graph.

    Example:
        >>> from torchvision.models import resnet18
        >>> Gradient(resnet18(), "layer3")(torch.zeros(2, 3, 64, 64), target=1).shape
        torch.Size([2, 4, 4])
    """

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        with tapped(self.network, self.module) as hidden:
            logits = self.logits(images)
            numbers = targets_of(logits, target)
            gradient = gradient_at(hidden, self.explained(logits, numbers))
            return Attribution(self.weigh(gradient, hidden.activation.detach()), logits.detach(), numbers)

    def weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        """Attributions of a gradient and an activation, each (B, C, h, w)."""
        return gradient


@dataclass(frozen=True, eq=False)
class GradientXActivation(Gradient):
    """Gradient times activation; at the input, input x gradient (Shrikumar et al., arXiv 1605.01713)."""

    def weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        return gradient * activation


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

    def weigh(self, gradient: Tensor, activation: Tensor) -> Tensor:
        return gradient.mean(dim=(2, 3), keepdim=True) * activation

    def over_channels(self, values: Tensor) -> Tensor:
        return values.sum(dim=1)


@dataclass(frozen=True, eq=False)
class SmoothGrad(Gradient):
    """The mean of the layer's gradients over noisy copies of the images (Smilkov et al., arXiv 1706.03825).

    Every image and every call gets the same noise (our choice), so that an image's map does not depend on its batch;
    the random state elsewhere is not touched. A class that is not given is the one predicted without noise.

    Args:
        deviation: standard deviation of the Gaussian noise, in the units of the network's input (captum's NoiseTunnel
            too; the paper gives it as a share of the input's range).
        samples: noisy copies, one pass each. 0.2 and 20 are what arXiv 2404.02282's code has.
        seed: of the noise. The rest as `ClassMethod`.

    Raises:
        ConfigError: `samples` below 1 or `deviation` below 0, beside what every class method raises.
    """

    deviation: float = 0.2
    samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("samples", self.samples, "[1, inf)", whole=True)
        check_number("deviation", self.deviation, "[0, inf)", hint="in the units of the network's input")

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        with torch.no_grad():
            logits = self.logits(images.clone())
        numbers = targets_of(logits, target)
        generator = torch.Generator().manual_seed(self.seed)
        total = images.new_zeros(())
        for _ in range(self.samples):
            # Drawn on the CPU, so that it is the same on every device.
            noise = torch.randn(images.shape[1:], generator=generator).to(images) * self.deviation
            total = total + super().attributed(images + noise, numbers).values
        return Attribution(total / self.samples, logits, numbers)


def gradient_at(hidden: HiddenLayer, explained: Tensor) -> Tensor:
    """The gradient (B, C, h, w) of the sum of what is explained (B,) with respect to a tapped layer."""
    activation, gradient = hidden.activation, None
    if explained.requires_grad:
        (gradient,) = torch.autograd.grad(explained.sum(), activation, allow_unused=True)
    if gradient is None:
        raise NetworkError(f"layer '{hidden.name}': the output does not depend on it; choose another layer")
    if hidden.grid is not None and hidden.grid.prefix and not gradient.any():
        raise NetworkError(
            f"layer '{hidden.name}': the output takes nothing from its patches' tokens, only from the class token, so "
            "there is no map; choose an earlier block, or a network that pools the patches (timm: global_pool='avg')"
        )
    return gradient
