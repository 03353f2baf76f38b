"""The dense engine: probability and hidden-layer saliency of a whole slide from about one pass over its tissue.

A classifier that is linear after average pooling gives the logits of every tile position at once: the head is applied
to each feature cell and averaged over the tile's window. The gradient of the sum of all windows is the average of what
overlapping tiles on the feature grid would give, at the price of one forward and one backward pass.

Hidden features are computed once, stage by stage (`cascade`), and kept on disk. Above the hidden layer, the cells of a
rectangle go forward, and the gradient of their own evidence goes back; rectangles overlap where both reach, and add up,
since a gradient is linear in what it is of.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.heatmap.additive import conserve
from medsd.heatmap.cascade import Cascade, Node
from medsd.heatmap.features import FeatureStore, TissueFeatures, room_on
from medsd.heatmap.grid import MapGrid, between, block_any, canvas_origin, place_of
from medsd.heatmap.label_free import LABEL_FREE, slide_maps
from medsd.heatmap.legend import ADDITIVE, BY_PARTS
from medsd.heatmap.maps import Assembled, Engine, as_array
from medsd.heatmap.partition import Rect, grown, partition
from medsd.heatmap.store import BlockStore
from medsd.heatmap.value_map import Floats
from medsd.heatmap.windows import Part, Windows, window_mean
from medsd.networks.classifier import TileClassifier
from medsd.networks.effective_field import measure_effective_field
from medsd.networks.modes import evaluating, recorded
from medsd.progress import Pixels, Progress
from medsd.saliency.neutral import NeutralReference, find_neutral, plane_evidence, reference_at
from medsd.slides.readers.base import Bools
from medsd.slides.reading import read_ahead, reading_threads
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

logger = logging.getLogger(__name__)

_READ_AHEAD = 2
_LEAST_BLOCK_PX = 256
# Halved where memory runs out before anything was said of blocks.
_FIRST_BLOCK_PX = 4096


@dataclass(frozen=True)
class _Plan:
    """What of a slide is computed, on the canvas of feature cells.

    Attributes:
        size: (width, height) of the canvas.
        tissue: (height, width) bool: cells under map pixels that are seen; the gradient is of their evidence.
        rects: parts of the canvas whose cells' logits are wanted, and their crops (with what the cells see).
        nodes: hidden features that are needed, in the order in which they are computed.
    """

    size: tuple[int, int]
    tissue: Bools
    rects: list[tuple[Rect, Rect]]
    nodes: list[Node]


@dataclass(eq=False, repr=False)
class DenseEngine(Engine):
    """Maps slides without tiles; arguments and errors as `Engine`.

    Raises:
        NetworkError: the network has global operations or a path around the layer, or a method looks at whole tiles;
            from `map`: a cell sees more than memory holds.
    """

    classifier: TileClassifier

    def __post_init__(self) -> None:
        super().__post_init__()
        # After the device ran out of memory, for all slides that follow.
        self._smaller_px: int | None = None
        for name in self.settings.methods:
            if name not in (*BY_PARTS, *LABEL_FREE):
                raise NetworkError(f"method '{name}': looks at whole tiles, mapped tile by tile (way 'auto')")
        self.cascade = Cascade(self.classifier, self.settings.layer, self.settings.smoothing == "backward_hook")
        stride = self.cascade.features.stride
        if self.tile_px % stride:
            raise NetworkError(f"tile_px={self.tile_px}: must be a multiple of the network's stride, {stride}")
        self.window = self.tile_px // stride
        self._windows = Windows(self.cascade.top.network, self.classifier, self.window)
        # Where cells look, not the middle of what they can see: the shortcuts of ResNet-D weigh more than the rest.
        features, hidden = (measure_effective_field(self.classifier, layer) for layer in (None, self.settings.layer))
        self.origin_px = canvas_origin(features, hidden)
        self._shift, self.share = place_of(features, self.origin_px)
        # Map pixel of the canvas's first hidden cell, which lies on one.
        self._hidden_shift = round((hidden.centre + self.origin_px) / hidden.stride - 0.5)

    @property
    def block_px(self) -> int | None:
        """Side of what is computed at once, as in `MapSettings`."""
        return self._smaller_px or self.settings.block_px

    @property
    def _by_parts(self) -> list[str]:
        """The methods whose maps of parts of a slide are added up."""
        return [name for name in self.settings.methods if name in BY_PARTS]

    @property
    def strides(self) -> tuple[int, int]:
        return self.cascade.features.stride, self.cascade.hidden.stride

    @property
    def tiles(self) -> str:
        return f"dense, mean over tiles of {self.tile_px} px at {self.mpp:g} µm/px"

    def assemble(self, slide: Slide, tissue: TissueMask, store: Path, progress: Progress) -> Assembled:
        blocks = BlockStore(store / f"blocks-{self.block_px or 'auto'}")
        grids = [MapGrid.over(slide, self.mpp, stride) for stride in self.strides]
        plan = self._plan(grids, tissue)
        for name in set(self._by_parts).difference(self._methods):
            # What is recorded once, of maps that are whole.
            self.run(
                torch.zeros((1, 3, self.tile_px, self.tile_px), dtype=torch.uint8, device=self.classifier.device), name
            )
        blocks.belongs_to(np.array([*(rect for rect, _ in plan.rects), *(node.rect for node in plan.nodes)], np.int32))
        todo = [number for number, _ in enumerate(plan.rects) if not blocks.has(f"maps-{number}")]
        # A rectangle's features are computed before it, and let go behind the last that needs them.
        users = {
            at: [number for number in todo if plan.rects[number][1].meets(node.rect)]
            for at, node in enumerate(plan.nodes)
        }
        free = [name for name in self.settings.methods if name in LABEL_FREE]
        if free:  # features are needed to the end
            users = {at: wanted or [len(plan.rects)] for at, wanted in users.items()}
        kept = FeatureStore(blocks, room_on(self.classifier.device))
        missing = [at for at, wanted in users.items() if wanted and not kept.has(at)]
        missing.sort(key=lambda at: users[at][0])
        lost: list[np.ndarray] = []
        leaves = (leaf.crop for at in missing for leaf in plan.nodes[at].leaves())
        images = self._images(slide, leaves, grids[1], lost)

        def work() -> Iterator[Pixels]:
            waiting = list(missing)
            for number in [*todo, len(plan.rects)]:
                while waiting and users[waiting[0]][0] <= number:
                    at = waiting.pop(0)
                    with evaluating(self.classifier), torch.no_grad():
                        features = self.cascade.compute(plan.nodes[at], images)
                    # Before the features, for those that are there are not computed again.
                    blocks.write(f"lost-{at}", lost=_together(lost))
                    lost.clear()
                    kept.write(at, features)
                    yield Pixels(sum(leaf.crop.area for leaf in plan.nodes[at].leaves()) * self.strides[0] ** 2)
                if number == len(plan.rects):
                    return
                blocks.write(f"maps-{number}", **self._maps(plan, number, kept))
                for at, wanted in users.items():
                    if wanted and wanted[-1] == number and not free:
                        kept.remove(at)
                yield Pixels(0)

        for _ in progress(work(), len(missing) + len(todo), "block"):
            pass
        return self._assembled(plan, grids, blocks, kept)

    def use_less_memory(self) -> bool:
        before = self.block_px or _FIRST_BLOCK_PX
        if before <= _LEAST_BLOCK_PX:
            return False
        self._smaller_px = max(_LEAST_BLOCK_PX, before // 2)
        logger.warning("out of memory: goes on with blocks of %d px", self._smaller_px)
        return True

    def run(self, images: Tensor, method: str | None = None) -> tuple[Floats, Floats]:
        """Maps of whole images (B, 3, H, W) uint8, sides multiples of the stride, without any placing.

        Returns:
            probability (B, H / stride, W / stride) of the tile around each cell, and the method's map
            (B, H / hidden stride, W / hidden stride): of a tile's logit of the target above the mean of the others
            (for two classes the log-odds), averaged over the tiles that hold the place; of "deeplift" tempered, so that
            a map of one tile sums to its log-odds.
        """
        with evaluating(self.classifier), torch.no_grad():
            hidden = self.cascade.whole(images)
        name, stage = method or self.settings.methods[0], self.cascade.top
        self._windows.cells.part = None
        logits, maps = self._explained(name, hidden)
        if name == ADDITIVE:
            sums = as_array(self.evidence(logits) / self.window**2)
            # In the image's own squares, or what its last cells say would lie outside.
            maps = np.stack([conserve(*pair, stage.taken) for pair in zip(maps, sums, strict=True)])
        return as_array(self.probability(window_mean(logits, self.window))), maps

    def with_surroundings(self, images: Tensor) -> Tensor:
        """Log-odds of tiles as a slide's map has them, with what lies around them in the place of padding.

        Args:
            images: (B, 3, 3 * tile_px, 3 * tile_px) uint8, each tile in the middle.

        Returns:
            (B,)
        """
        with evaluating(self.classifier), torch.no_grad():
            hidden = self.cascade.whole(images.to(self.classifier.device))
            self._windows.cells.part = None
            cells = self._logits(self._windows.cells(hidden))
        first, end = self.window, 2 * self.window
        return self.evidence(cells[:, :, first:end, first:end].mean(dim=(2, 3)))

    def neutral(self, without: Iterable[Tensor], having: Iterable[Tensor], source: str) -> NeutralReference:
        bias = self.classifier.head.bias
        with evaluating(self.classifier), torch.no_grad():
            low, high = (
                _mean(self.cascade.whole(batch.to(self.classifier.device)) for batch in tiles)
                for tiles in (without, having)
            )

        def evidence_of(vector: Tensor) -> Tensor:
            return plane_evidence(self._windows.cells, vector, self.target, bias)

        point = find_neutral(self.calibrated_evidence(evidence_of), low, high)
        return reference_at(point, self.settings.layer, "plane", source)

    def _plan(self, grids: list[MapGrid], tissue: TissueMask) -> _Plan:
        stage, shift, hidden_shift = self.cascade.top, self._shift, self._hidden_shift
        size = [
            max(cells - shift, math.ceil((finer - hidden_shift) / stage.taken))
            for cells, finer in zip(grids[0].shape[::-1], grids[1].shape[::-1], strict=True)
        ]
        probability, saliency = (grid.tissue(tissue) for grid in grids)
        squares = probability | block_any(saliency, stage.taken, grids[0].shape)
        cells = np.zeros((size[1], size[0]), bool)
        inner = squares[max(0, shift) :, max(0, shift) :]
        place = cells[max(0, -shift) :, max(0, -shift) :][: inner.shape[0], : inner.shape[1]]
        place[...] = inner[: place.shape[0], : place.shape[1]]
        if self.share:  # a map pixel lies between a cell and the one before
            cells[:-1] |= cells[1:]
            cells[:, :-1] |= cells[:, 1:]
        # A probability is the mean over the cells of the windows around it.
        wanted = grown(cells, self.window // 2)
        canvas = size[0], size[1]
        rects = self._rects(wanted, canvas)
        # Features alone: a map pixel at the tissue's border may begin in the cell before.
        needed = grown(wanted, stage.halo) if rects else grown(cells, 1)
        return _Plan(canvas, cells, rects, self.cascade.plan(needed, self.block_px))

    def _rects(self, wanted: Bools, canvas: tuple[int, int]) -> list[tuple[Rect, Rect]]:
        """Parts of a canvas (width, height) that hold the wanted cells, each with its crop."""
        stage, device = self.cascade.top, self.classifier.device
        if self.block_px is None and math.isinf(stage.cost(device)):
            around = stage.halo * self.cascade.features.stride
            raise NetworkError(
                f"layer '{self.settings.layer}': a dense map has no room for a single cell and what it looks at, "
                f"{around:,} px on each side; choose a later layer, way 'tiled', or block_px if there is more memory"
            )
        largest = stage.largest(self.block_px, self.cascade.features.stride, device)
        return [(rect, rect.grown(stage.halo, canvas)) for rect in partition(wanted, stage.halo, largest)]

    def _images(self, slide: Slide, crops: Iterator[Rect], grid: MapGrid, lost: list[np.ndarray]) -> Iterator[Tensor]:
        """The pixels of crops, read ahead, as (1, 3, H, W); places that could not be decoded are added to `lost`."""
        stride, ratio = self.cascade.features.stride, grid.ratio

        on_gpu = self.classifier.device.type == "cuda"

        def read(crop: Rect) -> tuple[Rect, Tensor, Bools | None]:
            x, y = ((cell * stride + self.origin_px) * ratio for cell in (crop.left, crop.top))
            pixels, seen = slide.read_seen(x, y, crop.width * stride, crop.height * stride, mpp=self.mpp)
            image = torch.from_numpy(pixels)
            return crop, image.pin_memory() if on_gpu else image, seen  # pinned: on its way while the GPU computes

        threads = reading_threads(self.settings.workers, on_gpu)
        for crop, image, seen in read_ahead(read, crops, threads=threads, ahead=max(threads, _READ_AHEAD)):
            if seen is not None:
                left, top = (cell * stride + self.origin_px for cell in (crop.left, crop.top))
                lost.append(grid.holding(~seen, left, top))
            yield image.permute(2, 0, 1)[None]

    def _maps(self, plan: _Plan, number: int, kept_features: FeatureStore) -> dict[str, np.ndarray]:
        """Logits of a rectangle's cells, and what each method says of their evidence over its crop."""
        (rect, crop), scale = plan.rects[number], self.cascade.top.taken
        place = crop.times(scale)
        hidden = torch.zeros((1, self.cascade.channels[-1], place.height, place.width), device=self.classifier.device)
        for at, node in enumerate(plan.nodes):
            if (common := node.rect.meets(crop)) is not None:
                common = common.times(scale)
                part = kept_features.read(at)[..., *common.within(node.rect.times(scale))]
                hidden[..., *common.within(place)] = part.to(hidden.device)
        seeds = torch.from_numpy(plan.tissue[rect.within(Rect(0, 0, *plan.size))]).to(hidden.device, non_blocking=True)
        kept = self.cascade.top.kept(rect, crop)
        self._windows.cells.part = Part((place.height, place.width), kept, seeds)
        arrays, methods = {}, self._by_parts
        for name in methods:
            logits, maps = self._explained(name, hidden)
            arrays[name] = maps[0]
        if not methods:
            with evaluating(self.classifier), torch.no_grad():
                logits = self._logits(self._windows.cells(hidden))
        return arrays | {"logits": as_array(logits[0])}

    def _explained(self, name: str, hidden: Tensor) -> tuple[Tensor, Floats]:
        """Logits (B, K, h, w) of cells and a method's maps; of "deeplift" the sums over channels, tempered."""
        method = self.method(name, self._windows, None, plane=True)
        with recorded(self._windows, "cells") as cells:
            maps = self.explain(method, hidden).maps
        if name == ADDITIVE:
            maps = maps * (hidden.shape[1] / self.temperature)
        return self._logits(cells[0]), as_array(maps)

    def _logits(self, cells: Tensor) -> Tensor:
        return cells.detach() + self.classifier.head.bias.detach()[:, None, None]

    def _label_free(self, plan: _Plan, store: FeatureStore) -> dict[str, Floats]:
        """Label-free maps on the canvas of hidden cells, of the cells with tissue."""
        size, scale = Rect(0, 0, *plan.size), self.cascade.top.taken
        canvas = size.times(scale)
        tissue = torch.from_numpy(plan.tissue.repeat(scale, 0).repeat(scale, 1))
        names = [name for name in self.settings.methods if name in LABEL_FREE]
        maps = {name: np.full((canvas.height, canvas.width), np.nan, np.float32) for name in names}
        places = [node.rect.times(scale).within(canvas) for node in plan.nodes]
        if names:
            for name, drawn in slide_maps(names, TissueFeatures(store, places, tissue)).items():
                for place, part in zip(places, drawn, strict=True):
                    maps[name][place] = part
        return maps

    def _assembled(self, plan: _Plan, grids: list[MapGrid], store: BlockStore, features: FeatureStore) -> Assembled:
        """The maps of all blocks, each method's parts added up, on the slide's grids."""
        (width, height), scale = plan.size, self.cascade.top.taken
        canvas, fine = Rect(0, 0, width, height), Rect(0, 0, width, height).times(scale)
        logits = np.full((len(self.classifier.classes), height, width), np.nan, np.float32)
        owner = np.full((height, width), -1, np.float32)
        maps = {name: np.zeros((height * scale, width * scale), np.float32) for name in self._by_parts}
        for number, (rect, crop) in enumerate(plan.rects):
            arrays = store.read(f"maps-{number}")
            logits[:, *rect.within(canvas)] = arrays["logits"]
            owner[rect.within(canvas)] = number
            for name, values in maps.items():
                values[crop.times(scale).within(fine)] += arrays[name]
        cells = torch.from_numpy(logits)[None]
        probability = as_array(self.probability(between(window_mean(cells, self.window), self.share)))[0]
        maps |= self._label_free(plan, features)
        names = [name for name in self.settings.methods if name in maps]
        explanations = {name: grids[1].placed(maps[name], self._hidden_shift) for name in names}
        moved = None
        if ADDITIVE in explanations:
            detail = explanations[ADDITIVE]
            # Which cells are known beside the tissue depends on the blocks.
            known = torch.where(torch.from_numpy(plan.tissue), cells, torch.nan)
            sums = as_array(self.evidence(between(known, self.share)) / self.window**2)[0]
            explanations[ADDITIVE] = conserve(detail, grids[0].placed(sums, self._shift), scale)
            tissue = plan.tissue.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
            tissue = grids[1].placed(tissue, self._hidden_shift)
            change, size = (
                np.nansum(np.abs(part) * tissue) for part in (explanations[ADDITIVE] - detail, explanations[ADDITIVE])
            )
            moved = float(change / size) if size else None
        lost = [store.read(f"lost-{at}")["lost"] for at, _ in enumerate(plan.nodes) if store.has(f"lost-{at}")]
        owners = grids[0].placed(owner, self._shift)
        return Assembled(
            grids[0].placed(probability, self._shift),
            explanations,
            _together(lost),
            len(plan.rects),
            sum(leaf.crop.area for node in plan.nodes for leaf in node.leaves()) * self.strides[0] ** 2,
            np.nan_to_num(owners, nan=-1).astype(np.int32),
            moved,
        )


def _mean(batches: Iterable[Tensor]) -> Tensor:
    """Mean (C,) over images and places of (B, C, h, w), float64."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        total = total + batch.double().sum(dim=(0, 2, 3)).cpu()
        count += len(batch) * batch.shape[2:].numel()
    if not count:
        raise NetworkError("neutral reference: no tiles of one class; give some of either")
    return total / count


def _together(parts: list[np.ndarray]) -> np.ndarray:
    """Rows and columns (n, 2) of all parts, each once."""
    return np.unique(np.concatenate([np.zeros((0, 2), np.int32), *parts]), axis=0)


class ProbabilityEngine(DenseEngine):
    """The probability alone, for networks whose maps are all made tile by tile; its settings' methods are not used."""

    @property
    def _by_parts(self) -> list[str]:
        return []


class FeatureEngine(DenseEngine):
    """Label-free maps alone, from features up to the layer, for networks whose other maps are made tile by tile.

    Nothing above the layer is computed, so the probability is NaN.
    """

    def _rects(self, wanted: Bools, canvas: tuple[int, int]) -> list[tuple[Rect, Rect]]:
        return []
