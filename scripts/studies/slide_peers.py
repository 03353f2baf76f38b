"""Probability of a slide's tiles at half-tile stride as tiatoolbox's PatchPredictor and MONAI's datasets make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medsd.networks.classifier import TileClassifier

_BATCH = 8


class Tiles(NamedTuple):
    """Level-0 places (n, 2) of tiles' top left corners, x then y, and the tumour's probability (n,) of each."""

    corners: np.ndarray
    probability: np.ndarray


def by_tiatoolbox(network: TileClassifier, path: Path, side: int, mpp: float, folder: Path) -> Tiles:
    """By its engine for whole slides, with the tissue mask that it makes itself."""
    from tiatoolbox.models.engine.patch_predictor import PatchPredictor
    from tiatoolbox.models.models_abc import ModelABC

    class Wrapped(ModelABC):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor, *_: Any, **__: Any) -> Tensor:
            logits: Tensor = self.network(self.network.normalise(images))
            return logits.softmax(dim=1)

        @staticmethod
        def infer_batch(model: nn.Module, batch: Tensor, *, device: str) -> np.ndarray:
            images = torch.as_tensor(batch).permute(0, 3, 1, 2).to(device)
            with torch.inference_mode():
                found: np.ndarray = model(images).cpu().numpy()
            return found

    engine = PatchPredictor(model=Wrapped(), batch_size=_BATCH, num_workers=0, verbose=False)
    (found,) = engine.run(
        images=[path],
        patch_mode=False,
        input_resolutions=[{"units": "mpp", "resolution": mpp}],
        patch_input_shape=(side, side),
        stride_shape=(side // 2, side // 2),
        wsireader_kwargs={"mpp": (mpp, mpp), "power": None},  # it does not take TIFF tags for mpp
        return_probabilities=True,
        output_type="zarr",
        save_dir=folder,
        overwrite=True,
    ).values()
    import zarr

    group = zarr.open_group(found, mode="r")
    return Tiles(np.asarray(group["coordinates"])[:, :2], np.asarray(group["probabilities"])[:, 1])


def by_monai(network: TileClassifier, path: Path, side: int) -> Tiles:
    """By its sliding dataset of a slide's level 0 over all of the slide: it has no mask that keeps a stride."""
    from monai.data import DataLoader, SlidingPatchWSIDataset

    data = SlidingPatchWSIDataset([{"image": str(path)}], side, overlap=0.5, patch_level=0, reader="OpenSlide")
    corners, found = [], []
    for batch in DataLoader(data, batch_size=_BATCH, num_workers=0):
        with torch.inference_mode():
            images = batch["image"].as_tensor().to(torch.uint8)
            found.append(network(network.normalise(images)).softmax(dim=1)[:, 1].numpy())
        # Rows before columns, of the full level.
        corners.append(np.asarray(batch["image"].meta["location"]).reshape(-1, 2)[:, ::-1])
    return Tiles(np.concatenate(corners), np.concatenate(found))
