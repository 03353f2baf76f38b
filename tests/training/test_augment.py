"""Augmentation: exact symmetries of the square, one for each image, and a change of optical density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medsd.training.augment import augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, side: int = 6, seed: int = 5) -> Tensor:
    return torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=generator(seed))


def symmetries(image: Tensor) -> list[Tensor]:
    """The eight images of a square under its symmetries, by index arithmetic."""
    side = image.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = []
    for y, x in ((rows, columns), (columns, rows)):
        for v in (y, side - 1 - y):
            for u in (x, side - 1 - x):
                places.append((v, u))
    return [image[:, v, u] for v, u in places]


def test_the_eight_symmetries_come_evenly_and_nothing_else() -> None:
    image = images(1)
    batch = image.expand(800, -1, -1, -1)
    turned = augment(batch, generator(), stain=0)
    expected = symmetries(image[0])
    counts = [int((turned == candidate).flatten(1).all(dim=1).sum()) for candidate in expected]
    assert sum(counts) == 800
    assert min(counts) > 60  # 100 each, standard deviation 9.4
    assert max(counts) < 140


def test_without_stain_pixels_only_move() -> None:
    batch = images(20)
    turned = augment(batch, generator(), stain=0)
    assert torch.equal(turned.flatten(2).sort(dim=2).values, batch.flatten(2).sort(dim=2).values)
    assert not torch.equal(turned, batch)
    # All channels move together.
    triples = batch.flatten(2).transpose(1, 2).int() @ torch.tensor([1, 256, 65536], dtype=torch.int32)
    moved = turned.flatten(2).transpose(1, 2).int() @ torch.tensor([1, 256, 65536], dtype=torch.int32)
    assert torch.equal(triples.sort(dim=1).values, moved.sort(dim=1).values)


@pytest.mark.parametrize("stain", [0.0, 0.1, 0.9])
def test_deterministic_by_generator_uint8_and_input_untouched(stain: float) -> None:
    batch = images(8)
    before = batch.clone()
    first = augment(batch, generator(1), stain)
    assert first.dtype == torch.uint8
    assert first.shape == batch.shape
    assert torch.equal(batch, before)
    assert torch.equal(first, augment(batch, generator(1), stain))
    assert not torch.equal(first, augment(batch, generator(2), stain))


def test_images_of_a_batch_are_independent() -> None:
    batch = images(8)
    first = augment(batch, generator(1), 0.2)
    changed = batch.clone()
    changed[3] = 255 - changed[3]
    second = augment(changed, generator(1), 0.2)
    others = [i for i in range(8) if i != 3]
    assert torch.equal(first[others], second[others])
    assert not torch.equal(first[3], second[3])


def test_stain_scales_the_optical_density_of_each_channel() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(60, 3, 16, 16)
    restained = augment(levels, generator(), 0.1)
    density = -torch.log((levels.double() + 1) / 256).flatten(2).sort(dim=2).values
    changed = -torch.log((restained.double() + 1) / 256).flatten(2).sort(dim=2).values
    # The middle grey levels: far from white (density 0) and from the rounding of black.
    gain = (changed / density.clamp(min=1e-9))[:, :, 100:200]
    centre = gain.median(dim=2).values
    assert (gain - centre[..., None]).abs().max() < 0.02  # one gain for a channel of an image
    assert centre.min() > 0.895
    assert centre.max() < 1.105
    assert centre.min() < 0.92
    assert centre.max() > 1.08
    assert abs(float(centre.mean()) - 1) < 0.015
    assert (centre.max(dim=1).values - centre.min(dim=1).values).max() > 0.1  # hue changes, not strength alone


def test_white_stays_white() -> None:
    white = torch.full((4, 3, 5, 5), 255, dtype=torch.uint8)
    assert torch.equal(augment(white, generator(), 0.5), white)
