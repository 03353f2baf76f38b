"""The SaliencyDecor objective (arXiv 2604.25315): cross-entropy, consistency under masking, decorrelation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.finetune.decorrelation import covariance_penalty
from medsd.finetune.masking import Fill, Ranking, mask_lowest, pixel_scores


@dataclass(frozen=True)
class Terms:
    """The parts of the loss, scalars; `total` carries the graph, the weighted sum to call backward on."""

    total: Tensor
    cross_entropy: Tensor
    consistency: Tensor
    decorrelation: Tensor
    logits: Tensor


@dataclass(frozen=True)
class SaliencyDecor:
    """CE(z, y) + consistency * KL(p || p~) + decorrelation * L_dec(F).

    Only the abstract of the paper and a digest were readable: the three parts are the paper's; the masking step is
    that of its parent, Saliency Guided Training (released code); constants and the form of L_dec are our choice.

    Attributes:
        consistency: weight of the KL term (lambda).
        decorrelation: weight of the decorrelation term (mu) after the ramp.
        masked_share: share of pixels masked (rho).
        ramp_epochs: epochs over which the decorrelation weight rises from 0.
        ranking: pixels are ranked by the "absolute" input gradient or by the "signed" one (the parent's default).
        fill: masked pixels become "uniform" noise in the image's range or the channel "mean".
    """

    consistency: float = 1.0
    decorrelation: float = 0.1
    masked_share: float = 0.5
    ramp_epochs: float = 5.0
    ranking: Ranking = "absolute"
    fill: Fill = "uniform"

    def __post_init__(self) -> None:
        for name in ("consistency", "decorrelation", "ramp_epochs"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.masked_share < 1:
            raise ConfigError(f"masked_share={self.masked_share}: must lie in 0 to 1, 1 excluded")
        if self.ranking not in ("absolute", "signed"):
            raise ConfigError(f"ranking='{self.ranking}': use 'absolute' or 'signed'")
        if self.fill not in ("uniform", "mean"):
            raise ConfigError(f"fill='{self.fill}': use 'uniform' or 'mean'")

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """The loss of one batch; the network is left in the mode it was in.

        Args:
            network: offers `features(x)` (B, d) and a linear `head`, as `TileClassifier` does.
            x: (B, C, H, W) float images, as the network takes them.
            labels: (B,) class numbers.
            epoch: epochs done so far, fractions allowed; drives the ramp.
            generator: draws the fill noise, on the device of `x`.
        """
        head = network.head
        assert isinstance(head, nn.Module)
        if self.consistency > 0:
            scores = pixel_scores(network, head, x, labels, self.ranking)
            masked = mask_lowest(x, scores, self.masked_share, self.fill, generator)
        features: Tensor = network.features(x)  # type: ignore[operator]
        logits: Tensor = head(features)
        cross_entropy = F.cross_entropy(logits, labels)
        total = cross_entropy
        consistency = decorrelation = torch.zeros_like(cross_entropy)
        if self.consistency > 0:
            consistency = consistency_loss(logits, head(network.features(masked)))  # type: ignore[operator]
            total = total + self.consistency * consistency
        if self.decorrelation > 0:
            decorrelation = covariance_penalty(features)
            ramp = min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs > 0 else 1.0
            total = total + ramp * self.decorrelation * decorrelation
        return Terms(total, cross_entropy.detach(), consistency.detach(), decorrelation.detach(), logits.detach())


def consistency_loss(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(p || p~): summed over classes, averaged over the batch, differentiated through both sides (the parent)."""
    log_p = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=1)
    log_q = F.log_softmax(masked_logits.to(log_p.dtype), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
