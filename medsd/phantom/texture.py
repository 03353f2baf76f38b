"""The micro-structure of a phantom slide: nuclei, fibres, stains matched to a target, ink, noise (all our choice).

Amounts of haematoxylin and eosin are natural optical densities: RGB = white * exp(-(h * H + e * E)).
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medsd.phantom.shapes import ByteArray, FloatArray, Grid, smooth_noise


@dataclass(frozen=True)
class NucleusKind:
    """How the nuclei of one cell type look; lengths in micrometres, `spread` is the deviation of log diameter."""

    diameter_um: float
    spread: float
    aspect: float
    ragged: float  # deviation of the outline's log radius
    vesicular: float  # 0 even chromatin ... 1 pale inside with a dark rim
    nucleoli: int
    amount: float  # haematoxylin of the rim


LYMPHOCYTE = NucleusKind(7.0, 0.09, 1.10, 0.05, 0.10, 0, 1.45)
CENTROBLAST = NucleusKind(9.6, 0.10, 1.15, 0.05, 0.70, 2, 1.20)
HISTIOCYTE = NucleusKind(8.5, 0.12, 1.50, 0.06, 0.65, 1, 0.80)
SPINDLE = NucleusKind(7.0, 0.12, 3.60, 0.05, 0.20, 0, 1.15)
CARCINOMA = NucleusKind(13.4, 0.16, 1.22, 0.075, 1.0, 3, 1.35)


def between(normal: NucleusKind, other: NucleusKind, share: float) -> NucleusKind:
    """The kind that is `normal` at share 0 and `other` at share 1."""
    mixed = NucleusKind(*(a + (b - a) * share for a, b in zip(astuple(normal), astuple(other), strict=True)))
    return replace(mixed, nucleoli=round(mixed.nucleoli))


def nucleus_templates(
    rng: np.random.Generator, kind: NucleusKind, mpp: float, count: int, angles: NDArray[np.float64] | None = None
) -> list[FloatArray]:
    """`count` square templates of haematoxylin amounts; the long axis at `angles` (radians), random without."""
    turns = rng.uniform(0, np.pi, count) if angles is None else angles
    return [_nucleus(rng, kind, mpp, float(turn)) for turn in turns]


def _nucleus(rng: np.random.Generator, kind: NucleusKind, mpp: float, turn: float) -> FloatArray:
    radius = kind.diameter_um * math.exp(rng.normal(0, kind.spread)) / 2 / mpp
    aspect = max(1.0, kind.aspect * math.exp(rng.normal(0, 0.10)))
    half = math.ceil(radius * math.sqrt(aspect) * 1.25 + 2)
    dy, dx = np.mgrid[-half : half + 1, -half : half + 1] + rng.uniform(-0.5, 0.5, (2, 1, 1))
    u, v = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
    u, v = u / math.sqrt(aspect), v * math.sqrt(aspect)
    angle = np.arctan2(v, u)
    edge = np.zeros_like(angle)
    for wave in (2, 3, 4, 5):
        edge += kind.ragged * rng.normal() / (wave - 1) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    inside = 1 - np.hypot(u, v) / (radius * np.exp(edge))
    # The optics: an edge about 1 um wide, and for some nuclei wider (out of focus).
    softness = max(1.0, rng.uniform(0.8, 1.5) / mpp)
    cover = 1 / (1 + np.exp(-np.clip(inside * radius * 4 / softness, -30, 30)))
    clumps = gaussian_filter(rng.standard_normal(cover.shape), max(0.6, 0.55 / mpp))
    clumps /= max(float(clumps.std()), 1e-6)
    rim = np.exp(-((inside * radius * mpp / 0.8) ** 2))
    pale = kind.vesicular * (1 - rim)
    body = (1 - 0.62 * pale) * (1 + (0.10 + 0.10 * kind.vesicular) * clumps)
    for _ in range(rng.integers(0, kind.nucleoli + 1) if kind.nucleoli else 0):
        out, at = 0.5 * radius * math.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        spot = np.hypot(u - out * math.cos(at), v - out * math.sin(at)) * mpp
        body += 0.65 * np.exp(-((spot / (0.085 * kind.diameter_um)) ** 2))
    amount = kind.amount * math.exp(rng.normal(0, 0.12))
    drawn: FloatArray = np.maximum(cover * body * amount, 0).astype(np.float32)
    return drawn


def cell_sites(
    rng: np.random.Generator, grid: Grid, spacing_um: float, keep: FloatArray
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Jittered hexagonal sites kept with probability `keep` (cells, cells): x and y in level-0 pixels."""
    spacing = spacing_um / grid.mpp
    rise = spacing * math.sqrt(3) / 2
    rows, columns = math.ceil(grid.size_px / rise) + 1, math.ceil(grid.size_px / spacing) + 1
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    x = (x + 0.5 * (y % 2)) * spacing + rng.normal(0, 0.13 * spacing, x.shape)
    y = y * rise + rng.normal(0, 0.13 * spacing, y.shape)
    chance = rng.random(x.shape)
    on = (x >= 0) & (y >= 0) & (x < grid.size_px) & (y < grid.size_px)
    xs, ys, chances = x[on].astype(np.int64), y[on].astype(np.int64), chance[on]
    taken = chances < keep[ys // grid.step_px, xs // grid.step_px]
    return xs[taken], ys[taken]


def stamp(
    canvas: FloatArray,
    templates: list[FloatArray],
    xs: NDArray[np.int64],
    ys: NDArray[np.int64],
    which: NDArray[np.int64],
) -> None:
    """Lay templates[which] on `canvas` at the sites (the darker wins); those crossing its edge are left out."""
    height, width = canvas.shape
    for x, y, index in zip(xs.tolist(), ys.tolist(), which.tolist(), strict=True):
        template = templates[index]
        half = template.shape[0] // 2
        if half <= x < width - half and half <= y < height - half:
            view = canvas[y - half : y + half + 1, x - half : x + half + 1]
            np.maximum(view, template, out=view)


@dataclass(frozen=True)
class Weave:
    """Periodic textures: `grain` and `net` (side, side), mean 1, for cytoplasm; `fibres` (n,), one value a 1/8 um."""

    grain: FloatArray
    net: FloatArray
    fibres: FloatArray


def repeated(tile: FloatArray, first: int, last: int, width: int) -> FloatArray:
    """Rows first..last of the plane that `tile` repeats over: (last - first, width)."""
    side = tile.shape[0]
    return np.tile(tile[np.arange(first, last) % side], (1, -(-width // side)))[:, :width]


def draw_weave(rng: np.random.Generator, mpp: float) -> Weave:
    """Textures of 640 pixels a side: fine grain, a net of cell borders with pale gaps, and fibres."""
    grain = 1 + 0.22 * smooth_noise(rng, 640, max(0.7, 0.8 / mpp))
    net = np.clip(1 + 0.55 * smooth_noise(rng, 640, 1.7 / mpp) + 0.2 * smooth_noise(rng, 640, 0.7 / mpp), 0.12, 2.2)
    line = gaussian_filter(rng.standard_normal(4096), 8, mode="wrap")
    fibres = np.clip(1 + 0.4 * line / line.std(), 0.45, 1.9)
    return Weave(grain.astype(np.float32), (net / net.mean()).astype(np.float32), fibres.astype(np.float32))


@dataclass(frozen=True)
class Stain:
    """White (3,), and the optical density (RGB) of one unit of haematoxylin and of eosin."""

    white: FloatArray
    haematoxylin: FloatArray
    eosin: FloatArray
    strength: tuple[float, float]  # of haematoxylin and eosin on this slide, about 1


def draw_stain(rng: np.random.Generator, tint: bool) -> Stain:
    """A laboratory's stain; `tint` makes it plainly yellower and less blue (the shortcut)."""
    vectors = np.array([[0.61, 0.73, 0.30], [0.14, 0.93, 0.35]]) + rng.normal(0, 0.018, (2, 3))
    if tint:
        vectors = vectors * [0.92, 0.96, 1.0] + [[0.0, 0.0, 0.22], [0.0, 0.0, 0.30]]
    white = np.array([243.0, 242.0, 244.0]) + rng.normal(0, 1.0, 3)
    strength = np.exp(rng.normal(0, 0.09, 2))
    h, e = vectors.astype(np.float32)
    return Stain(white.astype(np.float32), h, e, (float(strength[0]), float(strength[1])))


def match_stain(
    grid: Grid, stain: Stain, amounts: tuple[FloatArray, FloatArray], target: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Factors for H and E and a remainder that give the blurred picture the colour of `target`, whatever is drawn.

    This is what keeps the mean colour of a place from telling tumour from normal tissue.

    Args:
        amounts: H and E (cells * step_px, cells * step_px) of the whole slide.
        target: optical density (3, cells, cells) of the picture blurred over 20 um.

    Returns:
        Factors (cells, cells) for H and for E, and an optical density (3, cells, cells) to add.
    """
    samples = []
    for amount in amounts:
        stride = max(1, grid.step_px // 4)
        split = amount.reshape(grid.cells, grid.step_px, grid.cells, grid.step_px)[:, ::stride, :, ::stride]
        samples.append(np.ascontiguousarray(split.transpose(1, 3, 0, 2)).reshape(-1, grid.cells, grid.cells))
    weight = (samples[1] > 0.02).mean(axis=0, dtype=np.float32)
    sigma = 20 / grid.cell_um

    def blurred(field: FloatArray) -> FloatArray:
        mean: FloatArray = gaussian_filter(field * weight, sigma) / (gaussian_filter(weight, sigma) + np.float32(1e-4))
        return mean

    colours = np.stack([stain.haematoxylin, stain.eosin])
    unmix = np.linalg.pinv(colours).astype(np.float32)
    wanted = np.einsum("cyx,cs->syx", target, unmix)
    factors = np.ones((2, grid.cells, grid.cells), np.float32)
    for final in (False, False, False, True):
        seen = np.empty_like(target)
        for c in range(3):
            h, e = colours[0, c] * factors[0], colours[1, c] * factors[1]
            passed = np.exp(-(samples[0] * h + samples[1] * e)).mean(axis=0)
            seen[c] = -np.log(np.clip(blurred(passed), 1e-3, 1))
        if not final:
            found = np.maximum(np.einsum("cyx,cs->syx", seen, unmix), 0.02)
            factors = np.clip(factors * np.clip(wanted / found, 0.6, 1.6) ** 1.5, 0.3, 3)
    # None of it at an edge: added to the glass beside the tissue, it would show as a halo.
    inside = np.clip(2 * gaussian_filter(weight, 1.5) - 1, 0, 1)
    remainder = np.clip(target - seen, -0.25, 0.25) * inside
    return factors[0], factors[1], remainder.astype(np.float32)


def ink_strokes(rng: np.random.Generator, grid: Grid) -> FloatArray:
    """Optical density (3, cells, cells) of a zigzag of blue felt pen over the whole slide."""
    x, y = grid.centres_px()
    side = grid.size_px
    turn = rng.uniform(0, np.pi)
    across = (x * math.cos(turn) + y * math.sin(turn)) / side
    along = (y * math.cos(turn) - x * math.sin(turn)) / side
    wobble = 0.02 * smooth_noise(rng, grid.cells, grid.cells / 8)
    phase = (across + wobble) * 7 + np.abs((along * 2) % 2 - 1) * 0.5
    distance = np.abs(phase - np.round(phase)) * 2
    cover = np.clip((0.30 - distance) / 0.06, 0, 1) * (0.85 + 0.1 * smooth_noise(rng, grid.cells, 3))
    return (np.array([1.15, 0.62, 0.10])[:, None, None] * cover).astype(np.float32)


def dust(rng: np.random.Generator, image: ByteArray, mpp: float) -> None:
    """Lay grey specks and short hairs on `image` (height, width, 3), in place: some 8 a square millimetre."""
    for _ in range(rng.poisson(8e-6 * image.shape[0] * image.shape[1] * mpp**2)):
        kind = NucleusKind(float(rng.uniform(3, 12)), 0.3, float(rng.choice([1.3, 1.6, 9.0])), 0.2, 0.0, 0, 0.25)
        speck = _nucleus(rng, kind, mpp, float(rng.uniform(0, np.pi)))
        side = speck.shape[0]
        if side < min(image.shape[:2]):
            y, x = rng.integers(0, image.shape[0] - side), rng.integers(0, image.shape[1] - side)
            view = image[y : y + side, x : x + side]
            view[:] = (view * np.exp(-speck)[..., None]).astype(np.uint8)
