"""The SaliencyDecor objective (arXiv 2604.25315): cross-entropy, consistency under masking, decorrelation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError, TrainingError
from medsd.networks.modes import keeping_statistics
from medsd.networks.moments import feature_moments, first_of_processes, group_channels, sum_over_processes
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss, default_group_size
from medsd.objectives.masking import (
    Fill,
    Ranking,
    SaliencyPass,
    classified,
    mask_lowest,
    masked_count,
    pixel_scores,
    scores_of,
)
from medsd.training.terms import Terms

Mode = Literal["cov", "zca", "corr", "layer"]
Decorrelated = Literal["clean", "both"]
BatchNormUse = Literal["own", "shared"]

# A start that is all but decorrelated must not make the weight of what is left boundless.
_LEAST_LEVEL = 1e-3


@dataclass
class SaliencyDecor:
    """CE(z, y) + consistency * KL(p || p~) + decorrelation * ln(classes) * L_dec(F / s) / L_0.

    Only the abstract of the paper and a digest were readable: the three parts are the paper's; the masking step is
    that of its parent, Saliency Guided Training (released code); that decorrelation is ZCA whitening is the digest's
    word; constants and the other forms of L_dec are our choice. `decorrelation=0` is Saliency Guided Training,
    `consistency=0` is decorrelation alone, both 0 is plain cross-entropy, bit for bit.

    One weight for all encoders (our choice). s is the deviation of the features, the root of their variance averaged
    over channels, and L_0 is L_dec of F / s; both are of the first batch that has the term, of all processes, and
    stay as they are. So the term starts as the share `decorrelation` of ln(classes), the cross-entropy of who knows
    nothing, whatever the encoder's scale (s) and width (L_0; "cov" grows with it). A scale that followed the features
    would be lowered by shrinking them, and collapse; one of an encoder that has learnt nothing holds its features
    back, which must grow, so an epoch of plain cross-entropy comes first. What was measured is in `state_dict`: a
    training that is resumed loads it, and an objective belongs to one training.

    The masked pass leaves BatchNorm's running averages alone. Those of the parent mix clean and masked batches and
    then serve clean images, which cost 2 to 8 points of accuracy on PatchCamelyon (the parent's own networks have no
    BatchNorm). That, the mean fill, the share of 0.2 and a small weight were picked on folds of PatchCamelyon by
    stain cluster, where they lost nothing to cross-entropy with either of two encoders (one more run of one of them
    lost 3 points, with a warm epoch); no gain is established.

    Attributes:
        consistency: weight of the KL term (lambda).
        decorrelation: weight of the decorrelation term (mu), as above.
        masked_share: share of pixels masked (rho); the parent's example has 0.5, its default 0.1.
        warm_epochs: epochs of plain cross-entropy before both terms come in (our choice). As many as the training has
            leave nothing else; the best network on validation may be one of these.
        ranking: pixels are ranked by the "absolute" input gradient or by the "signed" one (the parent's default).
        fill: masked pixels become the channel's "mean", "noise" in the image's range (the parent) or its "blur".
        block_px: side of the blocks of pixels that are masked, see `mask_lowest`; 1 masks pixels (the parent).
        mode: form of L_dec, see `decorrelation_loss`: "cov", "zca", "corr"; "layer" has no L_dec, since the network's
            head is a `WhitenedHead`.
        group_size: channels are decorrelated in shuffled groups of this size; None: all at once, but for "zca" half the
            batch where that is less than all needs (`default_group_size`).
        decorrelated: features of the "clean" images, or the mean of the term over "both" batches.
        saliency_pass: where the ranking's gradient comes from. "eval": a pass of its own with BatchNorm's running
            statistics (the parent), in float32. "shared": the clean batch's own pass, which saves one of three forward
            passes (our choice); for networks without BatchNorm and dropout it is the same gradient, but for autocast's
            rounding, which changes the order of the smallest.
        bn: running averages of BatchNorm (and of a whitening head) are the clean batches' "own", or "shared" with the
            masked ones (the parent). The masked pass normalises by its own batch in both.

    Raises:
        ConfigError: a value lies outside its range.

    Example:
        >>> from medsd.networks.classifier import TileClassifier
        >>> network, images = TileClassifier("test_resnet"), torch.rand(4, 3, 64, 64)
        >>> objective = SaliencyDecor(consistency=1.0, decorrelation=0.1)
        >>> terms = objective(network, images, torch.tensor([0, 1, 0, 1]), epoch=3.0)
        >>> terms.total.backward()
        >>> sorted(terms.parts)
        ['consistency', 'cross_entropy', 'decorrelation']
    """

    consistency: float = 1.0
    decorrelation: float = 0.1
    masked_share: float = 0.2
    warm_epochs: int = 1
    ranking: Ranking = "absolute"
    fill: Fill = "mean"
    block_px: int = 1
    mode: Mode = "cov"
    group_size: int | None = None
    decorrelated: Decorrelated = "clean"
    saliency_pass: SaliencyPass = "eval"
    bn: BatchNormUse = "own"
    _start: dict[str, float] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("consistency", "decorrelation"):
            check_number(name, getattr(self, name), "[0, inf)")
        check_number("masked_share", self.masked_share, "[0, 1)")
        check_number("warm_epochs", self.warm_epochs, "[0, inf)", whole=True)
        check_number("block_px", self.block_px, "[1, inf)", whole=True, hint="1 masks pixels")
        if self.group_size is not None:
            hint = "null for all channels at once"
            check_number("group_size", self.group_size, "[2, inf)", whole=True, hint=hint)
        check_choice("ranking", self.ranking, get_args(Ranking))
        check_choice("fill", self.fill, get_args(Fill))
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("decorrelated", self.decorrelated, get_args(Decorrelated))
        check_choice("saliency_pass", self.saliency_pass, get_args(SaliencyPass))
        check_choice("bn", self.bn, get_args(BatchNormUse))

    def check_fits(self, side_px: int, feature_dim: int, batch: int) -> None:
        """Told before any step, since warm epochs may be hours.

        Args:
            side_px: of the images.
            feature_dim: channels of the features.
            batch: images at once, of all processes.

        Raises:
            ConfigError: nothing would be masked of such images, `group_size` is above the channels, or features of
                single images would be decorrelated.
        """
        if self.consistency > 0:
            masked_count(self.masked_share, side_px, side_px, self.block_px)
        if self.decorrelation > 0 and self.mode != "layer":
            group_channels(torch.arange(feature_dim), self.group_size)
            if batch < 2:
                raise ConfigError(
                    "decorrelation: needs at least 2 images at once; raise batch_size or lower accumulation"
                )

    def complete_from(self, network: nn.Module) -> int:
        """The first epoch, counted from 1, that has all terms: the one after the warm epochs."""
        return self.warm_epochs + 1 if self.consistency or self.decorrelation else 1

    def usable_from(self, network: nn.Module) -> int:
        """1: a warm epoch leaves a classifier like any other."""
        return 1

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """The loss of one batch; the network is left in the mode it was in.

        The parts are `cross_entropy`, and after `warm_epochs` `consistency` and `decorrelation` (L_dec over L_0: 1 at
        its start), without their weights, where these are not 0.

        Args:
            network: offers `features(x)` (B, d) and a linear `head`, as `TileClassifier` does.
            x: (B, C, H, W) float images, as the network takes them.
            labels: (B,) class numbers.
            epoch: epochs done so far, fractions allowed.
            generator: draws the fill noise and the groups of channels, on the device of `x`.

        Raises:
            TrainingError: the batch is too small for the statistics, its features do not vary, or labels or images are
                of another shape or kind.
            NetworkError: the network has no such `features` and `head`, or fewer than two classes.
            ConfigError: `mode` is "layer" and the head does not whiten, or `masked_share` masks no pixel.
        """
        if self.mode == "layer" and not isinstance(getattr(network, "head", None), WhitenedHead):
            raise ConfigError("mode='layer': the network's head must whiten its features; set whitening to true")
        warm = epoch < self.warm_epochs
        masking = self.consistency > 0 and not warm
        if masking and (labels.shape != x.shape[:1] or labels.dtype != torch.int64 or not x.is_floating_point()):
            raise TrainingError(
                f"labels {tuple(labels.shape)} {labels.dtype}, images {tuple(x.shape)} {x.dtype}: masking needs class "
                "numbers (B,) int64 and float images (B, C, H, W), as the network takes them"
            )
        shared = masking and self.saliency_pass == "shared"
        if masking and not shared:
            scores = pixel_scores(network, x, labels, self.ranking)
        x = x.detach().requires_grad_(shared)
        features, logits = classified(network, x)
        if shared:
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), x, retain_graph=True)
            scores = scores_of(gradient, self.ranking)
        cross_entropy = F.cross_entropy(logits, labels)
        total = cross_entropy
        parts = {"cross_entropy": cross_entropy}
        penalised = [features]
        if masking:
            masked = mask_lowest(x, scores, self.masked_share, self.fill, generator, self.block_px)
            with keeping_statistics(network) if self.bn == "own" else nullcontext():
                masked_features, masked_logits = classified(network, masked)
            penalised.append(masked_features)
            parts["consistency"] = consistency_loss(logits, masked_logits)
            total = total + self.consistency * parts["consistency"]
        if self.decorrelation > 0 and self.mode != "layer" and not warm:
            chosen = penalised if self.decorrelated == "both" else penalised[:1]
            parts["decorrelation"] = self._decorrelation(chosen, generator)
            total = total + self.decorrelation * math.log(logits.shape[1]) * parts["decorrelation"]
        return Terms(total, {name: part.detach() for name, part in parts.items()}, logits.detach())

    def state_dict(self) -> dict[str, float]:
        """`scale` (s) and `level` (L_0), once measured; one of the checkpoint's parts."""
        return dict(self._start)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put `state_dict` back; before the first step."""
        self._start = dict(state)

    def _decorrelation(self, batches: list[Tensor], generator: torch.Generator | None) -> Tensor:
        """L_dec(F / s) / L_0, the mean over the batches."""
        assert self.mode != "layer"
        start, size, (count, dim) = self._start, self.group_size, batches[0].shape
        if size is None and self.mode == "zca":
            # Of all processes, whose shares of a batch may differ, while all must make the same groups.
            size = default_group_size(int(sum_over_processes(torch.tensor(count, device=batches[0].device))), dim)
        if "scale" not in start:
            scale = _of_first(feature_moments(batches[0]).covariance.diagonal().mean().sqrt())
            if scale == 0:
                raise TrainingError(
                    "decorrelation: features of the first batch do not vary; start from other weights, or set it to 0"
                )
            start["scale"] = scale
        losses = [decorrelation_loss(batch / start["scale"], self.mode, size, generator) for batch in batches]
        loss = torch.stack(losses).mean()
        if "level" not in start:
            start["level"] = max(_of_first(loss), _LEAST_LEVEL)
        return loss / start["level"]


def _of_first(value: Tensor) -> float:
    """The first process's number: rounding may differ between devices, and all must weigh alike."""
    return float(first_of_processes(value.detach()))


def consistency_loss(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(p || p~): summed over classes, averaged over the batch, differentiated through both sides (the parent)."""
    log_p = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=1)
    log_q = F.log_softmax(masked_logits.to(log_p.dtype), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
