"""What a classifier says of every tile of a map of features at once: of its cells, and of windows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.networks.classifier import TileClassifier
from medsd.networks.segment import Segment


class Part(NamedTuple):
    """A rectangle of cells, computed from hidden features of its crop.

    Attributes:
        size: (height, width) of those features; maps of another size, as the uniform ones that DeepLift records, are
            computed whole.
        kept: what is kept of each layer's output on the way, see `Segment`.
        seeds: (h, w) bool, the rectangle's cells that count.
    """

    size: tuple[int, int]
    kept: Mapping[str, tuple[slice, slice]]
    seeds: Tensor


class Cells(nn.Module):
    """Logits (B, K, h, w) of each feature cell, without the bias, of hidden features.

    Attributes:
        part: what is computed of them; None for all.
    """

    def __init__(self, top: Segment, classifier: TileClassifier) -> None:
        super().__init__()
        self.top, self.classifier = top, classifier
        self.part: Part | None = None

    def part_of(self, hidden: Tensor) -> Part | None:
        return self.part if self.part is not None and hidden.shape[2:] == self.part.size else None

    def forward(self, hidden: Tensor) -> Tensor:
        part = self.part_of(hidden)
        return F.conv2d(self.top(hidden, part and part.kept), self.classifier.head.weight[:, :, None, None])


class Windows(nn.Module):
    """Logits (B, K) whose gradient is that of a tile's, averaged over the tiles that hold a place.

    Every window holds window^2 cells at weight 1 / window^2 and as many windows hold a cell, so the sum over windows
    weighs a cell by 1, and the average over the tiles that hold a place by 1 / window^2.
    """

    def __init__(self, top: Segment, classifier: TileClassifier, window: int) -> None:
        super().__init__()
        self.cells = Cells(top, classifier)
        # A convolution, for on a plane nothing but sums may follow the last map.
        share = torch.eye(len(classifier.classes), device=classifier.device) / window**2
        self.register_buffer("share", share[:, :, None, None])

    share: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        cells = self.cells(hidden)
        if (part := self.cells.part_of(hidden)) is not None:
            cells = torch.where(part.seeds, cells, 0.0)
        logits: Tensor = F.conv2d(cells, self.share).sum(dim=(2, 3))
        return logits


def window_mean(logits: Tensor, window: int) -> Tensor:
    """Mean over the square of `window` cells around each cell (B, K, h, w), over the cells that exist (are not NaN).

    A window of even size has no middle cell: its four placements around the cell are averaged.
    """
    taps = torch.ones(window + 1 - window % 2, device=logits.device, dtype=logits.dtype)
    if window % 2 == 0:
        taps[0] = taps[-1] = 0.5
    kernel = (taps[:, None] * taps[None, :])[None, None]
    stacked = logits.flatten(0, 1)[:, None]
    known = (~stacked.isnan()).to(logits.dtype)
    sums, weights = (F.conv2d(part, kernel, padding=len(taps) // 2) for part in (stacked.nan_to_num(), known))
    return torch.where(known > 0, sums / weights, torch.nan).view_as(logits)
