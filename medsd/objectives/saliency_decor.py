"""The SaliencyDecor objective (arXiv 2604.25315): cross-entropy, consistency under masking, decorrelation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss, default_group_size
from medsd.objectives.masking import Fill, Ranking, SaliencyPass, mask_lowest, pixel_scores, scores_of
from medsd.training.terms import Terms

Mode = Literal["cov", "zca", "corr", "layer"]
Decorrelated = Literal["clean", "both"]


@dataclass(frozen=True)
class SaliencyDecor:
    """CE(z, y) + consistency * KL(p || p~) + decorrelation * L_dec(F).

    Only the abstract of the paper and a digest were readable: the three parts are the paper's; the masking step is
    that of its parent, Saliency Guided Training (released code); that decorrelation is ZCA whitening is the digest's
    word; constants and the other forms of L_dec are our choice. `decorrelation=0` is Saliency Guided Training,
    `consistency=0` is decorrelation alone, both 0 is plain cross-entropy, bit for bit.

    Attributes:
        consistency: weight of the KL term (lambda).
        decorrelation: weight of the decorrelation term (mu) after the ramp.
        masked_share: share of pixels masked (rho).
        ramp_epochs: epochs over which the decorrelation weight rises from 0.
        ranking: pixels are ranked by the "absolute" input gradient or by the "signed" one (the parent's default).
        fill: masked pixels become "uniform" noise in the image's range or the channel "mean".
        mode: form of L_dec, see `decorrelation_loss`: "cov", "zca", "corr"; "layer" has no L_dec, since the network's
            head is a `WhitenedHead`.
        group_size: channels are decorrelated in shuffled groups of this size; None: all at once, but for "zca" half the
            batch where that is less than all needs (`default_group_size`).
        decorrelated: features of the "clean" images, or the mean of the term over "both" batches.
        saliency_pass: where the ranking's gradient comes from. "eval": a pass of its own with BatchNorm's running
            statistics (the parent). "shared": the clean batch's own pass, which saves one of three forward passes (our
            choice); for networks without BatchNorm and dropout it is the same gradient.

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
    masked_share: float = 0.5
    ramp_epochs: float = 5.0
    ranking: Ranking = "absolute"
    fill: Fill = "uniform"
    mode: Mode = "cov"
    group_size: int | None = None
    decorrelated: Decorrelated = "clean"
    saliency_pass: SaliencyPass = "eval"

    def __post_init__(self) -> None:
        for name in ("consistency", "decorrelation", "ramp_epochs"):
            check_number(name, getattr(self, name), "[0, inf)")
        check_number("masked_share", self.masked_share, "[0, 1)")
        if self.group_size is not None:
            hint = "null for all channels at once"
            check_number("group_size", self.group_size, "[2, inf)", whole=True, hint=hint)
        check_choice("ranking", self.ranking, get_args(Ranking))
        check_choice("fill", self.fill, get_args(Fill))
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("decorrelated", self.decorrelated, get_args(Decorrelated))
        check_choice("saliency_pass", self.saliency_pass, get_args(SaliencyPass))

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """The loss of one batch; the network is left in the mode it was in.

        Args:
            network: offers `features(x)` (B, d) and a linear `head`, as `TileClassifier` does.
            x: (B, C, H, W) float images, as the network takes them.
            labels: (B,) class numbers.
            epoch: epochs done so far, fractions allowed; drives the ramp.
            generator: draws the fill noise and the groups of channels, on the device of `x`.

        Raises:
            TrainingError: the batch is too small for the statistics.
            ConfigError: `mode` is "layer" and the head does not whiten, or `masked_share` masks no pixel.
        """
        head = network.head
        assert isinstance(head, nn.Module)
        if self.mode == "layer" and not isinstance(head, WhitenedHead):
            raise ConfigError("mode='layer': the network's head must whiten its features; set whitening to true")
        masking = self.consistency > 0
        shared = masking and self.saliency_pass == "shared"
        if masking and not shared:
            scores = pixel_scores(network, x, labels, self.ranking)
        x = x.detach().requires_grad_(shared)
        features: Tensor = network.features(x)  # type: ignore[operator]
        logits: Tensor = head(features)
        if shared:
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), x, retain_graph=True)
            scores = scores_of(gradient, self.ranking)
        cross_entropy = F.cross_entropy(logits, labels)
        total = cross_entropy
        parts = {"cross_entropy": cross_entropy}
        penalised = [features]
        if masking:
            masked = mask_lowest(x, scores, self.masked_share, self.fill, generator)
            penalised.append(network.features(masked))  # type: ignore[operator]
            parts["consistency"] = consistency_loss(logits, head(penalised[1]))
            total = total + self.consistency * parts["consistency"]
        if self.decorrelation > 0 and self.mode != "layer":
            chosen = penalised if self.decorrelated == "both" else penalised[:1]
            losses = [self._decorrelation(batch, generator) for batch in chosen]
            parts["decorrelation"] = torch.stack(losses).mean()
            ramp = min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs > 0 else 1.0
            total = total + ramp * self.decorrelation * parts["decorrelation"]
        return Terms(total, {name: part.detach() for name, part in parts.items()}, logits.detach())

    def _decorrelation(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        assert self.mode != "layer"
        size = self.group_size
        if size is None and self.mode == "zca":
            size = default_group_size(len(features) * idist.get_world_size(), features.shape[1])
        return decorrelation_loss(features, self.mode, size, generator)


def consistency_loss(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(p || p~): summed over classes, averaged over the batch, differentiated through both sides (the parent)."""
    log_p = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=1)
    log_q = F.log_softmax(masked_logits.to(log_p.dtype), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
