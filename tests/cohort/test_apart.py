"""What may be trained on: no patch of a place or stain that is held out, however the overlaps chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsd.cohort.apart import may_train, stain_signature
from medsd.cohort.patches import read_patch_table


def tissue(seed: int, colour: tuple[int, int, int], side: int = 96) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-40, 40, (side, side, 1))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


def test_places_are_kept_apart_however_they_chain() -> None:
    pink, violet = (200, 120, 160), (110, 70, 170)
    strip = tissue(0, pink, 240)
    held, kept = strip[:96, :96], np.stack([tissue(seed, violet) for seed in range(1, 6)])
    reference = np.concatenate([held[None], kept])
    held_out = np.array([True, *[False] * 5])
    more = np.stack(
        [strip[:96, 80:176], strip[:96, 144:240], strip[144:, :96], tissue(9, violet), np.full_like(held, 250)]
    )
    # The second touches the first alone; the third is of the held-out stain; the last is glass and has no place.
    allowed = may_train(more, reference, held_out)
    assert not allowed[:3].any() and allowed[3]
    # Were stains alike everywhere, places alone would decide.
    same = np.concatenate([held[None], np.stack([tissue(seed, pink) for seed in range(1, 6)])])
    none_held = may_train(more, same, np.zeros(6, bool))
    assert none_held.all()


def test_signatures_tell_stain_and_not_tissue() -> None:
    pink, again, violet = stain_signature(
        np.stack([tissue(1, (200, 120, 160)), tissue(2, (200, 120, 160)), tissue(3, (110, 70, 170))])
    )
    assert np.linalg.norm(pink - again) < 0.05 < np.linalg.norm(pink - violet)
    assert np.isfinite(stain_signature(np.full((1, 8, 8, 3), 255, np.uint8))).all()


def test_a_signature_by_hand() -> None:
    """Tissue whose density varies along one direction, beside a strip of glass."""
    glass, mean, along = np.array([0.05, 0.06, 0.04]), np.array([0.5, 0.9, 0.4]), np.array([0.8, 0.6, 0.0])
    density = mean + np.linspace(-0.4, 0.4, 64)[:, None, None] * along + np.zeros((64, 64, 1))
    density[:, :4] = glass
    image = np.rint(256 * np.exp(-density) - 1).astype(np.uint8)
    expected = np.concatenate([glass, mean / np.linalg.norm(mean), along])
    np.testing.assert_allclose(stain_signature(image[None])[0], expected, atol=0.01)


def test_stain_clusters_of_real_patches_are_told(shared_data: Path) -> None:
    """The share of patches that have one of their own cluster among the five nearest, of every fourth patch."""
    table = read_patch_table(shared_data / "pcam_patches", "stain_cluster")
    rows = table.rows(np.arange(len(table.paths)) % 4 == 0)
    found = stain_signature(np.stack([rows.pixels(row) for row in range(len(rows.paths))]))
    found /= found.std(axis=0)
    apart = np.linalg.norm(found[:, None] - found, axis=2) + np.diag(np.full(len(found), np.inf))
    nearest = rows.group[np.argsort(apart, axis=1)[:, :5]]
    assert (nearest == rows.group[:, None]).any(axis=1).mean() > 0.85
