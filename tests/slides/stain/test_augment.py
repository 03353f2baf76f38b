"""Stain augmentation: tiatoolbox's own with the same draws, the identity, glass, and independent images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medsd.errors import ConfigError
from medsd.slides.stain.augment import RUIFROK, StainAugment, restain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, side: int = 8, seed: int = 5) -> Tensor:
    return torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=generator(seed))


def stained(batch: int, side: int = 16, seed: int = 3) -> tuple[Tensor, np.ndarray]:
    """Images of two stains alone, and their concentrations (B, H, W, 2)."""
    concentrations = np.random.default_rng(seed).uniform(0.3, 1.2, (batch, side, side, 2))
    light = 255 * np.exp(-concentrations @ np.array(RUIFROK))
    return torch.from_numpy(np.rint(light).astype(np.uint8)).permute(0, 3, 1, 2).contiguous(), concentrations


def test_concentrations_are_multiplied_and_shifted_as_drawn() -> None:
    batch, concentrations = stained(4)
    factors, shifts = (
        1 + 0.4 * torch.rand((4, 2), generator=generator()),
        0.2 * torch.rand((4, 2), generator=generator(1)),
    )
    result = restain(batch, torch.tensor(RUIFROK), factors, shifts)
    changed = concentrations * factors[:, None, None].numpy() + shifts[:, None, None].numpy()
    expected = torch.from_numpy(255 * np.exp(-changed @ np.array(RUIFROK))).permute(0, 3, 1, 2)
    assert (result - expected).abs().max() < 1.6


def test_it_is_tiatoolboxs_augmentor_with_the_same_draws() -> None:
    from tiatoolbox.tools.stainaugment import StainAugmentor

    batch, _ = stained(1, side=48)
    factors, shifts = [1.3, 0.7], [0.15, -0.1]
    reference = StainAugmentor("macenko", np.array(RUIFROK), augment_background=True)
    drawn = iter(zip(factors, shifts, strict=True))

    def draw() -> None:
        reference.alpha, reference.beta = next(drawn)

    reference._sample_params = draw
    expected = reference(batch[0].permute(1, 2, 0).numpy().copy())
    mine = restain(batch, torch.tensor(RUIFROK), torch.tensor([factors]), torch.tensor([shifts]))
    difference = np.abs(mine[0].permute(1, 2, 0).numpy().astype(int) - expected)
    # One for tiatoolbox's truncation, one for what rounding to greys put outside the plane of the two stains.
    assert difference.max() <= 2
    assert difference.mean() < 0.6


def test_without_change_pixels_stay_whatever_their_colour() -> None:
    """Also those that the two stains do not explain; black is 1 for want of its logarithm."""
    batch = images(6)
    assert torch.equal(StainAugment(0, 0)(batch, generator()), batch.clamp(min=1))


def test_deterministic_by_generator_uint8_and_input_untouched() -> None:
    batch = images(8)
    before = batch.clone()
    first = StainAugment()(batch, generator(1))
    assert first.dtype == torch.uint8
    assert first.shape == batch.shape
    assert torch.equal(batch, before)
    assert torch.equal(first, StainAugment()(batch, generator(1)))
    assert not torch.equal(first, StainAugment()(batch, generator(2)))


def test_images_of_a_batch_are_independent() -> None:
    batch, _ = stained(1)
    four = StainAugment()(batch.expand(4, -1, -1, -1), generator(1))
    assert len({bytes(image.numpy().tobytes()) for image in four}) == 4
    changed = batch.repeat(4, 1, 1, 1)
    changed[2] = 255 - changed[2]
    again = StainAugment()(changed, generator(1))
    assert torch.equal(again[[0, 1, 3]], four[[0, 1, 3]])


def test_each_slide_may_have_its_own_stains() -> None:
    batch, _ = stained(2)
    own = torch.tensor([RUIFROK, ((0.70, 0.62, 0.35), (0.12, 0.87, 0.47))])
    both = StainAugment()(batch, generator(), own)
    assert torch.equal(both[0], StainAugment()(batch, generator(), own[0])[0])
    assert torch.equal(both[1], StainAugment()(batch, generator(), own[1])[1])
    assert not torch.equal(both[1], StainAugment()(batch, generator())[1])


def test_blank_and_one_colour_images_survive() -> None:
    augment = StainAugment(0.4, 0.2)
    white = torch.full((40, 3, 5, 5), 255, dtype=torch.uint8)
    assert torch.equal(augment(white, generator()), white)
    glass = torch.full((40, 3, 5, 5), 240, dtype=torch.uint8)
    assert (augment(glass, generator()).int() - 240).abs().max() <= 10
    for value in (0, 128):
        plain = torch.full((40, 3, 5, 5), value, dtype=torch.uint8)
        result = augment(plain, generator()).flatten(2)
        assert torch.equal(result.amin(2), result.amax(2))


def test_bad_settings_are_named() -> None:
    for settings, words in (((1.0, 0.1), "strength"), ((-0.1, 0.1), "strength"), ((0.1, float("nan")), "shift")):
        with pytest.raises(ConfigError, match=words):
            StainAugment(*settings)
