"""DeepLift at the input or a hidden layer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from medsd.errors import NetworkError
from medsd.saliency.gradient import gradient_at
from medsd.saliency.hidden import tapped
from medsd.saliency.method import Attribution, ClassMethod, Target, baseline_images, targets_of
from medsd.saliency.rescale import Rescale

_LOG = logging.getLogger(__name__)
_MISSED = 1e-3  # of the sum of absolute attributions; rounding in float32 stays a hundred times below


@dataclass(frozen=True, eq=False)
class DeepLift(ClassMethod):
    """DeepLift with the Rescale rule (arXiv 1704.02685), times what the layer changed from the baseline.

    One pass of images and baselines together. Where every nonlinearity above the layer is `torch.max_pool2d` or one of
    the functions of one element that `rescale` lists, and no path leads around the layer, attributions sum to the
    output's change from the baseline. A sum that misses it is logged, once for each method object.

    Our own rules and not captum's (0.9), which need each ReLU to be a module of its own that is used once, and lose a
    part at max pools that overlap or follow an activation at once (the stem of every ResNet). Elsewhere both agree.

    Args:
        baseline: see `baseline_images`; the rest as `ClassMethod`.
    """

    baseline: Tensor | None = None
    _told: list[str] = field(default_factory=list, init=False, repr=False)

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        with tapped(self.network, self.module) as hidden:
            with Rescale(len(images)):
                both = torch.cat([images, baseline_images(images, self.baseline)])
                logits, reference_logits = self.logits(both).chunk(2)
            numbers = targets_of(logits, target)
            explained = self.explained(logits, numbers)
            try:
                multiplier, _ = gradient_at(hidden, explained).chunk(2)
            except CheckpointError as error:
                raise NetworkError(
                    "the network recomputes activations, without DeepLift's rules; switch its gradient checkpointing "
                    "off (timm: set_grad_checkpointing(False))"
                ) from error
            activation, reference = hidden.activation.detach().chunk(2)
            values = multiplier * (activation - reference)
            change = explained.detach() - self.explained(reference_logits, numbers).detach()
            self._tell_missed(values.flatten(1).double(), change)
        return Attribution(values, logits.detach(), numbers)

    def _tell_missed(self, attribution: Tensor, change: Tensor) -> None:
        missed = (attribution.sum(dim=1) - change).abs()
        share = float((missed / attribution.abs().sum(dim=1).clamp(min=1e-30)).max())
        if share > _MISSED and not self._told:
            self._told.append(self.layer or "input")
            _LOG.warning(
                "DeepLift at '%s': attributions miss the output's change from the baseline by %.2g of their absolute "
                "sum: a path leads around the layer, gradients are smoothed, or functions without a rule (products, "
                "softmax, layer norms, adaptive max pools) keep their gradient",
                self._told[0],
                share,
            )
