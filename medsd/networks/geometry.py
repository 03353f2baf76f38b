"""Where in the image a network looks: strides, receptive fields and halos, measured on the network itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.networks.classifier import Classifier
from medsd.networks.modes import map_of_layer, recorded
from medsd.networks.tokens import token_stride

_PROBE_HEIGHT_PX = 32
# Of the largest feature: far above rounding, far below what another pixel makes.
_SAME = 1e-4
_PROBE_WIDTHS_PX = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class ReceptiveField:
    """What one cell of a feature map sees of the image, in image pixels along one axis.

    Cell j sees the pixels first + j * stride to last + j * stride.

    Attributes:
        stride: image pixels between neighbouring cells.
        first, last: first and last pixel that cell 0 sees (the first is negative for padded networks).
    """

    stride: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of pixels that a cell sees."""
        return self.last - self.first + 1

    @property
    def centre(self) -> float:
        """Centre of what cell 0 sees, in pixels from the image's edge; half a stride would be the cell's own centre.

        Padded stride-2 convolutions look at the top left of their cell: ResNets have 0.5 at every depth.
        """
        return (self.first + self.last + 1) / 2


def measure_fields(classifier: Classifier, layers: Sequence[str]) -> tuple[dict[str, ReceptiveField], ReceptiveField]:
    """Measure receptive fields on the network: NaN put into one image column marks every cell that depends on it.

    NaN survives any weight, gate and pooling, so what is found is the structure, not the present weights (our choice).
    The classifier itself stays untouched: a copy on the CPU is probed, where convolutions are summed directly (fast
    algorithms of accelerators mix neighbouring windows and carry NaN further than the network looks). The fields hold
    for images whose sides are multiples of the features' stride.

    Args:
        classifier: convolutional.
        layers: names of modules of its encoder, in any order.

    Returns:
        The fields of the layers by name, and that of the features; both along x.

    Raises:
        NetworkError: a cell depends on the whole image (squeeze-excite, attention, group normalisation), so that
            the network has no halo; a stride is not a whole number; or a layer does not exist, does not run, is not
            a feature map or does not see the image.

    Example:
        >>> from medsd.networks.classifier import TileClassifier
        >>> fields, features = measure_fields(TileClassifier("test_resnet"), ["layer1", "layer2"])
        >>> fields["layer1"].stride, fields["layer2"].stride, features.stride
        (4, 8, 32)
    """
    check_local(classifier)
    classifier = copy.deepcopy(classifier).to("cpu", torch.float32).eval()
    for width in _PROBE_WIDTHS_PX:
        middle = width // 2
        # One image with a band of NaN tells at little cost whether this width is enough.
        bands = _reached(classifier, layers, [slice(middle, middle + _PROBE_HEIGHT_PX)], width)
        if any(band[0, 0] or band[0, -1] for band in bands):
            continue
        # One image a phase of the stride, each with its column in the middle of the width.
        columns = range(middle, middle + max(_stride(band, width) for band in bands))
        marked = _reached(classifier, layers, [slice(column, column + 1) for column in columns], width)
        named = zip(("its features", *(f"layer '{layer}'" for layer in layers)), marked, strict=True)
        features, *hidden = [
            _field(f"{classifier.encoder_name}: {name}", cells, columns, width) for name, cells in named
        ]
        _check_shifts(classifier, features)
        return dict(zip(layers, hidden, strict=True)), features
    raise NetworkError(
        f"{classifier.encoder_name}: a feature sees more than {_PROBE_WIDTHS_PX[-1]} px (global operations such as "
        "squeeze-excite or attention, or very many layers), so there is no dense map; choose a plain convolutional "
        "encoder such as 'resnet18'"
    )


def check_local(classifier: Classifier) -> None:
    """Raises NetworkError: the encoder is a vision transformer, whose tokens see the whole image."""
    if token_stride(classifier.encoder) is not None:
        raise NetworkError(
            f"{classifier.encoder_name}: every token sees the whole image (attention), so there is no dense map; "
            "choose a convolutional encoder such as 'resnet18', or map tile by tile"
        )


def _check_shifts(classifier: Classifier, field: ReceptiveField) -> None:
    """That a crop whose edges are multiples of the stride gives the whole image's features, but for what edges reach.

    Noise, with one stride left out at the left and at the right: padding by the image's size, as in TensorFlow, is
    right where it comes out the same for each multiple of the stride, and found here where it does not.
    """
    stride = field.stride
    edge = math.ceil(field.size / stride) + 1
    width = (2 * edge + 4) * stride
    height = math.ceil(_PROBE_HEIGHT_PX / stride) * stride
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, *parts = (classifier.feature_map(x) for x in (image, image[..., stride:], image[..., :-stride]))
    inner = whole[..., edge + 1 : -edge - 1]
    for start, part in zip((edge, edge + 1), parts, strict=True):
        found = part[..., start : start + inner.shape[-1]]
        if found.shape != inner.shape or not torch.allclose(
            found, inner, rtol=0, atol=_SAME * float(inner.abs().max())
        ):
            raise NetworkError(
                f"{classifier.encoder_name}: crops at multiples of its stride of {stride} px give other features than "
                "the whole image (padding or resampling by the image's size), so there is no dense map; choose a plain "
                "convolutional encoder such as 'resnet18'"
            )


def _reached(classifier: Classifier, layers: Sequence[str], marks: list[slice], width: int) -> list[Tensor]:
    """Which cells of the features and of each layer (images, cells along x) see each image's marked columns."""
    probe = torch.zeros(len(marks), 3, _PROBE_HEIGHT_PX, width)
    for image, columns in enumerate(marks):
        probe[image, :, :, columns] = math.nan
    with torch.no_grad(), ExitStack() as stack:
        outputs = [stack.enter_context(recorded(classifier.encoder, layer)) for layer in layers]
        features = classifier.feature_map(probe)
    hidden = [map_of_layer(layer, output, probe) for layer, (output,) in zip(layers, outputs, strict=True)]
    return [cells.isnan().any(dim=2).any(dim=1) for cells in (features, *hidden)]


def _field(name: str, reached: Tensor, columns: range, width: int) -> ReceptiveField:
    """The receptive field, from the cells that each image's column reached."""
    stride = _stride(reached, width)
    firsts, lasts = [], []
    for image, column in enumerate(columns):
        cells = reached[image].nonzero().flatten().tolist()
        if cells:  # a convolution of stride 2 and kernel 1 x 1 leaves columns out
            firsts.append(column - cells[-1] * stride)
            lasts.append(column - cells[0] * stride)
    if not firsts:
        raise NetworkError(f"{name} does not depend on the image, so there is no map of it; choose another layer")
    return ReceptiveField(stride, min(firsts), max(lasts))


def _stride(cells: Tensor, width: int) -> int:
    count = cells.shape[-1]
    if width % count:
        raise NetworkError(
            f"{width} px give {count} cells, so the stride is not a whole number; choose an encoder whose "
            "convolutions are padded, such as 'resnet18'"
        )
    return width // count
