"""The tiled engine: overlapping tiles, each seen on its own as in training, blended by windows that sum to one.

For networks of which every cell depends on the whole tile (squeeze-excite, attention, AIM's masks), so that no halo
makes a block exact. The raised-cosine window along each axis is the usual one of overlap-add; our choice of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.errors import ConfigError, NetworkError
from medsd.heatmap.grid import MapGrid
from medsd.heatmap.label_free import LABEL_FREE
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.heatmap.maps import Assembled, Engine, as_array
from medsd.heatmap.store import BlockStore
from medsd.heatmap.value_map import Floats
from medsd.networks.aim import AimClassifier, stage_layer
from medsd.networks.classifier import Classifier
from medsd.networks.effective_field import measure_effective_field
from medsd.networks.modes import evaluating
from medsd.networks.tokens import check_image_px, token_stride
from medsd.progress import Pixels, Progress
from medsd.saliency.neutral import NeutralReference, find_neutral, mean_activation, reference_at, tile_evidence
from medsd.slides.reading import read_tiles, reading_threads
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

logger = logging.getLogger(__name__)

_PROBE_PX = 256
# Tiles a side that are computed and kept together.
_GROUP = 16


class _Group(NamedTuple):
    """Tiles that are computed and kept together: their places in pixels at the model's mpp."""

    left: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]


