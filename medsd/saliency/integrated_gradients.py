"""Integrated gradients at the input or a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsd.errors import ConfigError
from medsd.saliency.baseline import baseline_images
from medsd.saliency.gradient import ClassMethod, class_numbers, explaining, gradient_at
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.saliency.method import Target, check_logits, explained_output


@dataclass(frozen=True, eq=False)
class IntegratedGradients(ClassMethod):
    """Gradients averaged along the straight line from the baseline's activation, times what the layer changed.

    Sundararajan et al., arXiv 1703.01365; at a hidden layer the line is drawn there and the images feed the paths
    around it, as captum does. By Gauss-Legendre quadrature. Attributions sum to the output's change from the baseline,
    if no path leads around the layer, up to the quadrature's error.

    Args:
        baseline: see `baseline_images`.
        steps: gradients an image.
        batch_size: images in one pass at most, whatever the batch and the steps, which bounds the memory. The rest
            as `ClassMethod`.

    Raises:
        ConfigError: `steps` or `batch_size` below 1, beside what every class method raises.
    """

    baseline: Tensor | None = None
    steps: int = 50
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{key}={value}: at least 1")

    def attribute(self, x: Tensor, target: Target = None) -> Tensor:
        with explaining(self.network, x) as images, tapped(self.network, self.module) as hidden:
            references = baseline_images(images, self.baseline)
            parts = [slice(first, first + self.batch_size) for first in range(0, len(images), self.batch_size)]
            with torch.no_grad():
                ends = [self._ends(hidden, images[part], references[part]) for part in parts]
            numbers = class_numbers(torch.cat([end.logits for end in ends]), target)
            return torch.cat(
                [
                    self._integrated(hidden, images[part], numbers[part], end)
                    for part, end in zip(parts, ends, strict=True)
                ]
            )

    def _ends(self, hidden: HiddenLayer, images: Tensor, references: Tensor) -> _Ends:
        self.network(references)
        start = hidden.activation.detach()
        logits = check_logits(self.network(images), len(images))
        return _Ends(start, hidden.activation.detach() - start, logits)

    def _integrated(self, hidden: HiddenLayer, images: Tensor, numbers: Tensor, ends: _Ends) -> Tensor:
        places, weights = _quadrature(self.steps, ends.change)
        at_once = max(1, self.batch_size // len(images))
        total = torch.zeros_like(ends.change)
        for first in range(0, self.steps, at_once):
            some = places[first : first + at_once]
            hidden.instead = torch.cat([ends.start + place * ends.change for place in some])
            logits = check_logits(self.network(images.repeat(len(some), 1, 1, 1)), len(some) * len(images))
            explained = explained_output(logits, numbers.repeat(len(some)), self.output)
            gradients = gradient_at(hidden, explained).reshape(len(some), *total.shape)
            total += torch.tensordot(weights[first : first + at_once], gradients, dims=1)
        hidden.instead = None
        return total * ends.change


@dataclass(frozen=True)
class _Ends:
    """Of some images: the layer's activation at their baselines, its change from there to them, and their logits."""

    start: Tensor
    change: Tensor
    logits: Tensor


def _quadrature(steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre places and weights (steps,) on [0, 1], type and device of a tensor."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((places + 1) / 2).to(like), torch.from_numpy(weights / 2).to(like)
