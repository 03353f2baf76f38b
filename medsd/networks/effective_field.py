"""Where a layer's cells really look, measured by gradients.

The middle of what a cell can see is not it: paths through average pools, as the shortcuts of ResNet-D have them, weigh
more than those through strided convolutions, and where every cell sees the whole image it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.networks.classifier import Classifier
from medsd.networks.modes import evaluating, full_name, map_of_layer, recorded
from medsd.networks.tokens import token_stride

_IMAGES = 16
_HEIGHT_PX, _WIDTH_PX = 64, 256
# Below this share of the peak the energy is that of the far image, not of the cell's own surroundings.
_FLANK = 0.1


@dataclass(frozen=True)
class EffectiveField:
    """Where the cells of a layer look along one axis, in image pixels: cell j looks at centre + j * stride.

    Attributes:
        stride: image pixels between neighbouring cells.
        centre: where cell 0 looks, from the image's edge; half a stride would be its own middle.
    """

    stride: int
    centre: float


def measure_effective_field(classifier: Classifier, layer: str | None) -> EffectiveField:
    """The centre of gravity of a cell's squared input gradient, without what all of the image adds alike.

    The effective receptive field of Luo et al. 2016 (arXiv 1701.04128), over 16 images of noise and one random mixture
    of channels each, all from a fixed seed. Squeeze-excite, attention and pooled branches let a cell see everything:
    what it has in common with the mean of all cells is taken off, and of what is left the median over the columns (our
    choice). Good to about a fifth of the stride in the networks tried; unlike `measure_fields`, which gives exact
    limits, it follows the present weights. A token of a vision transformer is taken to look at the middle of its patch,
    and is not measured (our choice).

    Args:
        classifier: left as it was.
        layer: of its encoder; None for the map that is pooled.

    Raises:
        NetworkError: no such layer; it gives no feature map or does not run; a stride is not a whole number.
    """
    name = layer or "last"
    if (stride := token_stride(classifier.encoder)) is not None:
        if layer is not None:
            full_name(classifier.encoder, layer)
        return EffectiveField(stride, stride / 2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, _HEIGHT_PX, _WIDTH_PX, generator=generator).to(classifier.device).requires_grad_()
    with evaluating(classifier), torch.enable_grad():
        cells = _cells(classifier, layer, images)
        mixture = torch.randn(cells.shape[:2], generator=generator).to(classifier.device)
        stride, left_over = divmod(_WIDTH_PX, cells.shape[3])
        if left_over:
            raise NetworkError(
                f"layer '{name}': {_WIDTH_PX} px give {cells.shape[3]} cells, so the stride is not a whole number; "
                "choose another layer or encoder"
            )
        row, column = cells.shape[2] // 2, cells.shape[3] // 2
        own = cells[:, :, row, column] - cells.mean(dim=(2, 3))
        (gradient,) = torch.autograd.grad((own * mixture).sum(), images)
    # Images count alike, or one of them would decide.
    energies = gradient.double().square().sum(dim=(1, 2)).cpu()
    energy = (energies / energies.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).sum(dim=0)
    energy = (energy - energy.median()).clamp_min(0)
    energy[energy < _FLANK * energy.max()] = 0
    if not energy.sum() > 0:
        raise NetworkError(f"layer '{name}': its cells look nowhere in particular (dead weights); train it first")
    centre = float((energy * (torch.arange(_WIDTH_PX) + 0.5)).sum() / energy.sum())
    return EffectiveField(stride, centre - column * stride)


def _cells(classifier: Classifier, layer: str | None, images: Tensor) -> Tensor:
    """The layer's map (B, d, h, w)."""
    if layer is None:
        return classifier.feature_map(images)
    with recorded(classifier.encoder, layer) as outputs:
        classifier.feature_map(images)
    return map_of_layer(layer, outputs[0], images)
