"""Label-free saliency methods for a network and a layer: one forward pass, no gradient, no class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import evaluating
from medsd.saliency.hidden import tapped
from medsd.saliency.label_free.decomposition import Ranks
from medsd.saliency.label_free.maps import (
    Variant,
    Weights,
    channel_energy,
    eigencam,
    mean_map,
    mtsm,
    multivec_eigencam,
    tsm,
)
from medsd.saliency.method import Target, check_images, finite, layer_named


def activations(network: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What a layer gives, (B, C, h, w), in eval mode and without a graph; the network's output is not looked at.

    The whole network runs: to stop behind the layer would take an exception through code that is not ours.

    Args:
        x: (B, C, H, W) float images, as the network takes them.

    Raises:
        DatasetError: an empty batch, or not (B, C, H, W) float.
        NetworkError: no such layer, it was not reached, gives no map (B, C, h, w), or one that is not finite.
    """
    check_images(x)
    with evaluating(network), torch.no_grad(), tapped(network, layer_named(network, layer)) as hidden:
        network(x)
    features = hidden.activation.detach()
    if len(features) != len(x):
        raise NetworkError(f"layer '{layer}': gives {len(features)} maps for {len(x)} images; choose another layer")
    finite(features, layer)
    return features


@dataclass(frozen=True, eq=False)
class _LabelFree(ABC):
    """A `Method` that looks at a layer's activations alone.

    Args:
        network: any module, an encoder without a head too. It runs in eval mode and is left as it was.
        layer: name of the module whose activations (B, C, h, w) are taken apart.

    Raises:
        ConfigError: no layer is named.
        NetworkError: the network has no such layer.
    """

    network: nn.Module
    layer: str | None

    def __post_init__(self) -> None:
        layer_named(self.network, self._layer)

    @property
    def _layer(self) -> str:
        if self.layer is None:
            raise ConfigError("layer=None: label-free methods take a layer's activations apart; name a layer")
        return self.layer

    @abstractmethod
    def map_of(self, features: Tensor) -> Tensor:
        """Maps (B, h, w) of activations (B, C, h, w)."""

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w) of images (B, C, H, W), see `Method`; the target is not looked at."""
        return finite(self.map_of(activations(self.network, self._layer, x)), self._layer)


@dataclass(frozen=True, eq=False)
class EigenCAM(_LabelFree):
    """The first principal map of the activations, signed; see `eigencam`."""

    variant: Variant = "sign_fixed"

    def map_of(self, features: Tensor) -> Tensor:
        return eigencam(features, self.variant)


@dataclass(frozen=True, eq=False)
class MultivecEigenCAM(_LabelFree):
    """The magnitudes of all singular vectors' maps, summed; see `multivec_eigencam`."""

    centred: bool = True
    weights: Weights = "a"

    def map_of(self, features: Tensor) -> Tensor:
        return multivec_eigencam(features, self.centred, self.weights)


@dataclass(frozen=True, eq=False)
class TSM(_LabelFree):
    """The magnitude of the first Tucker channel vector's map; see `tsm`."""

    ranks: Ranks = None
    n_iter_max: int = 100
    tol: float = 1e-4

    def map_of(self, features: Tensor) -> Tensor:
        return tsm(features, self.ranks, self.n_iter_max, self.tol)


@dataclass(frozen=True, eq=False)
class MTSM(_LabelFree):
    """The magnitudes of all Tucker channel vectors' maps, summed; see `mtsm`."""

    ranks: Ranks = None
    weights: Weights = "a"
    n_iter_max: int = 100
    tol: float = 1e-4

    def map_of(self, features: Tensor) -> Tensor:
        return mtsm(features, self.ranks, self.weights, self.n_iter_max, self.tol)


@dataclass(frozen=True, eq=False)
class MeanMap(_LabelFree):
    """The mean of the channels, signed."""

    def map_of(self, features: Tensor) -> Tensor:
        return mean_map(features)


@dataclass(frozen=True, eq=False)
class ChannelEnergy(_LabelFree):
    """The sum of the squared channels."""

    def map_of(self, features: Tensor) -> Tensor:
        return channel_energy(features)
