"""DeepLift at the input or a hidden layer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from reprlib import repr as brief
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from medsd.errors import ConfigError, NetworkError
from medsd.saliency.gradient import gradient_at
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.saliency.method import Attribution, ClassMethod, Target, baseline_images, check_logits, targets_of
from medsd.saliency.neutral import neutral_of
from medsd.saliency.plane import recorded_calls
from medsd.saliency.rescale import Call, OnPlane, Rescale

_LOG = logging.getLogger(__name__)
_MISSED = 1e-3  # of the sum of absolute attributions; rounding in float32 stays thirty times below
# Of the largest logit (our choice): the sum of absolute attributions, and what it misses, where they are out of bounds.
# Against the logits and not the change, which of one image may be nearly 0. Other networks have at most 5e3 and 1e-4.
_BURST, _MISSED_LOGIT = 1e4, 1e-2


@dataclass(frozen=True, eq=False)
class DeepLift(ClassMethod):
    """DeepLift with the Rescale rule (arXiv 1704.02685), times what the layer changed from its reference.

    One pass of images and references together above the layer. Where every function above the layer is linear or has
    a rule (see `rules`, which add what that paper lacks), and no path leads around the layer, attributions sum to the
    output's change from the reference. A sum that misses it is logged, once for each method object. It does so by
    rounding, too, where what a normalisation divides by is nearly 0 at the reference (LayerNorms of zeros, without
    biases, as before a training): multipliers grow beyond bounds there, and so does the map, in any precision.

    Our own rules and not captum's (0.9), which need each ReLU to be a module of its own that is used once, and lose a
    part at max pools that overlap or follow an activation at once (the stem of every ResNet). Elsewhere both agree.

    Args:
        baseline: images whose activations are the reference, see `baseline_images`.
        reference: the layer's reference itself, (C,) everywhere or (C, h, w), in place of a baseline's activations; or
            "neutral", the network's own (see `neutral_of`), with its extent.
        plane: a reference (C,) is that of an endless uniform plane, without borders: what it gives above the layer is
            one vector a function, recorded once, so that a call costs what a gradient costs. The sum is complete for
            cells whose view does not reach the map's border. The rest as `ClassMethod`.

    Raises:
        ConfigError: baseline and reference; a reference of another shape; a plane without a reference (C,).
        NetworkError: on a plane, a network that is no function of cells and their neighbours up to its logits.

    Example:
        >>> from torchvision.models import resnet18
        >>> method = DeepLift(resnet18(), "layer2", "evidence", reference=torch.zeros(128), plane=True)
        >>> method(torch.zeros(1, 3, 128, 128), target=1).shape
        torch.Size([1, 16, 16])
    """

    baseline: Tensor | None = None
    reference: Tensor | Literal["neutral"] | None = None
    plane: bool = False
    _told: list[str] = field(default_factory=list, init=False, repr=False)
    _calls: list[list[Call]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline is not None and self.reference is not None:
            raise ConfigError("baseline and reference: give one of them, images or what the layer gives")
        vector, plane = self._given()
        if vector is not None and (vector.ndim not in (1, 3) or not bool(torch.isfinite(vector).all())):
            raise ConfigError(f"reference: shape {tuple(vector.shape)}; give finite numbers (C,) or (C, h, w)")
        if plane and (vector is None or vector.ndim != 1):
            raise ConfigError("plane: needs a reference of one number a channel (C,)")

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        reference, plane = self._given()
        if reference is not None and plane:
            return self._on_plane(images, target, reference.to(images))
        with tapped(self.network, self.module) as hidden:
            both = images
            if reference is None:
                both = torch.cat([images, baseline_images(images, self.baseline)])
            else:
                hidden.turned = partial(self._beside, images=len(images), reference=reference)
            with Rescale(len(images)):
                logits, reference_logits = self._both_logits(both, 2 * len(images)).chunk(2)
            numbers = targets_of(logits, target)
            explained = self.explained(logits, numbers)
            multiplier, _ = _multipliers(hidden, explained).chunk(2)
            activation, its_reference = hidden.activation.detach().chunk(2)
            values = multiplier * (activation - its_reference)
            change = explained.detach() - self.explained(reference_logits, numbers).detach()
            size = torch.maximum(logits.detach().abs(), reference_logits.detach().abs()).amax(dim=1)
            self._tell_missed(values.flatten(1).double(), change, size)
        return Attribution(values, logits.detach(), numbers)

    def _on_plane(self, images: Tensor, target: Target, reference: Tensor) -> Attribution:
        with tapped(self.network, self.module) as hidden:
            if not self._calls:

                def run(plane: Tensor) -> Tensor:
                    hidden.turned = lambda _: plane
                    output: Tensor = self.network(images[:1])
                    return output

                self._calls.append(recorded_calls(run, reference))
                hidden.turned = None
            with OnPlane(self._calls[0]) as rules:
                logits = self.logits(images)
            rules.check_all_called()
            numbers = targets_of(logits, target)
            multiplier = _multipliers(hidden, self.explained(logits, numbers))
            values = multiplier * (hidden.activation.detach() - reference[:, None, None])
        return Attribution(values, logits.detach(), numbers)

    def _given(self) -> tuple[Tensor | None, bool]:
        """The layer's reference, if it is not a baseline's, and whether it is a plane's."""
        if self.reference is not None and not isinstance(self.reference, Tensor):
            if not isinstance(self.reference, str) or self.reference != "neutral":
                raise ConfigError(f"reference={brief(self.reference)}: give a tensor or 'neutral'")
            neutral = neutral_of(self.network, self.layer)
            return torch.tensor(neutral.vector, dtype=torch.float64), neutral.extent == "plane"
        return self.reference, self.plane

    def _beside(self, output: Tensor, images: int, reference: Tensor) -> Tensor:
        """The layer's output of the images, then the reference as often."""
        shape = tuple(output.shape[1:])
        spread = reference[:, None, None] if reference.ndim == 1 else reference
        if spread.shape[0] != shape[0] or (reference.ndim == 3 and tuple(spread.shape) != shape):
            raise ConfigError(f"reference: shape {tuple(reference.shape)}; give {shape[:1]} or {shape}")
        return torch.cat([output[:images], spread.to(output).expand(images, *shape)])

    def _both_logits(self, both: Tensor, batch: int) -> Tensor:
        try:
            output = self.network(both)
        except RuntimeError as error:
            if len(both) == batch or "must match" not in str(error):
                raise
            raise NetworkError(
                f"layer '{self.layer}': a path leads around it, which a reference of the layer does not tell; choose a "
                "layer that all paths cross, or a baseline image"
            ) from error
        return check_logits(output, batch)

    def _tell_missed(self, attribution: Tensor, change: Tensor, size: Tensor) -> None:
        if self._told:
            return
        missed, total = (attribution.sum(dim=1) - change).abs(), attribution.abs().sum(dim=1)
        # So written that nan, beyond all numbers, counts.
        within = ((total <= _BURST * size) | (missed <= _MISSED_LOGIT * size)).all()
        share, bounded = torch.stack([(missed / total.clamp(min=1e-30)).max(), within.to(total)]).tolist()
        if share > _MISSED:
            self._told.append(self.layer or "input")
            _LOG.warning(
                "DeepLift at '%s': attributions miss the output's change from the baseline by %.2g of their absolute "
                "sum: a path leads around the layer (a class token does), gradients are smoothed, functions without a "
                "rule (adaptive max pools, maxima, multi-head attention modules) keep their gradient, or it is "
                "rounding (image and baseline hardly differ, half precision)",
                self._told[0],
                share,
            )
        elif not bounded:
            self._told.append(self.layer or "input")
            _LOG.warning(
                "DeepLift at '%s': absolute attributions sum to %.2g times the largest logit, and miss the output's "
                "change from the baseline, mostly since what a normalisation divides by is nearly 0 there (a "
                "LayerNorm's variance, of zeros); give another baseline or reference (float64 may mend the sum, not "
                "the map)",
                self._told[0],
                float((total / size).max()),
            )


def _multipliers(hidden: HiddenLayer, explained: Tensor) -> Tensor:
    try:
        return gradient_at(hidden, explained)
    except CheckpointError as error:
        raise NetworkError(
            "the network recomputes activations, without DeepLift's rules; switch its gradient checkpointing "
            "off (timm: set_grad_checkpointing(False))"
        ) from error
