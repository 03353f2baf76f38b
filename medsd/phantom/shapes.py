"""The anatomy of a phantom slide: the node's outline, metastases, follicles, sinuses, fat (all our choice).

Fields are float32 arrays (cells, cells) over the slide, one cell for about 4 micrometres; places are level-0 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from shapely.geometry import Polygon

from medsd.annotations.shapes import only_polygons
from medsd.errors import DatasetError

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
ByteArray: TypeAlias = NDArray[np.uint8]

CELL_UM = 4.0
ANGLES = np.linspace(0, 2 * np.pi, 720, endpoint=False)


@dataclass(frozen=True)
class Grid:
    """The cells that fields are kept on: square, `step_px` level-0 pixels a side, covering a slide of `size_px`."""

    size_px: int
    mpp: float

    @property
    def step_px(self) -> int:
        """Side of a cell in level-0 pixels."""
        return max(1, round(CELL_UM / self.mpp))

    @property
    def cells(self) -> int:
        """Cells a side."""
        return -(-self.size_px // self.step_px)

    @property
    def cell_um(self) -> float:
        """Side of a cell in micrometres."""
        return self.step_px * self.mpp

    @property
    def anatomy(self) -> float:
        """How large follicles and trabeculae are drawn: 1 on a 2 mm slide, less on smaller ones so that some fit."""
        return float(np.clip(self.size_px * self.mpp / 2048, 0.3, 1.0))

    def centres_px(self) -> tuple[FloatArray, FloatArray]:
        """x (1, cells) and y (cells, 1) of the cells' centres in level-0 pixels."""
        at = ((np.arange(self.cells) + 0.5) * self.step_px).astype(np.float32)
        return at[None, :], at[:, None]

    def upsample(self, field: FloatArray, first: int, last: int) -> FloatArray:
        """`field` at level-0 rows first..last: (last - first, cells * step_px), bilinear between cell centres."""
        n, step = self.cells, self.step_px
        column, row = (
            np.clip((at + 0.5) / step - 0.5, 0, n - 1) for at in (np.arange(n * step), np.arange(first, last))
        )
        left, top = (np.minimum(at.astype(int), max(0, n - 2)) for at in (column, row))
        across, down = (column - left).astype(np.float32), (row - top).astype(np.float32)[:, None]
        rows = field[top[0] : top[-1] + 2]
        wide = rows[:, left] * (1 - across) + rows[:, left + 1] * across
        rise = np.diff(wide, axis=0)
        out: FloatArray = rise[top - top[0]]
        out *= down
        out += wide[top - top[0]]
        return out


def smooth_noise(rng: np.random.Generator, cells: int, sigma_cells: float) -> FloatArray:
    """A periodic Gaussian random field (cells, cells), mean 0, deviation 1, correlated over about `sigma_cells`."""
    white = np.fft.rfft2(rng.standard_normal((cells, cells)))
    squared = np.fft.fftfreq(cells)[:, None] ** 2 + np.fft.rfftfreq(cells)[None, :] ** 2
    white *= np.exp(-2 * (np.pi * sigma_cells) ** 2 * squared)
    white[0, 0] = 0
    field = np.fft.irfft2(white, s=(cells, cells))
    unit: FloatArray = (field / max(float(field.std()), 1e-12)).astype(np.float32)
    return unit


