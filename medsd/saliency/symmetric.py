"""Maps of a network whose answer is the mean over the symmetries of the square."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from medsd.networks.symmetry import mean_answer, upright
from medsd.saliency.method import Attribution, ClassMethod, Target, targets_of


@dataclass(frozen=True, eq=False)
class SymmetricMethod(ClassMethod):
    """The mean of a method's attributions of the images under all eight symmetries, turned back (our choice).

    Attributions that sum to what is explained still do: the answer is the same mean. Cells that look to one side of
    their place, as those of strided convolutions do, look to all of its sides in turn, so the mean lies square on the
    image.

    Args:
        network: answers by that mean, see `Classifier.test_time_augmentation`. Layer and output as of the method.
        of: the method, of the same network, layer and output.
    """

    of: ClassMethod = field(kw_only=True)

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        if target is None:
            with torch.no_grad():
                target = targets_of(self.logits(images), None)

        def run(view: Tensor) -> tuple[Tensor, Tensor]:
            found = self.of.attributed(view, target)
            return found.logits, found.values

        with upright(self.network):
            logits, values = mean_answer(run, images, symmetric=True)
        return Attribution(values, logits, targets_of(logits, target))

    def over_channels(self, values: Tensor) -> Tensor:
        return self.of.over_channels(values)
