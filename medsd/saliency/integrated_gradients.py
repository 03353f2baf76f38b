"""Integrated gradients at the input or a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsd.checks import check_number
from medsd.saliency.gradient import gradient_at
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.saliency.method import Attribution, ClassMethod, Target, baseline_images, targets_of


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
            check_number(key, value, "[1, inf)", whole=True)

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        references = baseline_images(images, self.baseline)
        parts = [slice(first, first + self.batch_size) for first in range(0, len(images), self.batch_size)]
        with tapped(self.network, self.module) as hidden:
            starts, changes, logits = [], [], []
            with torch.no_grad():
                for part in parts:
                    self.network(references[part])
                    starts.append(hidden.activation.detach())
                    logits.append(self.logits(images[part]))
                    changes.append(hidden.activation.detach() - starts[-1])
            numbers = targets_of(torch.cat(logits), target)
            values = [
                self._integrated(hidden, images[part], numbers[part], start, change)
                for part, start, change in zip(parts, starts, changes, strict=True)
            ]
        return Attribution(torch.cat(values), torch.cat(logits), numbers)

    def _integrated(
        self, hidden: HiddenLayer, images: Tensor, numbers: Tensor, start: Tensor, change: Tensor
    ) -> Tensor:
        # Gauss-Legendre on [0, 1].
        places, weights = np.polynomial.legendre.leggauss(self.steps)
        pair = [torch.from_numpy(values).to(change) for values in ((places + 1) / 2, weights / 2)]
        at_once = max(1, self.batch_size // len(images))
        total = torch.zeros_like(change)
        for some, its_weights in zip(*(torch.split(values, at_once) for values in pair), strict=True):
            hidden.instead = torch.cat([start + place * change for place in some])
            logits = self.logits(images.repeat(len(some), 1, 1, 1))
            explained = self.explained(logits, numbers.repeat(len(some)))
            gradients = gradient_at(hidden, explained).reshape(len(some), *total.shape)
            total += torch.tensordot(its_weights, gradients, dims=1)
        hidden.instead = None
        return total * change
