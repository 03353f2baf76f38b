"""Images with masks in a folder, which the stage probe decodes from frozen maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.mask_probe import DecoderSettings, Masked, MaskScores, decoder_dice, maps_of
from medsd.explain.images import read_image, read_png_mask
from medsd.networks.classifier import Normalise
from medsd.pretrain.images import hold_out
from medsd.segment.folder import TABLE, read_mask_table
from medsd.slides.readers.base import RGB, Bools

_BATCH = 16


@dataclass(frozen=True)
class MaskedFolder:
    """Images and masks that a table names, `index.csv` with the columns `file` and `mask`, paths in the folder.

    Attributes:
        masked_dir: the folder; masks are grey PNGs of their images' sizes, 0 is background.
        group_column: another column, of what must not be on both sides: patients, slides, organs.
        side_px: side of the square around the centre that images are cropped to.
        layer: the encoder's whose maps are decoded, "layer2" of a ResNet has a stride of 8; None for the last.
        held_out: share of the images, of whole groups, that is scored and not learnt from.
        seed: draws the held-out groups, and the decoder's batches.

    Raises:
        ConfigError: `masked_dir` is None, or a number out of its range.
    """

    masked_dir: str | None
    group_column: str
    side_px: int
    layer: str | None = None
    held_out: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("side_px", self.side_px, "[8, inf)", whole=True)
        check_number("held_out", self.held_out, "(0, 1)")
        if self.masked_dir is None:
            raise ConfigError(f"masked_dir: not set; name a folder with {TABLE}, images and masks")

    def scores(self, encoder: nn.Module, normalise: Normalise | None = None) -> MaskScores:
        """Dice of a linear decoder on the encoder's maps, learnt on some groups and scored on the others.

        Raises:
            DatasetError: a table, image or mask that is missing or damaged, images smaller than the square, fewer than
                two groups, or no test image with a mask; the message names the row or file.
            NetworkError: no such layer.
        """
        pairs, groups = self._rows()
        test = hold_out(groups, self.held_out, self.seed)
        device = next(encoder.parameters()).device

        def side(rows: npt.NDArray[np.bool_]) -> Masked:
            masks: list[Bools] = []
            chosen = [pair for pair, taken in zip(pairs, rows, strict=True) if taken]
            maps = maps_of(encoder, self._batches(chosen, masks), self.layer, normalise)
            return Masked(maps, torch.from_numpy(np.stack(masks).astype(np.uint8)), groups[rows])

        return decoder_dice(side(~test), side(test), DecoderSettings(seed=self.seed), device)

    def _rows(self) -> tuple[list[tuple[Path, Path]], npt.NDArray[Any]]:
        """Image and mask of every row, and its group."""
        table = read_mask_table(str(self.masked_dir), self.group_column, key="masked_dir")
        return list(zip(table.images, table.masks, strict=True)), table.patient

    def _batches(self, pairs: list[tuple[Path, Path]], masks: list[Bools]) -> Iterator[Tensor]:
        """Images (B, 3, S, S), whose masks are added to `masks`."""
        for start in range(0, len(pairs), _BATCH):
            read = [self._squares(*pair) for pair in pairs[start : start + _BATCH]]
            masks += [mask for _, mask in read]
            yield torch.from_numpy(np.stack([pixels for pixels, _ in read])).movedim(3, 1)

    def _squares(self, image: Path, mask: Path) -> tuple[RGB, Bools]:
        pixels = read_image(image)
        height, width = pixels.shape[:2]
        if min(height, width) < self.side_px:
            raise DatasetError(
                f"{image}: {width} x {height} px is smaller than the square that masks are decoded on "
                f"(masked::side_px={self.side_px}); lower it"
            )
        top, left = (height - self.side_px) // 2, (width - self.side_px) // 2
        square = slice(top, top + self.side_px), slice(left, left + self.side_px)
        return pixels[square], read_png_mask(mask, height, width)[square]
