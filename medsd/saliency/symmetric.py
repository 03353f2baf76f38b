"""Maps of a network whose answer is the mean over the symmetries of the square."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medsd.networks.symmetry import SYMMETRIES, mean_answer, turned, upright
from medsd.saliency.method import Attribution, ClassMethod, Target, targets_of


@dataclass(frozen=True, eq=False)
class SymmetricMethod(ClassMethod):
    """The mean of a method's attributions of the images under all eight symmetries, turned back (our choice).

    What the method compares with is turned as the images are, so attributions that sum to what is explained still do:
    the answer is the same mean. Cells that look to one side of
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

        methods = (_turned_method(self.of, number) for number in SYMMETRIES)

        def run(view: Tensor) -> tuple[Tensor, Tensor]:
            found = next(methods).attributed(view, target)
            return found.logits, found.values

        with upright(self.network):
            logits, values = mean_answer(run, images, symmetric=True)
        return Attribution(values, logits, targets_of(logits, target))

    def over_channels(self, values: Tensor) -> Tensor:
        return self.of.over_channels(values)


def _turned_method(method: ClassMethod, number: int) -> ClassMethod:
    """The method for images under a symmetry: a baseline or reference of places (..., h, w) lies under it, too."""
    given = {name: getattr(method, name, None) for name in ("baseline", "reference")}
    places = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim > 1}
    if not places:
        return method
    method = copy.copy(method)  # what it has told once stays told
    for name, value in places.items():
        object.__setattr__(method, name, turned(value, number))
    return method
