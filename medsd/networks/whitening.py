"""ZCA whitening of features, and a linear classifier that learns on whitened ones and is a plain one afterwards."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medsd.checks import check_number
from medsd.errors import TrainingError
from medsd.networks.moments import feature_moments, group_channels


def inverse_root(covariance: Tensor, eps: float) -> Tensor:
    """(S + eps I)^(-1/2), the ZCA whitening matrix, exact, by eigendecomposition.

    Features F times this matrix have covariance eigenvalues l / (l + eps). The gradient is the closed form
    U (K o (U^T G U)) U^T with K_ij = -1 / (s_i s_j (s_i + s_j)), s = sqrt(l + eps), which stays finite where
    eigenvalues coincide; that of `torch.linalg.eigh` does not. It can be taken once, not twice.

    Args:
        covariance: (..., d, d) symmetric, no negative eigenvalues but for rounding; float32 or float64.
        eps: above 0.

    Raises:
        ConfigError: `eps` is not above 0.
        TrainingError: the covariance has no eigendecomposition, mostly because it is not finite.
    """
    check_number("eps", eps, "(0, inf)")
    with torch.autocast(covariance.device.type, enabled=False):
        root: Tensor = _InverseRoot.apply(covariance, eps)  # type: ignore[no-untyped-call]
    return root


def newton_inverse_root(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """An approach to (S + eps I)^(-1/2) by Newton's iteration in its coupled form, which is stable in float32.

    What IterNorm (arXiv 1904.03441) calls P_T / sqrt(tr S): few iterations whiten the directions of most variance
    alone. For one direction, of the share r of the whole variance, what is left is p_T^2 r of
    p <- 1.5 p - 0.5 p^3 r, p_0 = 1. Both forms are the same polynomial in S; the plain one, P <- 1.5 P - 0.5 P^3 S,
    is wrong in float32 after ten iterations. Differentiable any number of times.

    Args:
        covariance: (..., d, d) symmetric, no negative eigenvalues but for rounding; float32 or float64.
        eps: above 0, added to the diagonal first.
        iterations: from 1 on; 15 come close to the root for condition numbers to 1e4.

    Raises:
        ConfigError: `eps` or `iterations` is out of its range.
    """
    check_number("eps", eps, "(0, inf)")
    check_number("iterations", iterations, "[1, inf)", whole=True)
    with torch.autocast(covariance.device.type, enabled=False):
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = covariance + eps * identity
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
        root, inverse = covariance / trace, identity.expand_as(covariance)
        for _ in range(iterations):
            step = (3 * identity - inverse @ root) / 2
            root, inverse = root @ step, step @ inverse
        return inverse / trace.sqrt()


class WhitenedHead(nn.Module):
    """Logits linear in whitened features, in place of a classifier's linear head; costs nothing after training.

    In training mode features are whitened with the batch's own moments (of all processes), gradients included; the
    running moments follow. In evaluation mode the running moments take their place, which makes the head one linear
    map of the features, `weight` and `bias`: identical logits from a plain linear layer, see `folded`. A digest of
    SaliencyDecor (arXiv 2604.25315) names ZCA whitening during training; this head is one reading of it.

    Three things are our choice. The running statistic is the covariance and not the whitening matrix: matrices of
    batches smaller than a group are huge in the directions that a batch does not span, and so is their mean, while
    covariances average to the true one. The groups are neighbouring channels, fixed, so that evaluation applies the
    map that the linear layer learnt on; with groups drawn anew at each step, as the loss draws them, no single matrix
    would be that map. The first 1 / `momentum` batches count alike, so that nothing of the initial identity is left.

    Args:
        feature_dim: channels d of the features.
        classes: number of logits.
        group_size: channels whitened together, None for all; best at most half the batch.
        eps: added to the covariance's eigenvalues.
        momentum: weight of a new batch in the running moments, above 0, at most 1.

    Raises:
        ConfigError: one of these is not as described.
    """

    running_mean: Tensor
    running_covariance: Tensor
    batches: Tensor

    def __init__(
        self,
        feature_dim: int,
        classes: int,
        group_size: int | None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_number("eps", eps, "(0, inf)")
        check_number("momentum", momentum, "(0, 1]")
        groups = group_channels(torch.arange(feature_dim), group_size)
        self._groups = tuple(slice(int(group[0]), int(group[-1]) + 1) for group in groups)
        self.eps, self.momentum = eps, momentum
        self.linear = nn.Linear(feature_dim, classes)
        self.register_buffer("running_mean", torch.zeros(feature_dim))
        self.register_buffer("running_covariance", torch.eye(feature_dim))
        self.register_buffer("batches", torch.tensor(0))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget what was learnt, running moments too."""
        self.linear.reset_parameters()
        self.running_mean.zero_()
        nn.init.eye_(self.running_covariance)
        self.batches.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of features (B, d), B >= 2 over all processes in training mode.

        Raises:
            TrainingError: fewer than two samples in training mode, or features that are not finite.
        """
        features = features.to(self.running_mean.dtype)
        with torch.autocast(features.device.type, enabled=False):
            if not self.training:
                return F.linear(features, self.weight, self.bias)
            moments = feature_moments(features)
            self._follow(moments.mean.detach(), moments.covariance.detach())
            logits: Tensor = self.linear((features - moments.mean) @ self._whitening(moments.covariance))
            return logits

    @property
    def weight(self) -> Tensor:
        """(classes, d) of the linear map that the head is in evaluation mode."""
        return self.linear.weight @ self._whitening(self.running_covariance)

    @property
    def bias(self) -> Tensor:
        """(classes,) of that linear map."""
        return self.linear.bias - self.weight @ self.running_mean

    def folded(self) -> nn.Linear:
        """A plain linear layer with the logits of this head in evaluation mode."""
        classes, dim = self.linear.weight.shape
        linear = nn.Linear(dim, classes, device="meta")  # no random numbers are drawn for weights that are replaced
        linear.load_state_dict({"weight": self.weight.detach(), "bias": self.bias.detach()}, assign=True)
        return linear.requires_grad_()

    @torch.no_grad()
    def _follow(self, mean: Tensor, covariance: Tensor) -> None:
        self.batches += 1
        weight = max(self.momentum, 1 / int(self.batches))
        self.running_mean.lerp_(mean, weight)
        self.running_covariance.lerp_(covariance, weight)

    def _whitening(self, covariance: Tensor) -> Tensor:
        roots = [inverse_root(covariance[group, group], self.eps) for group in self._groups]
        whitening: Tensor = torch.block_diag(*roots)  # type: ignore[no-untyped-call]
        return whitening


class _InverseRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, eps: float) -> Tensor:
        try:
            eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise TrainingError(
                "features: their covariance cannot be whitened, most likely since it is not finite; lower the "
                "learning rate (lr) or the decorrelation weight"
            ) from error
        # Rounding makes eigenvalues of a covariance negative, in float32 by more than a small eps.
        roots = (eigenvalues.clamp(min=0) + eps).sqrt()
        ctx.save_for_backward(roots, vectors)
        root: Tensor = (vectors / roots[..., None, :]) @ vectors.mT
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        roots, vectors = ctx.saved_tensors
        rows, columns = roots[..., :, None], roots[..., None, :]
        with torch.autocast(gradient.device.type, enabled=False):
            inner = vectors.mT @ ((gradient + gradient.mT) / 2) @ vectors
            result: Tensor = vectors @ (-inner / (rows * columns * (rows + columns))) @ vectors.mT
        return result, None
