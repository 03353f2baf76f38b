"""Images with masks in a folder, which the stage probe decodes from frozen maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medsd.checks import check_number
from medsd.errors import ConfigError
from medsd.evaluate.mask_probe import DecoderSettings, Masked, MaskScores, decoder_dice, maps_of
from medsd.networks.classifier import Normalise
from medsd.pretrain.images import hold_out
from medsd.segment.folder import TABLE, MaskedImages, read_mask_table
from medsd.segment.masks import MaskCoding

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
        table = read_mask_table(str(self.masked_dir), self.group_column, key="masked_dir")
        test = hold_out(table.patient, self.held_out, self.seed)
        coding = MaskCoding(("background", "object"), "instances")
        device = next(encoder.parameters()).device

        def side(rows: npt.NDArray[np.bool_]) -> Masked:
            items = MaskedImages(table.rows(rows), coding, self.side_px, key="masked::side_px")
            masks: list[Tensor] = []

            def images() -> Iterator[Tensor]:
                for batch in DataLoader(items, _BATCH):
                    masks.append(batch["label"][:, 0])
                    yield batch["image"]

            maps = maps_of(encoder, images(), self.layer, normalise)
            return Masked(maps, torch.cat(masks), items.patients)

        return decoder_dice(side(~test), side(test), DecoderSettings(seed=self.seed), device)