@dataclass(eq=False, repr=False)
class TiledEngine(Engine):
    """Maps slides with one classifier, tile by tile.

    Tiles lie half a tile apart (rounded up to whole cells of the saliency's layer), so that hidden cells look at the
    middle of map pixels, to a pixel. The probability is that of each tile, one value a stride cell, and its centre is
    the tile's. The saliency of a place is the weighted mean over the tiles that hold it of what a method says of a
    tile's evidence: the values of `DenseEngine`, which takes the plain mean over all tiles on the stride grid. They
    differ where zero padding at a tile's border reaches, which the windows weigh least, and where the dense engine also
    counts tiles that end just before the place. The map of "deeplift" sums to the log-odds of each tile before tiles
    are blended; after that to their blend.

    Arguments and errors as `Engine`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Smaller after the device ran out of memory, for all slides that follow.
        self._batch = self.settings.batch
        check_image_px(self.classifier.encoder, self.classifier.encoder_name, self.tile_px)
        self.stride = _total_stride(self.classifier)
        if self.tile_px % self.stride:
            raise NetworkError(f"tile_px={self.tile_px}: must be a multiple of the network's stride, {self.stride}")
        methods = self.settings.methods
        if MASK in methods and len(methods) > 1:
            raise ConfigError("methods: 'mask' has a grid of its own; ask for it alone")
        for name in methods:
            if name in LABEL_FREE:
                raise ConfigError(
                    f"method '{name}': takes features of the whole slide apart, but this network is mapped tile by "
                    "tile; choose one that explains a class"
                )
        self.hidden = measure_effective_field(
            self.classifier, _finest_stage(self.classifier) if MASK in methods else self.settings.layer
        )
        cells = self.tile_px // self.hidden.stride
        self.step_px = math.ceil(cells / 2) * self.hidden.stride
        # Where a tile starts whose first cell looks at the middle of the first map pixel; whole pixels, or every tile
        # would be read between pixels.
        # The mean over the symmetries looks square on its cell.
        off_centre = 0.0 if self.classifier.test_time_augmentation else self.hidden.stride / 2 - self.hidden.centre
        self._aligned_px = round(off_centre)
        # The first tile starts at the slide's edge or just before it.
        self.origin_px = min(self._aligned_px, -(-self._aligned_px % self.hidden.stride))

    @property
    def strides(self) -> tuple[int, int]:
        return self.stride, self.hidden.stride

    @property
    def tiles(self) -> str:
        turns = ", each seen 8 ways, turned and mirrored" if self.classifier.test_time_augmentation else ""
        return f"tiled, blended tiles of {self.tile_px} px, {self.step_px} px apart, at {self.mpp:g} µm/px{turns}"

    def assemble(self, slide: Slide, tissue: TissueMask, store: Path, progress: Progress) -> Assembled:
        blocks = BlockStore(store / "blocks")
        grids = [MapGrid.over(slide, self.mpp, stride) for stride in self.strides]
        groups = self._groups(grids, tissue)
        todo = [number for number, _ in enumerate(groups) if not blocks.has(f"maps-{number}")]

        def work() -> Iterator[Pixels]:
            for number in todo:
                blocks.write(f"maps-{number}", **(yield from self._blended(slide, groups[number], grids)))

        tiles = sum(len(groups[number].left) for number in todo)
        for _ in progress(work(), tiles, "tile"):
            pass
        names = ("probability", *self.settings.methods)
        sums = {name: np.zeros(grids[name != "probability"].shape, np.float32) for name in names}
        weights = [np.zeros_like(sums[name]) for name in names[:2]]
        lost, moved = [np.zeros((0, 2), np.int32)], np.zeros(2)
        for number, _ in enumerate(groups):
            arrays = blocks.read(f"maps-{number}")
            lost.append(arrays["lost"])
            moved += arrays["moved"]
            for grid, (name, weight) in enumerate(zip(("weight", "fine_weight"), weights, strict=True)):
                _add(weight, arrays[name], *arrays["corners"][grid])
            for name, values in sums.items():
                _add(values, arrays[name], *arrays["corners"][int(name != "probability")])
        for name, values in sums.items():
            weight = weights[int(name != "probability")]
            values[weight == 0] = np.nan
            np.divide(values, weight, out=values, where=weight > 0)
        count = sum(len(group.left) for group in groups)
        probability = sums.pop("probability")
        lost_pixels = np.unique(np.concatenate(lost), axis=0)
        share = float(moved[0] / moved[1]) if moved[1] else None
        return Assembled(probability, sums, lost_pixels, count, count * self.tile_px**2, moved=share)

    def use_less_memory(self) -> bool:
        if self._batch == 1:
            return False
        self._batch //= 2
        logger.warning("out of memory: goes on with %d tile(s) at once", self._batch)
        return True

    def run(self, images: Tensor, method: str | None = None) -> tuple[Floats, Floats]:
        """Tiles (B, 3, tile_px, tile_px) uint8, each on its own.

        Returns:
            probability (B,), and the method's map (B, tile_px / hidden stride, tile_px / hidden stride): of the
            logit of the target above the mean of the others (for two classes the log-odds), of "deeplift" with that
            sum; or the share of masks open, 0 to 1.
        """
        probability, maps, _ = self._run(images)
        return probability, maps[method or self.settings.methods[0]]

    def neutral(self, without: Iterable[Tensor], having: Iterable[Tensor], source: str) -> NeutralReference:
        layer, shape = f"encoder.{self.settings.layer}", (3, self.tile_px, self.tile_px)
        low, high = (
            mean_activation(self.classifier, layer, (batch.to(self.classifier.device) for batch in tiles))
            for tiles in (without, having)
        )
        evidence_of = tile_evidence(self.classifier, layer, "evidence", self.target, shape)
        point = find_neutral(self.calibrated_evidence(evidence_of), low, high)
        return reference_at(point, self.settings.layer, "tile", source)

    def _run(self, images: Tensor) -> tuple[Floats, dict[str, Floats], npt.NDArray[np.float64]]:
        """Probability (B,), each method's maps (B, h, w), and absolute sums of the additive maps.

        The sums are (2,): of the correction to the exact evidence, and of the map with it.
        """
        moved = np.zeros(2)
        if self.settings.methods == (MASK,):
            assert isinstance(self.classifier, AimClassifier)
            with evaluating(self.classifier), torch.no_grad():
                logits, share = self.classifier.open_share(images)
            return as_array(self.probability(logits)), {MASK: as_array(share)}, moved
        found, normal = {}, self.classifier.normalise(images)
        for name in self.settings.methods:
            method = self.method(name, self.classifier, f"encoder.{self.settings.layer}", plane=False)
            explanation = self.explain(method, normal)
            maps = explanation.maps
            if name == ADDITIVE:
                assert self.reference is not None
                maps = maps * (len(self.reference.vector) / self.temperature)
                # What smoothing, class tokens and functions without a rule leave is shared out evenly.
                missing = self.evidence(explanation.logits) - maps.sum(dim=(1, 2))
                maps = maps + (missing / maps[0].numel())[:, None, None]
                moved = np.array([float(missing.abs().sum()), float(maps.abs().sum())])
            found[name] = as_array(maps)
        return as_array(self.probability(explanation.logits)), found, moved

    def _groups(self, grids: list[MapGrid], tissue: TissueMask) -> list[_Group]:
        """Every tile that holds a map pixel with tissue, in squares of about `_GROUP` tiles a side."""
        starts = []
        for pixels, cells in zip(grids[0].shape[::-1], grids[1].shape[::-1], strict=True):
            # To the middle of the last pixel of the probability, and to the last cell of the saliency.
            end_px = max((pixels - 0.5) * self.stride + 1, cells * self.hidden.stride + self._aligned_px)
            steps = math.ceil((end_px - self.origin_px - self.tile_px) / self.step_px)
            starts.append(self.origin_px + self.step_px * np.arange(max(0, steps) + 1))
        left, top = (places.ravel() for places in np.meshgrid(*starts))
        # A map pixel whose centre the tile holds may have its tissue outside the tile, by half a stride cell.
        margin = self.stride / 2
        ratio = grids[0].ratio
        side_level0_px = (self.tile_px + self.stride) * ratio
        wanted = tissue.share((left - margin) * ratio, (top - margin) * ratio, side_level0_px) > 0
        left, top = left[wanted], top[wanted]
        square = _GROUP * self.step_px
        places = np.stack([(top - self.origin_px) // square, (left - self.origin_px) // square])
        _, of = np.unique(places, axis=1, return_inverse=True)
        return [_Group(left[of == number], top[of == number]) for number in range(int(of.max(initial=-1)) + 1)]

    def _blended(
        self, slide: Slide, group: _Group, grids: list[MapGrid]
    ) -> Generator[Pixels, None, dict[str, npt.NDArray[Any]]]:
        """Weighted sums of a group's tiles over the map pixels that they hold; yields after each tile."""
        ratio = self.mpp / slide.mpp
        x, y = (np.rint(place * ratio).astype(np.int64) for place in group)
        first, last = (
            [(int(find(group.top)), int(find(group.left))) for find in (np.min, np.max)][end] for end in (0, 1)
        )
        corners = [[math.ceil(start / self.stride - 0.5) for start in first]]
        corners.append([(start - self._aligned_px) // self.hidden.stride for start in first])
        ends = [math.ceil((start + self.tile_px) / self.stride - 0.5) for start in last]
        shape = [end - start for start, end in zip(corners[0], ends, strict=True)]
        cells = self.tile_px // self.hidden.stride
        fine = [(end - start) // self.hidden.stride + cells for start, end in zip(first, last, strict=True)]
        sums = {name: np.zeros(fine, np.float32) for name in self.settings.methods}
        probability, weight, fine_weight = (
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(fine, np.float32),
        )
        lost, moved = [np.zeros((0, 2), np.int32)], np.zeros(2)
        threads = reading_threads(self.settings.workers, self.classifier.device.type == "cuda")
        tiles = read_tiles(slide, x, y, self.tile_px, self.mpp, threads)
        window = np.outer(
            *2 * [blend_window((np.arange(cells) + 0.5) * self.hidden.stride, self.tile_px, self.step_px)]
        )
        while batch := list(islice(tiles, self._batch)):
            images = torch.from_numpy(np.stack([tile.pixels for tile in batch])).permute(0, 3, 1, 2)
            values, maps, corrected = self._run(images.to(self.classifier.device))
            moved += corrected
            for number, tile in enumerate(batch):
                down, across = int(group.top[tile.row]), int(group.left[tile.row])
                row, column = (
                    (start - at) // self.hidden.stride for start, at in zip((down, across), first, strict=True)
                )
                _add(fine_weight, window, row, column)
                for name, found in maps.items():
                    _add(sums[name], window * found[number], row, column)
                rows, columns, coarse = self._coarse_window(down, across)
                _add(weight, coarse, rows - corners[0][0], columns - corners[0][1])
                _add(probability, coarse * values[number], rows - corners[0][0], columns - corners[0][1])
                if tile.seen is not None:
                    lost.append(grids[1].holding(~tile.seen, across, down))
                yield Pixels(self.tile_px**2)
        return {
            **sums,
            "probability": probability,
            "weight": weight,
            "fine_weight": fine_weight,
            "corners": np.array(corners, np.int32),
            "lost": np.concatenate(lost),
            "moved": moved,
        }

    def _coarse_window(self, top: int, left: int) -> tuple[int, int, npt.NDArray[np.float64]]:
        """Row, column and weights of the probability's pixels whose centres a tile holds."""
        firsts, windows = [], []
        for start in (top, left):
            first = math.ceil(start / self.stride - 0.5)
            last = math.ceil((start + self.tile_px) / self.stride - 0.5)
            firsts.append(first)
            offsets = (np.arange(first, last) + 0.5) * self.stride - start
            windows.append(blend_window(offsets, self.tile_px, self.step_px))
        return firsts[0], firsts[1], np.outer(*windows)


def blend_window(offsets_px: npt.NDArray[np.floating], tile_px: int, step_px: int) -> npt.NDArray[np.float64]:
    """Weight of places along one axis of a tile; over tiles a step apart the weights sum to 1.

    A raised cosine over the overlap with either neighbour and 1 between: a Hann window where tiles overlap by half.

    Args:
        offsets_px: (n,) places from the tile's start, 0 to `tile_px`.
        tile_px: side of the tiles.
        step_px: from one tile to the next, at least half a tile and at most one.
    """
    overlap = tile_px - step_px
    if overlap == 0:
        return np.ones(len(offsets_px))
    edge = np.minimum(offsets_px, tile_px - offsets_px)
    weights: npt.NDArray[np.float64] = np.sin(np.pi / 2 * np.clip(edge / overlap, 0, 1)) ** 2
    return weights


def _add(total: Floats, values: npt.NDArray[np.floating], top: int, left: int) -> None:
    """Add values to a map at row `top` and column `left`, as far as they lie on it."""
    rows, columns = (
        slice(max(0, -start), max(0, min(count, length - start)))
        for start, count, length in zip((top, left), values.shape, total.shape, strict=True)
    )
    inner = values[rows, columns]
    total[max(0, top) : max(0, top) + inner.shape[0], max(0, left) : max(0, left) + inner.shape[1]] += inner


def _total_stride(classifier: Classifier) -> int:
    if (stride := token_stride(classifier.encoder)) is not None:
        return stride
    with evaluating(classifier), torch.no_grad():
        x = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, device=classifier.device)
        return _PROBE_PX // int(classifier.feature_map(x).shape[-1])


def _finest_stage(classifier: Classifier) -> str:
    """Name of the encoder's layer that gives the finest stage with a mask."""
    if not isinstance(classifier, AimClassifier) or not classifier.options["masking"]:
        raise NetworkError("method 'mask': this classifier has no masks; use 'deeplift'")
    return stage_layer(classifier.encoder, classifier.stages[-1])
