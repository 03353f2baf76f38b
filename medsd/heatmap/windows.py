"""What a classifier says of every tile of a map of features at once: of its cells, and of windows of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.networks.classifier import TileClassifier
from medsd.networks.segment import Segment


class Cells(nn.Module):
    """Logits (B, K, h, w) of each feature cell, without the bias, of hidden features."""

    def __init__(self, top: Segment, classifier: TileClassifier) -> None:
        super().__init__()
        self.top, self.classifier = top, classifier

    def forward(self, hidden: Tensor) -> Tensor:
        return F.conv2d(self.top(hidden), self.classifier.head.weight[:, :, None, None])


class Windows(nn.Module):
    """Logits (B, K) whose gradient is that of a tile's, averaged over the tiles that hold a place.

    Every window holds window^2 cells at weight 1 / window^2 and as many windows hold a cell, so the sum over windows
    weighs a cell by 1, and the average over the tiles that hold a place by 1 / window^2.

    Attributes:
        seeds: (h, w) bool, the cells that count; None for all. On maps of another size, as of the uniform plane that
            DeepLift records, all do.
    """

    def __init__(self, top: Segment, classifier: TileClassifier, window: int) -> None:
        super().__init__()
        self.cells = Cells(top, classifier)
        self.seeds: Tensor | None = None
        # A convolution, for on a plane nothing but sums may follow the last map.
        share = torch.eye(len(classifier.classes), device=classifier.device) / window**2
        self.register_buffer("share", share[:, :, None, None])

    share: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        cells = self.cells(hidden)
        if self.seeds is not None and self.seeds.shape == cells.shape[2:]:
            cells = torch.where(self.seeds, cells, 0.0)
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
