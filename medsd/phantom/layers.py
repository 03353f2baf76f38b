"""The layers of a phantom slide, one upon the other: colour aimed at, nuclei, cytoplasm, fat, light (our choice)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medsd.phantom.shapes import Anatomy, ByteArray, FloatArray, Grid, smooth_noise
from medsd.phantom.texture import (
    CARCINOMA,
    CENTROBLAST,
    HISTIOCYTE,
    LYMPHOCYTE,
    SPINDLE,
    NucleusKind,
    Stain,
    between,
    cell_sites,
    draw_weave,
    nucleus_templates,
    repeated,
    stamp,
)

_BAND_PX = 256

Chance: TypeAlias = NDArray[np.floating[Any]] | float


def cell_share(mask: ByteArray, grid: Grid) -> FloatArray:
    """Share of tumour in each cell (cells, cells)."""
    step, extra = grid.step_px, grid.cells * grid.step_px - grid.size_px
    padded = np.pad(mask, ((0, extra), (0, extra)))
    share: FloatArray = padded.reshape(grid.cells, step, grid.cells, step).mean(axis=(1, 3), dtype=np.float32)
    return share


def target_density(rng: np.random.Generator, grid: Grid, anatomy: Anatomy, stain: Stain) -> FloatArray:
    """Optical density (3, cells, cells) that the picture, blurred over 20 um, shall have; it knows no tumour."""
    drift = [smooth_noise(rng, grid.cells, 130 * grid.anatomy / grid.cell_um) for _ in range(5)]
    fine = [smooth_noise(rng, grid.cells, 35 * grid.anatomy / grid.cell_um) for _ in range(5)]
    vary = [0.75 * slow + 0.5 * quick for slow, quick in zip(drift, fine, strict=True)]
    h = 0.80 * (1 - 0.24 * anatomy.follicle + 0.10 * anatomy.mantle) * (1 - 0.50 * anatomy.stroma)
    # The core a little paler, to make up for the pale capsule: else the place in the node would tell tumour.
    h *= 1 - 0.06 * np.clip(anatomy.depth_um / (110 * grid.anatomy) - 0.6, 0, 1)
    h = h * (1 - 0.80 * anatomy.capsule) * np.exp(0.13 * vary[0]) * stain.strength[0]
    e = 0.30 * (1 + 0.10 * anatomy.stroma + 0.45 * anatomy.capsule) * np.exp(0.15 * vary[1]) * stain.strength[1]
    density = stain.haematoxylin[:, None, None] * h + stain.eosin[:, None, None] * e
    # A third direction of colour, else the plane of two stains would be exact and any departure from it tell.
    density += 0.012 * np.stack(vary[2:])
    aimed: FloatArray = density.astype(np.float32)
    return aimed


def draw_nuclei(
    rng: np.random.Generator, difficulty: float, grid: Grid, anatomy: Anatomy, mask: ByteArray
) -> FloatArray:
    """Haematoxylin amounts (cells * step_px, cells * step_px)."""
    side = grid.cells * grid.step_px
    canvas = np.zeros((side, side), np.float32)
    solid = (anatomy.depth_um > 3) * (1 - anatomy.capsule)
    open_tissue = solid * (1 - 0.88 * anatomy.stroma)
    crowd = np.clip(0.93 + 0.07 * smooth_noise(rng, grid.cells, 40 / grid.cell_um), 0.6, 1)
    carcinoma = between(CARCINOMA, LYMPHOCYTE, difficulty)
    spacing = 16.2 + (8.0 - 16.2) * difficulty
    # (kind, spacing in um, chance in normal tissue, chance in tumour)
    lymphoid = open_tissue * crowd * (1 - 0.75 * anatomy.follicle)
    blasts = open_tissue * 0.9 * anatomy.follicle
    stray = (1 - difficulty) * (open_tissue * 0.05 + anatomy.stroma * 0.1)
    layers: list[tuple[NucleusKind, float, Chance, Chance]] = [
        (HISTIOCYTE, 14.0, solid * 0.55 * anatomy.stroma, solid * (0.15 + 0.4 * difficulty) * anatomy.stroma),
        (CENTROBLAST, 11.5, blasts, difficulty * blasts),
        (LYMPHOCYTE, 8.0, lymphoid, stray),
        (carcinoma, spacing, 0.0, open_tissue * crowd * (1 - 0.75 * difficulty * anatomy.follicle)),
    ]
    for kind, spacing_um, normal, tumour in layers:
        xs, ys = cell_sites(rng, grid, spacing_um, np.ones_like(anatomy.stroma))
        keep = np.stack([np.broadcast_to(chance, solid.shape) for chance in (normal, tumour)])
        kept = rng.random(xs.size) < keep[mask[ys, xs], ys // grid.step_px, xs // grid.step_px]
        templates = nucleus_templates(rng, kind, grid.mpp, 40)
        stamp(canvas, templates, xs[kept], ys[kept], rng.integers(0, 40, int(kept.sum())))
    _stamp_spindles(rng, grid, anatomy, canvas)
    return canvas


def _stamp_spindles(rng: np.random.Generator, grid: Grid, anatomy: Anatomy, canvas: FloatArray) -> None:
    """Fibroblasts, lying along the fibres."""
    keep = np.where(anatomy.depth_um > 2, np.maximum(0.42 * anatomy.stroma, 0.5 * anatomy.capsule), 0)
    xs, ys = cell_sites(rng, grid, 13.0, keep)
    down, right = np.gradient(anatomy.along_um, axis=0), np.gradient(anatomy.along_um, axis=1)
    row, column = ys // grid.step_px, xs // grid.step_px
    angle = np.arctan2(down[row, column], right[row, column]) + np.pi / 2 + rng.normal(0, 0.15, xs.size)
    turns = np.arange(64) * np.pi / 32
    templates = nucleus_templates(rng, SPINDLE, grid.mpp, 64, turns)
    which = np.round(angle / (np.pi / 32)).astype(np.int64) % 64
    stamp(canvas, templates, xs, ys, which)


def draw_cytoplasm(
    rng: np.random.Generator, difficulty: float, grid: Grid, anatomy: Anatomy, tumour: FloatArray
) -> FloatArray:
    """Eosin amounts (cells * step_px, cells * step_px): a net between lymphocytes, even in tumour, fibres in stroma."""
    side = grid.cells * grid.step_px
    canvas = np.empty((side, side), np.float32)
    weave = draw_weave(rng, grid.mpp)
    even = np.maximum(0.75 * tumour * (1 - difficulty), 0.3 * anatomy.follicle)
    fibrous = np.maximum(0.85 * anatomy.stroma, anatomy.capsule)
    for first in range(0, side, _BAND_PX):
        last = min(side, first + _BAND_PX)
        up = [grid.upsample(f, first, last) for f in (even, fibrous, anatomy.along_um, anatomy.depth_um)]
        grain, net = (repeated(tile, first, last, side) for tile in (weave.grain, weave.net))
        cells = net + up[0] * (grain - net)
        fibre = weave.fibres[((up[2] + 1.2 * grain) * 8).astype(np.int32) & 4095]
        cells += up[1] * (fibre * grain - cells)
        canvas[first:last] = 0.4 * cells * np.clip(up[3] / 1.5 + 0.5 * grain, 0, 1)
    return canvas


def punch_fat(anatomy: Anatomy, nuclei: FloatArray, cytoplasm: FloatArray) -> None:
    """Clear round holes where fat was washed out, with a thin membrane left."""
    side = nuclei.shape[0]
    for x, y, radius in anatomy.fat:
        left, right = max(0, int(x - radius) - 2), min(side, int(x + radius) + 3)
        top, bottom = max(0, int(y - radius) - 2), min(side, int(y + radius) + 3)
        if left < right and top < bottom:
            distance = np.hypot(np.arange(left, right)[None, :] - x, np.arange(top, bottom)[:, None] - y)
            angle = np.arctan2(np.arange(top, bottom)[:, None] - y, np.arange(left, right)[None, :] - x)
            # Drops pressed against each other are not round; the phases only need to differ.
            wall = radius * (0.93 + 0.04 * np.cos(2 * angle + x) + 0.03 * np.cos(3 * angle + y))
            tissue = np.clip((distance - wall) / 2.5 + 0.5, 0, 1).astype(np.float32)
            nuclei[top:bottom, left:right] *= tissue
            cytoplasm[top:bottom, left:right] *= tissue


def render(
    rng: np.random.Generator,
    grid: Grid,
    stain: Stain,
    amounts: tuple[FloatArray, FloatArray],
    fields: tuple[FloatArray, FloatArray, FloatArray],
) -> ByteArray:
    """RGB (size, size, 3) of H and E amounts times their factors plus an optical density, with the sensor's noise."""
    size = grid.size_px
    image = np.empty((size, size, 3), np.uint8)
    noise = rng.normal(0, 2.2, (521, 521)).astype(np.float32)
    for first in range(0, size, _BAND_PX):
        last = min(size, first + _BAND_PX)
        h, e = (
            a[first:last, :size] * grid.upsample(f, first, last)[:, :size]
            for a, f in zip(amounts, fields, strict=False)
        )
        for c in range(3):
            density = h * stain.haematoxylin[c] + e * stain.eosin[c]
            density += grid.upsample(fields[2][c], first, last)[:, :size]
            light = np.exp(-density, out=density)
            light *= stain.white[c]
            light += repeated(noise, first + 173 * c, last + 173 * c, size)
            image[first:last, :, c] = np.clip(light, 0, 255, out=light).astype(np.uint8)
    return image
