"""Weak masks: where a tile classifier's additive evidence is sure, and nothing, or a random walk, between.

The evidence of a tile sums to its log-odds, so a cell's value times the number of cells is what the log-odds would be
if all of the tile spoke like this place. Above `sure` a pixel is the classifier's class, below its negative it is
background; both are far from certain, which is why such masks come before real ones and not instead of them. That an
additive map gives seeds of either sign is our use of it; growing seeds by random walks is Grady's (2006).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from skimage.segmentation import random_walker
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.errors import DatasetError
from medsd.heatmap.maps import Engine
from medsd.heatmap.tiled import blend_window
from medsd.networks.effective_field import measure_effective_field
from medsd.segment.items import Numbers
from medsd.segment.stitch import tile_starts
from medsd.slides.readers.base import RGB

IGNORED = 255
"""In place of a class number, where nobody says."""
Fill = Literal["ignore", "random_walker"]
_BATCH = 32
# A walker's own doubt (our choice).
_LEAST_PROBABILITY = 0.8


@dataclass(frozen=True)
class WeakLabelling:
    """How evidence becomes masks.

    Attributes:
        sure: log-odds, of a whole tile like the place, from which a pixel is the class, and below whose negative it is
            background.
        fill: "ignore" leaves the others to nobody, "random_walker" lets walkers from the sure pixels decide (of
            scikit-image) where one class is met first with a probability of 0.8 or more.
        beta: how much walkers shun edges, see scikit-image.

    Raises:
        ConfigError: a value out of its range.
    """

    sure: float = 2.0
    fill: Fill = "ignore"
    beta: float = 130.0

    def __post_init__(self) -> None:
        check_number("sure", self.sure, "[0, inf)", hint="log-odds")
        check_number("beta", self.beta, "(0, inf)")
        check_choice("fill", self.fill, get_args(Fill))

    def mask(self, image: RGB, evidence: npt.NDArray[np.floating]) -> Numbers:
        """Class numbers (H, W) uint8, 0, 1 or `IGNORED`, of an image (H, W, 3) and its evidence (H, W), log-odds.

        Example:
            >>> image = np.zeros((1, 3, 3), np.uint8)
            >>> WeakLabelling(sure=2.0).mask(image, np.array([[3.0, 0.5, -4.0]]))
            array([[  1, 255,   0]], dtype=uint8)
        """
        mask = np.full(evidence.shape, IGNORED, np.uint8)
        mask[evidence > self.sure], mask[evidence < -self.sure] = 1, 0
        classes = np.unique(mask)
        if self.fill == "ignore" or not (0 in classes and 1 in classes and IGNORED in classes):
            return mask
        seeds = np.select([mask == 0, mask == 1], [1, 2], 0)
        probabilities = random_walker(
            image / 255.0, seeds, beta=self.beta, mode="cg_j", channel_axis=-1, return_full_prob=True
        )
        for number, probability in enumerate(np.asarray(probabilities)):
            mask[(seeds == 0) & (probability >= _LEAST_PROBABILITY)] = number
        return mask


class Evidence:
    """What a classifier says of every pixel of an image: the log-odds of a tile that is all like the place.

    Tiles as in training, half a tile apart, blended as slides' maps are; bilinear between cells.

    Args:
        engine: of a classifier of two classes; its first method is taken, which adds up if it is "deeplift".

    Raises:
        NetworkError: the layer's stride is not a whole number.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tile_px = engine, engine.tile_px
        field = measure_effective_field(engine.classifier, engine.settings.layer)
        self._cells = self.tile_px // field.stride
        # Each pixel of a tile as a mean of its two nearest cells.
        place = (np.arange(self.tile_px) + 0.5 - field.centre) / field.stride
        place = place.clip(0, self._cells - 1)
        low = np.minimum(place.astype(np.int64), self._cells - 2) if self._cells > 1 else np.zeros(len(place), np.int64)
        self._spread = np.zeros((self.tile_px, self._cells))
        rows = np.arange(self.tile_px)
        self._spread[rows, low] = 1 - (place - low)
        self._spread[rows, np.minimum(low + 1, self._cells - 1)] += place - low
        self._step = self.tile_px - self.tile_px // 2
        self._window = blend_window(rows + 0.5, self.tile_px, self._step)

    def __call__(self, image: RGB) -> npt.NDArray[np.float32]:
        """(H, W) of an image (H, W, 3) uint8 at the classifier's scale.

        Raises:
            DatasetError: the image is smaller than a tile.
        """
        side = self.tile_px
        if min(image.shape[:2]) < side:
            raise DatasetError(
                f"images of {image.shape[1]} x {image.shape[0]} px are smaller than the classifier's tiles ({side} px)"
                "; make side_px larger"
            )
        places = [
            (slice(y, y + side), slice(x, x + side))
            for y in tile_starts(image.shape[0], side, self._step).tolist()
            for x in tile_starts(image.shape[1], side, self._step).tolist()
        ]
        tiles = torch.from_numpy(np.stack([image[place] for place in places])).permute(0, 3, 1, 2)
        sums, weights = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
        window = np.outer(self._window, self._window)
        for start in range(0, len(places), _BATCH):
            maps = self.engine.patch_saliency(tiles[start : start + _BATCH]) * self._cells**2
            for place, found in zip(places[start:], maps, strict=False):
                sums[place] += window * (self._spread @ found @ self._spread.T)
                weights[place] += window
        return (sums / weights).astype(np.float32)


class SureDiceCELoss(nn.Module):
    """MONAI's `DiceCELoss` (without background, over the batch) of the pixels that somebody speaks of.

    Of masks without `IGNORED` it is the same. MONAI's `DiceLoss` can leave pixels out, its `DiceCELoss` cannot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, ignore_index=IGNORED)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Of logits (B, K, H, W) and class numbers (B, 1, H, W), some `IGNORED`; 0 where all are."""
        numbers = mask[:, 0].long()
        entropy = F.cross_entropy(logits, numbers, ignore_index=IGNORED, reduction="sum")
        known = (numbers != IGNORED).sum().clamp(min=1)
        loss: Tensor = self.dice(logits, mask.long()) + entropy / known
        return loss
