"""Label-free saliency of a network and a layer: one forward pass, no gradient, no class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import evaluating, layer_named
from medsd.saliency.hidden import tapped
from medsd.saliency.method import Target, check_images, finite


@dataclass(frozen=True, eq=False)
class LabelFree:
    """A `Method` that looks at a layer's activations alone.

    Args:
        network: any module, an encoder without a head too. It runs in eval mode and is left as it was.
        layer: name of the module whose activations (B, C, h, w) are taken apart.
        map_of: maps (B, h, w) of activations: `eigencam`, `partial(tsm, ranks="half")`, another of `label_free`.

    Raises:
        ConfigError: no layer is named.
        NetworkError: the network has no such layer.

    Example:
        >>> from torchvision.models import resnet18
        >>> from medsd.saliency.label_free import eigencam
        >>> LabelFree(resnet18(), "layer3", eigencam)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 4, 4])
    """

    network: nn.Module
    layer: str | None
    map_of: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.layer is None:
            raise ConfigError("layer=None: label-free methods take a layer's activations apart; name a layer")
        layer_named(self.network, self.layer)

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w) of images (B, C, H, W), see `Method`; the target is not looked at."""
        assert self.layer is not None
        return finite(self.map_of(activations(self.network, self.layer, x)), self.layer)


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
