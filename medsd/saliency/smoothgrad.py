"""SmoothGrad at the input or a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.errors import ConfigError
from medsd.saliency.gradient import ClassMethod, class_numbers, explaining, gradient_pass
from medsd.saliency.method import Target, check_logits


@dataclass(frozen=True, eq=False)
class SmoothGrad(ClassMethod):
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
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: at least 1")
        if not self.deviation >= 0:
            raise ConfigError(f"deviation={self.deviation}: 0 or more, in the units of the network's input")

    def attribute(self, x: Tensor, target: Target = None) -> Tensor:
        with explaining(self.network, x) as images, torch.no_grad():
            numbers = class_numbers(check_logits(self.network(images.clone()), len(images)), target)
        generator = torch.Generator().manual_seed(self.seed)
        gradients = images.new_zeros(())
        for _ in range(self.samples):
            # Drawn on the CPU, so that it is the same on every device.
            noise = torch.randn(x.shape[1:], generator=generator).to(x) * self.deviation
            gradients = gradients + gradient_pass(self, images + noise, numbers).gradient
        return gradients / self.samples