@dataclass(frozen=True)
class Node:
    """A lymph node: star-shaped about `centre` (x, y level-0 px), `radius` (720,) px at `ANGLES`, hilum at an angle."""

    centre: tuple[float, float]
    radius: NDArray[np.float64]
    hilum: float

    def outline(self, inset_px: float = 0.0) -> Polygon:
        """The outline in level-0 pixels, `inset_px` inside the capsule's outer face."""
        radius = self.radius - inset_px
        points = np.stack([self.centre[0] + radius * np.cos(ANGLES), self.centre[1] + radius * np.sin(ANGLES)], axis=1)
        return Polygon(points)

    def depth_px(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Distance below the surface at level-0 `x`, `y` (first order), negative outside."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        angle = np.arctan2(dy, dx)
        slope = np.gradient(self.radius, ANGLES[1]) / self.radius
        depth = np.interp(angle, ANGLES, self.radius, period=2 * np.pi) - np.hypot(dx, dy)
        depth /= np.sqrt(1 + np.interp(angle, ANGLES, slope, period=2 * np.pi) ** 2)
        signed: FloatArray = depth.astype(np.float32)
        return signed


def draw_node(rng: np.random.Generator, size_px: int) -> Node:
    """A bean over 45 to 65 % of the slide, 2 % clear of its edges."""
    for _ in range(1000):
        turn, hilum = rng.uniform(0, 2 * np.pi, 2)
        aspect = rng.uniform(1.05, 1.4)
        local = ANGLES - turn
        shape = 1 / np.hypot(np.cos(local) / math.sqrt(aspect), np.sin(local) * math.sqrt(aspect))
        away = np.angle(np.exp(1j * (ANGLES - hilum)))
        shape *= 1 - rng.uniform(0.12, 0.24) * np.exp(-((away / 0.42) ** 2))
        shape *= np.exp(_harmonics(rng, 3, 9, 0.028))
        area = 0.5 * float(np.mean(shape**2)) * 2 * np.pi
        node = Node((0.0, 0.0), shape * math.sqrt(rng.uniform(0.47, 0.62) / area) * size_px, float(hilum))
        left, top, right, bottom = node.outline().bounds
        if max(right - left, bottom - top) <= 0.96 * size_px:
            shift = rng.uniform(0.02 * size_px, 0.98 * size_px - np.array([right - left, bottom - top]))
            return Node((float(shift[0] - left), float(shift[1] - top)), node.radius, node.hilum)
    raise DatasetError("a phantom's node found no place; use another seed")


def _harmonics(rng: np.random.Generator, first: int, last: int, amplitude: float) -> NDArray[np.float64]:
    """(720,) random periodic curve over `ANGLES`: waves first..last, each weaker than the one before."""
    curve = np.zeros_like(ANGLES)
    for wave in range(first, last + 1):
        curve += amplitude * (first / wave) ** 0.9 * rng.normal() * np.cos(wave * ANGLES + rng.uniform(0, 2 * np.pi))
    return curve


def draw_lesions(rng: np.random.Generator, node: Node, size_px: int, inset_px: float) -> tuple[IntArray, ...]:
    """1 to 4 metastases, apart from each other and inside the capsule: (n, 2) corners (x, y) in level-0 pixels.

    Each is 0.1 to 0.44 of the slide's side across (diameter of the disc of its area), together 10 to 35 % of the node.
    """
    inner, whole = node.outline(inset_px), node.outline().area
    for _ in range(2000):
        share = rng.dirichlet(np.full(rng.integers(1, 5), 4.0)) * rng.uniform(0.13, 0.36)
        blobs: list[Polygon] = []
        for area in share * whole:
            blob = _blob(rng, node, float(area)).intersection(inner)
            largest = max(only_polygons(blob).geoms, key=lambda piece: piece.area, default=Polygon())
            blobs.append(Polygon(np.round(np.asarray(largest.exterior.coords))))
        across = np.array([2 * math.sqrt(blob.area / math.pi) for blob in blobs]) / size_px
        apart = all(a.distance(b) > 0.02 * size_px for i, a in enumerate(blobs) for b in blobs[:i])
        total = sum(blob.area for blob in blobs) / whole
        valid = all(blob.is_valid for blob in blobs)
        if valid and apart and across.min() >= 0.1 and across.max() <= 0.44 and 0.1 <= total <= 0.35:
            return tuple(np.asarray(blob.exterior.coords)[:-1].astype(np.int64) for blob in blobs)
    raise DatasetError("a phantom's metastases found no place; use another seed")


def _blob(rng: np.random.Generator, node: Node, area: float) -> Polygon:
    """A ragged blob of about `area` square pixels, centred anywhere in the node."""
    angle = rng.uniform(0, 2 * np.pi)
    out = np.interp(angle, ANGLES, node.radius, period=2 * np.pi) * math.sqrt(rng.uniform(0, 0.9))
    radius = np.exp(_harmonics(rng, 2, 6, 0.13) + _harmonics(rng, 7, 24, 0.035))
    radius *= math.sqrt(area / (math.pi * float(np.mean(radius**2))))
    x = node.centre[0] + out * np.cos(angle) + radius * np.cos(ANGLES)
    y = node.centre[1] + out * np.sin(angle) + radius * np.sin(ANGLES)
    return Polygon(np.stack([x, y], axis=1)[::3]).buffer(0)


@dataclass(frozen=True)
class Anatomy:
    """What lies where: fields 0 to 1 (cells, cells), but `depth_um` and `along_um` (fibres follow its contours)."""

    depth_um: FloatArray
    along_um: FloatArray
    capsule: FloatArray
    stroma: FloatArray
    follicle: FloatArray
    mantle: FloatArray
    fat: NDArray[np.float64]  # (n, 3) vacuoles: x, y, radius in level-0 pixels


def draw_anatomy(rng: np.random.Generator, grid: Grid, node: Node, capsule_um: float) -> Anatomy:
    """Capsule, sinuses and trabeculae, follicles below the capsule, fat at the hilum; nothing here knows of tumour."""
    scale, cell = grid.anatomy, grid.cell_um
    x, y = grid.centres_px()
    depth = node.depth_px(x, y) * grid.mpp
    warp = smooth_noise(rng, grid.cells, 14 / cell)
    edge = depth + 1.5 * warp
    capsule = _ramp((capsule_um - edge) / 3)
    follicle, mantle = np.zeros_like(depth), np.zeros_like(depth)
    for fx, fy, radius in _scatter_follicles(rng, grid, depth):
        distance = np.hypot((x - fx), (y - fy)) * grid.mpp + 7 * scale * warp
        inside = _ramp((radius - distance) / 10)
        follicle = np.maximum(follicle, inside)
        mantle = np.maximum(mantle, _ramp((radius + 35 * scale - distance) / 14))
    mantle *= 1 - follicle
    ridge = smooth_noise(rng, grid.cells, 75 * scale / cell) + 0.12 * smooth_noise(rng, grid.cells, 18 * scale / cell)
    from_hilum = np.hypot(x - _hilum(node)[0], y - _hilum(node)[1]) / grid.size_px
    medulla = np.exp(-((from_hilum / 0.3) ** 2))
    where = _ramp((smooth_noise(rng, grid.cells, 110 * scale / cell) + 2.2 * medulla - 0.2) / 0.6)
    stroma = np.exp(-((ridge / (0.09 + 0.22 * medulla)) ** 2)) * where
    stroma = np.maximum(stroma, 0.9 * np.exp(-((from_hilum / 0.085) ** 4)))
    sinus = 0.75 * np.exp(-(((edge - capsule_um - 9 * scale) / (6 * scale)) ** 2))
    stroma = np.maximum(stroma, sinus) * (1 - follicle) * (1 - capsule)
    along = depth * capsule + 75 * scale * ridge * (1 - capsule)
    return Anatomy(
        depth_um=depth,
        along_um=along.astype(np.float32),
        capsule=capsule,
        stroma=stroma.astype(np.float32),
        follicle=follicle,
        mantle=mantle.astype(np.float32),
        fat=_scatter_fat(rng, grid, node),
    )


def _ramp(value: NDArray[np.floating[Any]]) -> FloatArray:
    """0 below -1, 1 above 1, smooth between."""
    at: FloatArray = np.clip((value + 1) / 2, 0, 1).astype(np.float32)
    return at * at * (np.float32(3) - np.float32(2) * at)


def _hilum(node: Node) -> tuple[float, float]:
    """Where the hilum lies, (x, y) level-0 pixels."""
    radius = float(np.interp(node.hilum, ANGLES, node.radius, period=2 * np.pi)) * 0.86
    return node.centre[0] + radius * math.cos(node.hilum), node.centre[1] + radius * math.sin(node.hilum)


def _scatter_follicles(rng: np.random.Generator, grid: Grid, depth_um: FloatArray) -> list[tuple[float, float, float]]:
    """Germinal centres (x, y in level-0 px, radius in um), most of them in the cortex, none touching."""
    found: list[tuple[float, float, float]] = []
    scale = grid.anatomy
    for _ in range(260):
        x, y = rng.uniform(0, grid.size_px, 2)
        radius = rng.uniform(45, 115) * scale
        below = float(depth_um[int(y) // grid.step_px, int(x) // grid.step_px]) - radius
        cortex = 25 * scale < below < 170 * scale or (below > 0 and rng.random() < 0.12)
        if cortex and all(math.hypot(x - a, y - b) * grid.mpp > radius + r + 70 * scale for a, b, r in found):
            found.append((x, y, radius))
    return found


def _scatter_fat(rng: np.random.Generator, grid: Grid, node: Node) -> NDArray[np.float64]:
    """Fat cells packed about the hilum: (n, 3) x, y, radius in level-0 pixels."""
    found = np.zeros((0, 3))
    centres = rng.normal(_hilum(node), 0.04 * grid.size_px, (900, 2))
    radii = np.sort(rng.uniform(8, 30, 900))[::-1] * max(0.5, grid.anatomy) / grid.mpp
    depth = node.depth_px(centres[:, 0].astype(np.float32), centres[:, 1].astype(np.float32))
    for (x, y), radius in zip(centres[depth > radii], radii[depth > radii], strict=True):
        if np.all(np.hypot(found[:, 0] - x, found[:, 1] - y) > found[:, 2] + 1.1 * radius):
            found = np.vstack([found, [x, y, radius]])
    return found
