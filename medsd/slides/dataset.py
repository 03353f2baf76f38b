"""Tiles of slides for torch: spawn-safe reading, sampling by slide and class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from medsd.errors import DatasetError
from medsd.slides.index import TileIndex
from medsd.slides.readers.cache import TileCache
from medsd.slides.slide import Slide, open_slide
from medsd.slides.stain.slide import StainNormaliser

_OPEN_SLIDES = 32
# Shared by the open slides: tiles are drawn at random, so the file's own are rarely wanted again.
_TILE_BYTES = 32 * 2**20


class Sample(TypedDict):
    """A tile or patch: image (3, height, width) uint8, label int64 scalar."""

    image: torch.Tensor
    label: torch.Tensor


class TileDataset(Dataset[Sample]):
    """The tiles of an index as {"image": (3, tile_px, tile_px) uint8, "label": int64}.

    Slides are opened when first read, in the process that reads, with the scale they were indexed with. The last 32
    used stay open; pickling drops them.
    With `cache` decoded tiles are kept in memory (3 * tile_px^2 bytes each), for small sets that are read many times.

    Args:
        index: the tiles.
        cache: keep decoded tiles.
        normaliser: gives slides the stain of its target; None reads them as they are.

    Raises (when an item is read):
        SlideError: the slide cannot be opened or decoded.
        NoTissueError: the normaliser finds too little stain.
    """

    def __init__(self, index: TileIndex, cache: bool = False, normaliser: StainNormaliser | None = None) -> None:
        self.index = index
        self.labels = index.label
        self.groups: npt.NDArray[np.str_] = np.array(index.names)[index.slide]
        self._normaliser = normaliser
        self._slides: OrderedDict[int, Slide] = OrderedDict()
        self._tiles = TileCache(_TILE_BYTES)
        self._cache: dict[int, torch.Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Sample:
        cached = None if self._cache is None else self._cache.get(item)
        image = self._read(item) if cached is None else cached
        if self._cache is not None:
            self._cache[item] = image
            image = image.clone()  # what is done to a sample in place must not reach the cache
        return {"image": image, "label": torch.tensor(int(self.labels[item]))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slides": OrderedDict(), "_cache": None if self._cache is None else {}}

    def _read(self, item: int) -> torch.Tensor:
        index = self.index
        slide = self._slide(int(index.slide[item]))
        x, y, side = int(index.x[item]), int(index.y[item]), index.tile_px
        return torch.from_numpy(slide.read(x, y, side, side, mpp=index.mpp)).permute(2, 0, 1).contiguous()

    def _slide(self, number: int) -> Slide:
        slide = self._slides.pop(number, None)
        if slide is None:
            opened = open_slide(self.index.paths[number], self.index.slide_mpp[number], cache=self._tiles)
            slide = opened if self._normaliser is None else self._normaliser.slide(opened)
        self._slides[number] = slide
        while len(self._slides) > _OPEN_SLIDES:
            self._slides.popitem(last=False)  # not closed: another thread may be reading it
        return slide


class SlideGroupedSampler(Sampler[int]):
    """Draws as many tumour as normal items, the same number (to one) from every slide of a class, in runs by slide.

    A run of tiles of one slide reads through one open handle, which pays on slides too many to keep open. A run is of
    one class, and BatchNorm sees the batch: in a batch of two runs it takes the class away. A batch should hold
    eight runs or more. Items are drawn without replacement until a slide is used up, then anew. The
    draw depends on the seed and the epoch alone, so that a resumed training sees what the whole one would have.

    Args:
        labels: (n,) class of each item, 0 or 1.
        groups: (n,) slide of each item.
        samples: items drawn an epoch.
        run: items of one slide and class in a row.
        seed: start of the random draw.

    Raises:
        DatasetError: a class has no item.
    """

    def __init__(
        self, labels: npt.NDArray[np.int8], groups: npt.NDArray[np.str_], samples: int, run: int = 1, seed: int = 0
    ) -> None:
        self.samples, self.run, self.seed = samples, run, seed
        self.epoch = 0
        self._pools: list[list[npt.NDArray[np.intp]]] = []
        for label, word in ((0, "normal"), (1, "tumour")):
            of_class = labels == label
            if not of_class.any():
                raise DatasetError(f"no {word} tiles to train on; training needs both classes")
            self._pools.append([np.flatnonzero(of_class & (groups == name)) for name in np.unique(groups[of_class])])

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of epoch `epoch` (counted from 0)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        runs: list[npt.NDArray[np.intp]] = []
        for pools, of_class in zip(self._pools, (self.samples - self.samples // 2, self.samples // 2), strict=True):
            share, left_over = divmod(of_class, len(pools))
            for rank, number in enumerate(generator.permutation(len(pools))):
                drawn = _draw(pools[number], share + (rank < left_over), generator)
                runs += [drawn[start : start + self.run] for start in range(0, len(drawn), self.run)]
        for number in generator.permutation(len(runs)):
            yield from runs[number].tolist()


def _draw(pool: npt.NDArray[np.intp], count: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    rounds = [generator.permutation(pool) for _ in range(-(-count // len(pool)))]
    return np.concatenate([pool[:0], *rounds])[:count]
