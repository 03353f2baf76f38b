"""What frozen maps say of masks: a linear decoder, and what the maps' stride lets an oracle reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import DatasetError, TrainingError
from medsd.evaluate.mask_scores import dice_per_image
from medsd.evaluate.probes import frozen_maps
from medsd.evaluate.scores import Interval, bootstrap_mean
from medsd.networks.classifier import Normalise
from medsd.segment.linear import LinearDecoder, channel_moments

_AT_ONCE = 32


@dataclass(frozen=True)
class Masked:
    """Maps of a frozen encoder with the masks of their images.

    Attributes:
        maps: (n, d, h, w) on the CPU, as `maps_of` gives them.
        masks: (n, H, W) uint8 class numbers, 0 background.
        groups: (n,) numbers or names that images of one slide, patient or organ share.

    Raises:
        DatasetError: unequal lengths, no images, or masks that are no class numbers.
    """

    maps: Tensor
    masks: Tensor
    groups: npt.NDArray[Any]

    def __post_init__(self) -> None:
        shapes = tuple(self.maps.shape), tuple(self.masks.shape), np.shape(self.groups)
        if [len(shape) for shape in shapes] != [4, 3, 1] or len({shape[0] for shape in shapes}) > 1 or not shapes[2][0]:
            raise DatasetError(
                f"decoder: maps {shapes[0]}, masks {shapes[1]}, groups {shapes[2]}; give (n, d, h, w), (n, H, W), (n,)"
            )
        if self.masks.dtype != torch.uint8:
            raise DatasetError(f"decoder: masks are {self.masks.dtype}; give uint8 class numbers, 0 background")


@dataclass(frozen=True)
class DecoderSettings:
    """The schedule of the linear decoder, one for all encoders (numbers: our choice, by which Dice no longer rises).

    Attributes:
        steps, batch_size: of Adam, its learning rate falling from `lr` to 0 by a cosine.
        lr: at the start, of weights on channels of unit variance.
        weight_decay: Adam's.
        seed: draws the batches; the weights start at 0.

    Raises:
        ConfigError: a number out of its range.
    """

    steps: int = 150
    batch_size: int = 16
    lr: float = 0.02
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, "[1, inf)", whole=True)
        check_number("batch_size", self.batch_size, "[1, inf)", whole=True)
        check_number("lr", self.lr, "(0, inf)")
        check_number("weight_decay", self.weight_decay, "[0, inf)")
        check_number("seed", self.seed, "[0, inf)", whole=True)


_DEFAULT = DecoderSettings()


@dataclass(frozen=True)
class MaskScores:
    """How well masks are read off frozen maps, with 95 % bootstrap intervals over groups.

    Dice is MONAI's, of an image the mean over the classes that its mask has, without background; images whose mask is
    empty have none and are left out.

    Attributes:
        dice: mean over test images of the decoder's.
        oracle: the same of `oracle_masks` at this stride: what the stride alone costs.
        per_image: (n,) the decoder's, nan where the mask is empty.
        stride: pixels of the image between cells of the map.
        images, groups: test images with a mask that is not empty, and their groups.
    """

    dice: Interval
    oracle: Interval
    per_image: npt.NDArray[np.float64]
    stride: float
    images: int
    groups: int


def maps_of(
    encoder: nn.Module, batches: Iterable[Tensor], layer: str | None = None, normalise: Normalise | None = None
) -> Tensor:
    """Maps (n, d, h, w) of images in half precision on the CPU, to train decoders on; arguments as in `frozen_maps`.

    Choose a layer of stride 8, "layer2" of a ResNet, or an encoder whose last stages are dilated (timm's
    `output_stride=8`): of coarser maps the Dice measures the stride, see `oracle_masks`.

    Raises:
        DatasetError: no images, or values beyond half precision.
    """
    maps = [each.half().cpu() for each in frozen_maps(encoder, batches, layer, normalise)]
    if not maps:
        raise DatasetError("decoder: no images; give at least one")
    joined = torch.cat(maps)
    if not joined.isfinite().all():
        raise DatasetError("decoder: maps are not all finite in half precision; check the weights, or choose a layer")
    return joined


def decoder_dice(
    train: Masked, test: Masked, settings: DecoderSettings = _DEFAULT, device: torch.device | str = "cpu"
) -> MaskScores:
    """Train a linear decoder on frozen maps and score it on others, beside the oracle of their stride.

    Args:
        train: learnt from.
        test: scored; its masks are not looked at before.
        settings: the schedule.
        device: computes.

    Raises:
        DatasetError: the parts differ in channels or classes, or no test image has a mask.
        TrainingError: the loss is not finite.
    """
    size, cells = tuple(test.masks.shape[1:]), tuple(test.maps.shape[2:])
    if train.maps.shape[1] != test.maps.shape[1]:
        raise DatasetError(f"decoder: {train.maps.shape[1]} channels to train on, {test.maps.shape[1]} to test on")
    classes = _classes(train.masks)
    if int(test.masks.max()) >= classes:
        raise DatasetError(
            f"decoder: class {int(test.masks.max())} in a test mask; the training masks end at {classes - 1}"
        )
    found = predict_masks(train_decoder(train, settings, device), test.maps, (size[0], size[1]))
    dice = dice_per_image(found, test.masks, classes)
    known = ~np.isnan(dice)
    if not known.any():
        raise DatasetError("decoder: all test masks are empty; give images with something to find")
    oracle = dice_per_image(oracle_masks(test.masks, (cells[0], cells[1]), classes), test.masks, classes)
    groups = np.asarray(test.groups)[known]
    return MaskScores(
        dice=bootstrap_mean(dice[known], groups=groups),
        oracle=bootstrap_mean(oracle[known], groups=groups),
        per_image=dice,
        stride=size[0] / cells[0],
        images=int(known.sum()),
        groups=len(np.unique(groups)),
    )


def train_decoder(
    train: Masked, settings: DecoderSettings = _DEFAULT, device: torch.device | str = "cpu"
) -> LinearDecoder:
    """A decoder trained by cross-entropy and Dice (MONAI's `DiceCELoss`, without background, summed over the batch).

    The same seed on the same device gives the same decoder; no generator of torch's own is drawn from.

    Raises:
        DatasetError: all masks are empty.
        TrainingError: the loss is not finite.
    """
    from monai.losses import DiceCELoss

    classes = _classes(train.masks)
    size = (train.masks.shape[1], train.masks.shape[2])
    mean, deviation = channel_moments(_parts(train.maps))
    decoder = LinearDecoder(mean, deviation, classes).to(device)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    draws = torch.Generator().manual_seed(settings.seed)
    left = torch.zeros(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(left) < min(settings.batch_size, len(train.maps)):
            left = torch.cat([left, torch.randperm(len(train.maps), generator=draws)])
        rows, left = left[: settings.batch_size], left[settings.batch_size :]
        logits = decoder(train.maps[rows].to(device), size)
        loss = loss_of(logits, train.masks[rows, None].to(device))
        if not loss.isfinite():
            raise TrainingError("decoder: the loss is not finite; lower its learning rate (lr)")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return decoder


def predict_masks(decoder: LinearDecoder, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of each pixel, (n, *size) uint8 on the CPU, of maps (n, d, h, w)."""
    device = decoder.mean.device
    with torch.no_grad():
        found = [decoder(part.to(device), size).argmax(dim=1).to("cpu", torch.uint8) for part in _parts(maps)]
    return torch.cat(found)


def oracle_masks(masks: Tensor, cells: tuple[int, int], classes: int) -> Tensor:
    """What a map of so few cells can show of masks (n, H, W) if it knows them, as uint8 masks of the same shape.

    Of each class the cells are those that come closest to it in least squares when upsampled bilinearly; a pixel is of
    the class that is highest there, of two classes a cut at 1/2. Means over cells, upsampled, show less. Not a bound:
    Dice is not squares (our choice).

    Args:
        masks: uint8 class numbers below `classes`.
        cells: (h, w) of the map.
        classes: with the background.
    """
    rows, columns = (_nearest_of(count, pixels) for count, pixels in zip(cells, masks.shape[1:], strict=True))
    found = [(rows @ _one_hot(part, classes) @ columns.T).argmax(dim=1) for part in _parts(masks)]
    return torch.cat(found).to(torch.uint8)


def _nearest_of(cells: int, pixels: int) -> Tensor:
    """(pixels, pixels): from values of pixels along an axis to the closest that upsampled cells can give."""
    upsampled = F.interpolate(torch.eye(cells)[None], pixels, mode="linear", align_corners=False)[0].T
    projection: Tensor = upsampled @ torch.linalg.pinv(upsampled)
    return projection


def _parts(values: Tensor) -> list[Tensor]:
    return [values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE)]


def _one_hot(masks: Tensor, classes: int) -> Tensor:
    return F.one_hot(masks.long(), classes).movedim(-1, 1).float()


def _classes(masks: Tensor) -> int:
    highest = int(masks.max())
    if highest < 1:
        raise DatasetError("decoder: all training masks are empty; give images with something to find")
    return highest + 1
