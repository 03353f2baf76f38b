"""Feature decorrelation of Med-MoCo: features whitened before the projector, or in the encoder's last block."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import NetworkError, TrainingError
from medsd.networks.moments import feature_moments, first_of_processes, group_channels
from medsd.networks.whitening import inverse_root, newton_inverse_root


@dataclass(frozen=True)
class ShuffledWhitening:
    """Exact ZCA whitening of a batch's features in groups of channels that are drawn anew at each step.

    The groups are those of Shuffled-DBN (Hua et al., ICCV 2021), by which all pairs of channels meet in time with
    batches too small for all channels at once. No statistics are kept: it is for training alone and is left out
    afterwards, so that the encoder stays a plain one. Its own output is white by construction; collapse is measured
    before it.

    Attributes:
        group_size: channels whitened together, at least 2; as many as there are channels at most. Best at most half
            the samples.
        eps: added to the covariance's eigenvalues l, so that those of the output are l / (l + eps).

    Raises:
        ConfigError: a value is out of its range.
    """

    group_size: int = 64
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_number("group_size", self.group_size, "[2, inf)", whole=True)
        check_number("eps", self.eps, "(0, inf)")

    def __call__(self, features: Tensor, order: Tensor) -> Tensor:
        """Whitened features of the same shape, float32 or float64 whatever the autocast, gradients included.

        Args:
            features: (B, d, h, w), every place a sample, or (B, d). Moments are those of all processes.
            order: (d,) channel numbers in random order, neighbours of which make a group; the first process's counts on
                all.

        Raises:
            TrainingError: fewer samples than channels in a group, or features that are not finite.
        """
        samples = features.movedim(1, -1)
        flat = samples.flatten(0, -2)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        order = first_of_processes(order.to(flat.device, non_blocking=True))
        groups = group_channels(order, min(self.group_size, len(order)))
        # Groups of one size are one batch, for many small decompositions would take a GPU longer than the encoder.
        batches = [torch.stack(list(same)) for _, same in groupby(groups, len)]
        with torch.autocast(flat.device.type, enabled=False):
            whitened = torch.cat([self._whitened(flat[:, each]) for each in batches], dim=1)
        return whitened[:, order.argsort()].view(samples.shape).movedim(-1, 1)

    def _whitened(self, groups: Tensor) -> Tensor:
        """(N, G * c) of groups (N, G, c)."""
        features = groups.movedim(1, 0)
        moments = feature_moments(features)
        if moments.count < features.shape[2]:
            raise TrainingError(
                f"group_size={self.group_size}: a batch gives {moments.count} samples at once, fewer than the channels "
                "that are whitened together; raise pretrain_batch_size, or lower accumulation or group_size"
            )
        try:
            root = inverse_root(moments.covariance, self.eps)
        except TrainingError as error:
            raise TrainingError(
                "features: not finite any more, so that they cannot be whitened; lower the learning rate (pretrain_lr) "
                "in another output_dir; this one keeps its last checkpoint"
            ) from error
        return ((features - moments.mean) @ root).movedim(0, 1).flatten(1)


class IterNorm(nn.Module):
    """Iterative normalisation (Huang et al., arXiv 1904.03441) of all channels in one group, in place of a BatchNorm.

    Moments are those of all processes, gradients included. The running mean and whitening matrix follow them and
    take their place in evaluation mode; the first 1 / `momentum` batches count alike (our choice), so that nothing of
    the initial identity is left.

    Args:
        channels: d of maps (B, d, h, w).
        iterations: of Newton, see `newton_inverse_root`; with 5 the layer damps strong directions and does not whiten.
        eps: added to the covariance's diagonal.
        momentum: weight of a new batch in the running statistics, above 0, at most 1.

    Raises:
        ConfigError: one of these is not as described.
    """

    running_mean: Tensor
    running_whitening: Tensor
    running_variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, iterations: int = 5, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_number("iterations", iterations, "[1, inf)", whole=True)
        check_number("eps", eps, "(0, inf)")
        check_number("momentum", momentum, "(0, 1]")
        self.iterations, self.eps, self.momentum = iterations, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_whitening", torch.eye(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, maps: Tensor) -> Tensor:
        """Normalised maps of the same shape, in the parameters' precision whatever the autocast.

        Raises:
            TrainingError: fewer than two samples in training mode.
        """
        maps = maps.to(self.weight.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            if not self.training:
                return F.conv2d(maps, *self.as_convolution())
            places = maps.movedim(1, -1)
            moments = feature_moments(places.flatten(0, -2))
            covariance = moments.covariance * ((moments.count - 1) / moments.count)
            whitening = newton_inverse_root(covariance, self.eps, self.iterations)
            self._follow(moments.mean.detach(), whitening.detach(), covariance.detach())
            whitened = (places - moments.mean) @ whitening
            return (whitened * self.weight + self.bias).movedim(-1, 1)

    def as_convolution(self) -> tuple[Tensor, Tensor]:
        """Weight (d, d, 1, 1) and bias (d,) of the 1 x 1 convolution that the layer is in evaluation mode."""
        matrix = self.weight[:, None] * self.running_whitening
        return matrix[..., None, None], self.bias - matrix @ self.running_mean

    @torch.no_grad()
    def _follow(self, mean: Tensor, whitening: Tensor, covariance: Tensor) -> None:
        self.batches += 1
        weight = max(self.momentum, 1 / int(self.batches))
        self.running_mean.lerp_(mean, weight)
        self.running_whitening.lerp_(whitening, weight)
        self.running_variance.lerp_(((whitening @ covariance) * whitening).sum(dim=1), weight)


def put_iter_norm(encoder: nn.Module, iterations: int = 5) -> str:
    """Replace the BatchNorm that ends the encoder's last block by `IterNorm`, whose scale and shift are its own.

    Returns:
        The layer's name.

    Raises:
        NetworkError: the encoder does not end its blocks with a convolution and a BatchNorm, as ResNets do.
    """
    names: list[str] = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.BatchNorm2d) and "downsample" not in name  # that one is not on the residual branch
    ]
    norm = encoder.get_submodule(names[-1]) if names else None
    if type(norm) is not nn.BatchNorm2d or norm.weight is None:
        raise NetworkError(
            f"decorrelation='w1': {type(encoder).__name__} has no plain BatchNorm that ends its last block; choose a "
            "ResNet, or 'w2'"
        )
    _convolution_before(encoder, names[-1], norm.num_features)
    layer = IterNorm(norm.num_features, iterations).to(norm.weight)
    layer.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    encoder.set_submodule(names[-1], layer)
    return names[-1]


def without_iter_norm(encoder: nn.Module, name: str) -> nn.Module:
    """A copy of the encoder without its `IterNorm`, the same function in evaluation mode.

    The running whitening goes into the weights of the convolution before it; a plain BatchNorm with the statistics of
    whitened features stands in its place, so that training on does not start with other ones.
    """
    encoder = copy.deepcopy(encoder)
    layer = encoder.get_submodule(name)
    if not isinstance(layer, IterNorm):
        raise TypeError(f"'{name}' is no IterNorm")
    norm = nn.BatchNorm2d(len(layer.weight)).to(layer.weight)
    convolution = _convolution_before(encoder, name, len(layer.weight))
    with torch.no_grad():
        convolution.weight.copy_(torch.einsum("oc,cihw->oihw", layer.running_whitening, convolution.weight))
        if convolution.bias is not None:
            convolution.bias.copy_(layer.running_whitening @ convolution.bias)
        norm.running_mean = layer.running_whitening @ layer.running_mean
        norm.running_var = layer.running_variance.clone()
        norm.weight.copy_(layer.weight * (layer.running_variance + norm.eps).sqrt())
        norm.bias.copy_(layer.bias)
    encoder.set_submodule(name, norm)
    return encoder


def _convolution_before(encoder: nn.Module, name: str, channels: int) -> nn.Conv2d:
    before: nn.Module | None = None
    for other, module in encoder.named_modules():
        if other == name:
            break
        before = module if isinstance(module, nn.Conv2d) else before
    if not isinstance(before, nn.Conv2d) or before.out_channels != channels or before.groups > 1:
        raise NetworkError(
            f"decorrelation='w1': no convolution stands before '{name}' of {type(encoder).__name__}; choose 'w2'"
        )
    return before
