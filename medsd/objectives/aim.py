"""The AIM objective (arXiv 2508.11502): cross-entropy of every stage, and masks drawn to a target size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import NetworkError
from medsd.networks.aim import AimClassifier
from medsd.training.terms import Terms


@dataclass(frozen=True)
class AimObjective:
    """CE(z, y) + sum_l CE(z_l, y) + mask_weight * sum_l (r_l - tau)^2, with r_l the open share of stage l's mask.

    The sum over stages, the penalty on both sides of tau, its weight of 6 and the fall of tau from 1 to the target are
    the paper's (as told by readers of it; its body was not readable). The term of the merged map, r_l over the batch
    instead of per image, the length of the fall and the noise-free end (as in Verelst and Tuytelaars' released code)
    are our choice. The paper's tau falls once an epoch, ours with every step; they agree at whole epochs.

    In our trials small masks turned a classifier away from a cue that always goes with the class where the cue is
    diffuse (weak at a position, plain in the mean) and the encoder already knows the objects (pre-trained); not where a
    single position tells the cue, nor with an untrained encoder. Measure it on data without the cue.

    Under torch.distributed r_l is that of the rank's own batch, and with accumulation that of a piece: the mean of
    (r_l - tau)^2 over them is above that of the whole batch by the variance of r_l between them.

    Attributes:
        max_epochs: length of the training, to which the two shares refer.
        mask_target: open share of every mask after the fall (the paper: 0.25 or 0.35).
        mask_weight: lambda; 0 leaves the size of the masks to the cross-entropy.
        anneal_share: share of the epochs in which tau falls from 1 to the target; 0 starts at the target.
        noise_off_share: share of the epochs, the last ones, without Gumbel noise.

    Raises:
        ConfigError: a value lies outside its range.
    """

    max_epochs: int
    mask_target: float = 0.25
    mask_weight: float = 6.0
    anneal_share: float = 0.3
    noise_off_share: float = 0.2

    def __post_init__(self) -> None:
        check_number("max_epochs", self.max_epochs, "[1, inf)")
        check_number("mask_target", self.mask_target, "(0, 1]")
        check_number("mask_weight", self.mask_weight, "[0, inf)")
        check_number("anneal_share", self.anneal_share, "[0, 1]")
        check_number("noise_off_share", self.noise_off_share, "[0, 1]")

    def target_at(self, epoch: float) -> float:
        """tau after `epoch` epochs: 1 at the start, falling linearly to the target, then flat."""
        anneal_epochs = self.anneal_share * self.max_epochs
        done = min(1.0, epoch / anneal_epochs) if anneal_epochs > 0 else 1.0
        return 1 - (1 - self.mask_target) * done

    def complete_from(self, network: nn.Module) -> int:
        """The first epoch, counted from 1, at whose end tau has reached the target; before, masks are still to close.

        That is the first of all where nothing closes masks, or there are none.
        """
        if self._weight(network) == 0:
            return 1
        return next(epoch for epoch in count(1) if self.target_at(epoch) - self.mask_target < 1e-6)

    def noise_at(self, epoch: float) -> bool:
        """Whether masks are drawn with Gumbel noise after `epoch` epochs."""
        return epoch < (1 - self.noise_off_share) * self.max_epochs

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """The loss of one batch; arguments as in `medsd.training.terms.Objective`.

        The parts are `cross_entropy` (merged map), `stage_cross_entropy` (sum over stages), `mask_loss` (without its
        weight), `mask_target` (tau), and for each stage l `mask_share_l` and `mask_share_std_l` (mean and deviation
        over images of the open share) and `empty_share_l` (share of images with an empty mask). Collapse to 0 or 1 is
        the main failure to watch for.

        Raises:
            NetworkError: the network is not an `AimClassifier`.
        """
        if not isinstance(network, AimClassifier):
            raise NetworkError(f"{type(network).__name__}: AIM trains masks; give it an AimClassifier")
        output = network.masked(x, self.noise_at(epoch), generator)
        tau = self.target_at(epoch)
        cross_entropy = F.cross_entropy(output.logits, labels)
        stages = torch.stack([F.cross_entropy(logits, labels) for logits in output.stage_logits]).sum()
        mask_loss = torch.stack([(mask.mean() - tau).square() for mask in output.masks]).sum()
        parts = {
            "cross_entropy": cross_entropy.detach(),
            "stage_cross_entropy": stages.detach(),
            "mask_loss": mask_loss.detach(),
            "mask_target": torch.tensor(tau),
            **_shares(network.stages, output.masks),
        }
        total = cross_entropy + stages + self._weight(network) * mask_loss
        return Terms(total, parts, output.logits.detach())

    def _weight(self, network: nn.Module) -> float:
        """A network without masks has nothing that the loss of their size could change."""
        return self.mask_weight if isinstance(network, AimClassifier) and network.options["masking"] else 0.0


def _shares(stages: Sequence[int], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    parts = {}
    for stage, mask in zip(stages, masks, strict=True):
        shares = mask.detach().mean(dim=(1, 2, 3))
        parts[f"mask_share_{stage}"] = shares.mean()
        parts[f"mask_share_std_{stage}"] = shares.std(correction=0)
        parts[f"empty_share_{stage}"] = (shares == 0).float().mean()
    return parts
