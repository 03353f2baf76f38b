"""Tiles of slides for torch: spawn-safe reading, sampling by slide and class."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.utils.data import Dataset, Sampler

from medsd.checks import check_number
from medsd.cohort.index import TileIndex
from medsd.errors import DatasetError
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


def as_sample(pixels: npt.NDArray[np.uint8], label: np.integer) -> Sample:
    """The sample of RGB pixels (height, width, 3), which it does not share memory with."""
    return {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "label": torch.tensor(int(label))}


def evenly(count: int, most: int) -> npt.NDArray[np.intp]:
    """Up to `most` of the numbers below `count`, evenly spread, from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.intp)


def tiles_of_each_class(dataset: Dataset[Sample], labels: npt.NDArray[np.integer[Any]], most: int) -> torch.Tensor:
    """Up to `most` tiles of each of the labels (n,) of a dataset, evenly, class by class: (B, 3, H, W) uint8."""
    of_class = (np.flatnonzero(labels == label) for label in np.unique(labels))
    rows = np.concatenate([own[evenly(len(own), most)] for own in of_class])
    return torch.stack([dataset[row]["image"] for row in rows.tolist()])


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
        self._cache: dict[int, npt.NDArray[np.uint8]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Sample:
        pixels = None if self._cache is None else self._cache.get(item)
        if pixels is None:
            pixels = self._read(item)
        if self._cache is not None:
            self._cache[item] = pixels
        return as_sample(pixels, self.labels[item])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slides": OrderedDict(), "_cache": None if self._cache is None else {}}

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        index = self.index
        return f"{index.paths[index.slide[item]]}: tile at ({index.x[item]}, {index.y[item]})"

    def fingerprint(self) -> str:
        """A SHA-256 of which tiles these are, whatever their labels."""
        index, target = self.index, self._normaliser and self._normaliser.target
        digest = hashlib.sha256(f"{index.tile_px} {index.mpp} {index.names} {target}".encode())
        for column in (index.slide, index.x, index.y):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def _read(self, item: int) -> npt.NDArray[np.uint8]:
        index = self.index
        slide = self._slide(int(index.slide[item]))
        return slide.read(int(index.x[item]), int(index.y[item]), index.tile_px, index.tile_px, mpp=index.mpp)

    def _slide(self, number: int) -> Slide:
        slide = self._slides.pop(number, None)
        if slide is None:
            opened = open_slide(self.index.paths[number], self.index.slide_mpp[number], cache=self._tiles)
            slide = opened if self._normaliser is None else self._normaliser.slide(opened)
        self._slides[number] = slide
        while len(self._slides) > _OPEN_SLIDES:
            self._slides.popitem(last=False)  # not closed: another thread may be reading it
        return slide


class GroupedSampler(Sampler[int]):
    """Draws the same number of items (to one) from every group, such as a slide, in runs by group.

    A run of tiles of one slide reads through one open handle, which pays on slides too many to keep open. Items are
    drawn without replacement until a group is used up, then anew. The draw depends on the seed and the epoch alone, so
    that a resumed training sees what the whole one would have.

    Args:
        groups: (n,) group of each item.
        samples: items drawn an epoch.
        run: items of one group in a row.
        seed: start of the random draw.
    """

    def __init__(self, groups: npt.NDArray[np.str_], samples: int, run: int = 1, seed: int = 0) -> None:
        self.samples, self.run, self.seed = samples, run, seed
        self.epoch, self._done = 0, 0
        self._group = np.unique(groups, return_inverse=True)[1]

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the draw of epoch `epoch` (counted from 0), without the first `done` items that it would give."""
        self.epoch, self._done = epoch, done

    def __iter__(self) -> Iterator[int]:
        yield from self.draw()[self._done :]

    def draw(self) -> list[int]:
        """All items of the epoch, in their order."""
        generator = np.random.default_rng((self.seed, self.epoch))
        pools = self._by_group(np.arange(len(self._group)))
        return self._shuffled(self._evenly(pools, self.samples, generator), generator)

    def _evenly(
        self, pools: list[npt.NDArray[np.intp]], count: int, generator: np.random.Generator
    ) -> list[npt.NDArray[np.intp]]:
        """`count` items of the pools, as many of each, in runs."""
        runs: list[npt.NDArray[np.intp]] = []
        share, left_over = divmod(count, len(pools))
        for rank, number in enumerate(generator.permutation(len(pools))):
            runs += self._runs(_draw(pools[number], share + (rank < left_over), generator))
        return runs

    def _shuffled(self, runs: list[npt.NDArray[np.intp]], generator: np.random.Generator) -> list[int]:
        return [item for number in generator.permutation(len(runs)) for item in runs[number].tolist()]

    def _by_group(self, items: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
        """The items of each group that has some, in the order of the groups' names and then as given."""
        group = self._group[items]
        order = np.argsort(group, kind="stable")
        return np.split(items[order], np.flatnonzero(np.diff(group[order])) + 1)

    def _runs(self, drawn: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
        return [drawn[start : start + self.run] for start in range(0, len(drawn), self.run)]


class SlideGroupedSampler(GroupedSampler):
    """Draws as many items of every class, the same number (to one) from every slide of a class, in runs by slide.

    A run is of one class, and BatchNorm sees the batch: in a batch of two runs it takes the class away. A batch should
    hold eight runs or more. The draw depends on the hard items, too.

    Args:
        labels: (n,) class of each item, 0 normal.
        groups: (n,) slide of each item.
        samples, run, seed: as in `GroupedSampler`; a run is of one slide and class.

    Raises:
        DatasetError: a class has no item.
    """

    def __init__(
        self, labels: npt.NDArray[np.int8], groups: npt.NDArray[np.str_], samples: int, run: int = 1, seed: int = 0
    ) -> None:
        super().__init__(groups, samples, run, seed)
        self._labels = labels
        self._pools: list[list[npt.NDArray[np.intp]]] = []
        for label in range(max(2, int(labels.max(initial=0)) + 1)):
            items = np.flatnonzero(labels == label)
            if not len(items):
                raise DatasetError(
                    f"no tiles to train on of class {label} of 'classes', from 0; training needs every class"
                )
            self._pools.append(self._by_group(items))
        self._hard: npt.NDArray[np.intp] = np.zeros(0, np.intp)
        self._hard_share = 0.0

    @property
    def class_shares(self) -> tuple[float, ...]:
        """Each class's share of the draws, hard items included."""
        return (1 / len(self._pools),) * len(self._pools)

    def set_hard(self, items: npt.ArrayLike, share: float) -> None:
        """From now on, take `share` of the normal draws of an epoch from `items`, evenly over them.

        The rest is drawn evenly over the slides, as before. With no items every draw is as before.

        Args:
            items: normal items, in any order, such as those of `medsd.training.hard_negatives`.
            share: 0 to 1.

        Raises:
            DatasetError: an item is not there, or not normal.
            ConfigError: `share` is out of its range.
        """
        check_number("hard_negative_share", share, "[0, 1]")
        hard = np.unique(np.asarray(items, np.intp))
        inside = hard[(hard >= 0) & (hard < len(self._labels))]
        if len(inside) < len(hard) or (self._labels[hard] != 0).any():
            raise DatasetError("hard negatives: some items are not normal tiles of this data set; find them again")
        self._hard, self._hard_share = hard, share

    def draw(self) -> list[int]:
        """All items of the epoch, in their order."""
        generator = np.random.default_rng((self.seed, self.epoch))
        others = [self.samples // len(self._pools)] * (len(self._pools) - 1)
        normal = self.samples - sum(others)
        hard = round(self._hard_share * normal) if len(self._hard) else 0
        runs: list[npt.NDArray[np.intp]] = []
        for pools, of_class in zip(self._pools, (normal - hard, *others), strict=True):
            runs += self._evenly(pools, of_class, generator)
        for drawn in self._by_group(_draw(self._hard, hard, generator)) if hard else ():
            runs += self._runs(drawn)
        return self._shuffled(runs, generator)


def _draw(pool: npt.NDArray[np.intp], count: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    rounds = [generator.permutation(pool) for _ in range(-(-count // len(pool)))]
    return np.concatenate([pool[:0], *rounds])[:count]


def even_draw(labels: npt.NDArray[np.integer], items: int, seed: int) -> list[int]:
    """Numbers of up to `items` items, as many of each class as there are, rising.

    Args:
        labels: (n,) of all.
        items: the most that are drawn.
        seed: draws them.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    # The place of an item within its class: the first ones of every class are dealt before any second.
    turn = pd.Series(order).groupby(labels[order]).cumcount()
    dealt = order[np.argsort(turn, kind="stable")]
    return sorted(dealt[:items].tolist())
