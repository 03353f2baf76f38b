"""What the fine-tuning study trains on: tiles of phantom slides whose surroundings tell the label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt

from medsd.files import atomic_path
from medsd.phantom.slides import Phantom, PhantomSpec, draw_phantom

TILE_PX = 64
_SLIDE_PX, _MPP, _DIFFICULTY = 2048, 1.0, 0.3
_PLACES = 60
# For training, validation and test; and for the encoder that all start from.
_DEALT, _START_SLIDES = (14, 4, 6), 10
_STUDY_SLIDES = sum(_DEALT)
# Slides tested on over slides trained on.
RATIO = _DEALT[2] / _DEALT[0]
SLIDES = range(_STUDY_SLIDES + _START_SLIDES)
# How much of the tint surrounds a nest: 1 is the shortcut of `PhantomSpec`, 0 none.
_TINT = 0.5
# Raised whenever a part holds other pixels, so that kept results are never mixed.
VERSION = 2


@dataclass(frozen=True)
class Items:
    """Images with labels.

    Attributes:
        images: (n, 3, S, S) uint8.
        labels: (n,) int64, 1 tumour.
        cue: (n,) int64, 1 with what goes with tumour in training, a tint; zeros without a cue.
        masks: (n, S, S) bool, where the object is that the label speaks of; None where nobody knows.
    """

    images: torch.Tensor
    labels: torch.Tensor
    cue: torch.Tensor
    masks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Three sides of a data set, dealt by a seed: what validates under one seed may be tested on under another."""

    training: Items
    validation: Items
    testing: Items


def phantoms_with_shortcut(cache: Path, seed: int) -> Split:
    """Tiles of phantom slides, a nest of tumour or normal cells in surroundings that are tinted or not.

    The twin of Waterbirds: each slide is drawn four times from one seed, with and without tumour, with and without the
    shortcut (a tint), so that all four agree in anatomy and light. A tile of 64 um is the untinted slide inside a disc
    of 14 to 20 um radius, with or without tumour, and the slide without tumour around it, with or without tint. In
    training the tint goes with the label in every tile; validation and test sides hold every place four times, once a
    group. The seed deals the slides to the sides.
    """
    slides = np.random.default_rng((seed, 2)).permutation(_STUDY_SLIDES)
    sides = []
    for side in np.split(slides, np.cumsum(_DEALT[:2])):
        images, masks = _tiles_of(cache, side.tolist())
        sides.append(_grouped(_tinted(images, np.full(len(images), _TINT)), masks, training=not sides))
    return Split(*sides)


def phantoms_without_shortcut(cache: Path) -> Items:
    """Tiles of ten slides more, every place four times, the share of the tint drawn from -0.3 to 1 for each."""
    images, masks = _tiles_of(cache, list(SLIDES)[_STUDY_SLIDES:])
    random = np.random.default_rng(0)
    parts = [_tinted(images, random.uniform(-0.3, 1, len(images))) for _ in range(2)]
    drawn = [part[:, label, 1] for part in parts for label in (0, 1)]
    labels = np.tile(np.repeat([0, 1], len(images)), 2)
    return Items(
        torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels),
        torch.zeros(len(labels), dtype=torch.int64),
        torch.from_numpy(np.concatenate([masks] * 4)),
    )


def draw_slide(cache: Path, number: int) -> None:
    """Draw one of the phantom slides and keep its tiles."""
    _tiles(cache, number)


def _tiles_of(cache: Path, slides: list[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    drawn = [_tiles(cache, slide) for slide in slides]
    images, masks = zip(*drawn, strict=True)
    return np.concatenate(images), np.concatenate(masks)


def _tinted(images: npt.NDArray[np.uint8], share: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """The images (places, label, cue, ...) with this share of the tint in place of all of it."""
    if (share == 1).all():
        return images
    plain, tinted = (images[:, :, cue].astype(np.float32) for cue in (0, 1))
    weight = share.astype(np.float32)[:, None, None, None, None]
    mixed = (plain + weight * (tinted - plain)).round().clip(0, 255).astype(np.uint8)
    return np.stack([images[:, :, 0], mixed], axis=2)


def _grouped(images: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], training: bool) -> Items:
    """Items of places drawn in all four groups (places, label, cue, ...); of a training side the aligned two."""
    parts = []
    for label in (0, 1):
        for cue in (0, 1):
            if training and label != cue:
                continue
            count = len(images)
            parts.append(
                Items(
                    torch.from_numpy(images[:, label, cue]).permute(0, 3, 1, 2).contiguous(),
                    torch.full((count,), label),
                    torch.full((count,), cue),
                    torch.from_numpy(masks),
                )
            )
    return Items(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "cue", "masks")))


def _tiles(cache: Path, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Tiles (places, label, cue, 64, 64, 3) and nests (places, 64, 64) of one slide, drawn once and kept."""
    path = cache / f"slide-{VERSION}-{seed}.npz"
    if not path.is_file():
        drawn = {
            (label, cue): draw_phantom(
                PhantomSpec(seed, bool(label), _SLIDE_PX, _MPP, _DIFFICULTY, 2, "tint" if cue else "none")
            )
            for label in (0, 1)
            for cue in (0, 1)
        }
        images, nests = _cut(drawn, np.random.default_rng(seed))
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, images=images, nests=nests)
    with np.load(path, allow_pickle=False) as content:
        return content["images"], content["nests"]


def _cut(
    drawn: dict[tuple[int, int], Phantom], random: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Tiles at places well inside the tumour, no two closer than 40 px."""
    tumour = drawn[1, 0].mask
    half = TILE_PX // 2
    depth = distance_transform_edt(np.pad(tumour, 1))[1:-1, 1:-1]
    depth[:half], depth[-half:], depth[:, :half], depth[:, -half:] = 0, 0, 0, 0
    images, nests = [], []
    rows, columns = np.ogrid[:TILE_PX, :TILE_PX]
    for _ in range(_PLACES):
        places = np.argwhere(depth > 24)
        if not len(places):
            break
        y, x = places[random.integers(len(places))]
        depth[max(0, y - 40) : y + 40, max(0, x - 40) : x + 40] = 0
        radius = random.uniform(14, 20)
        centre = random.uniform(radius, TILE_PX - radius, 2)
        nest = (rows + 0.5 - centre[0]) ** 2 + (columns + 0.5 - centre[1]) ** 2 <= radius**2
        window = np.s_[y - half : y + half, x - half : x + half]
        images.append(
            [
                [
                    np.where(nest[..., None], drawn[label, 0].image[window], drawn[0, cue].image[window])
                    for cue in (0, 1)
                ]
                for label in (0, 1)
            ]
        )
        nests.append(nest)
    return np.array(images, np.uint8), np.array(nests)
