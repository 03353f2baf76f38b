"""Tiles as samples, in this process and in workers, and the balanced draw by slide."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from medsd.cohort import dataset as dataset_module
from medsd.cohort.dataset import GroupedSampler, SlideGroupedSampler, TileDataset
from medsd.cohort.index import TileIndex
from medsd.errors import ConfigError, DatasetError, MissingMppError, SlideError
from medsd.slides.slide import open_slide


def index_of(
    paths: list[Path],
    rows: list[tuple[int, int, int, int]],
    tile_px: int = 32,
    mpp: float = 0.5,
    slide_mpp: float | None = 0.5,
) -> Any:
    table = np.array(rows)
    slide, x, y = (table[:, column].astype(np.int32) for column in range(3))
    label, tissue = table[:, 3].astype(np.int8), np.ones(len(table), np.float32)
    names = tuple(path.stem for path in paths)
    return TileIndex(names, tuple(map(str, paths)), (slide_mpp,) * len(paths), slide, x, y, label, tissue, tile_px, mpp)


@pytest.fixture
def index(coded_slides: dict[str, Any]) -> TileIndex:
    paths = [coded_slides["even-2x"].path, coded_slides["odd-2x"].path]
    places = itertools.product((0, 1), (0, 100, 333), (40, 200))
    return index_of(paths, [(s, x, y, (x + y) % 2) for s, x, y in places], mpp=0.8)


def test_a_sample_is_the_slides_pixels(index: TileIndex) -> None:
    data = TileDataset(index)
    assert len(data) == 12 and data.labels is index.label
    assert data.groups.tolist() == ["even-2x"] * 6 + ["odd-2x"] * 6
    for item in (0, 5, 7):
        sample = data[item]
        slide = open_slide(index.paths[index.slide[item]])
        pixels = slide.read(int(index.x[item]), int(index.y[item]), 32, 32, mpp=0.8)
        assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()
        assert np.array_equal(sample["image"].numpy(), pixels.transpose(2, 0, 1))
        assert sample["label"].dtype == torch.int64 and sample["label"].shape == ()
        assert int(sample["label"]) == index.label[item]


def test_cached_tiles_are_read_once_and_kept_unharmed(index: TileIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    data, plain = TileDataset(index, cache=True), TileDataset(index)
    reads = []
    inner = data._read
    monkeypatch.setattr(data, "_read", lambda item: (reads.append(item), inner(item))[1])
    for item in (3, 3, 4, 3):
        image = data[item]["image"]
        assert torch.equal(image, plain[item]["image"])
        image.zero_()
    assert reads == [3, 4]


@pytest.mark.parametrize("cache", [False, True])
def test_pickling_drops_handles_and_tiles(index: TileIndex, cache: bool) -> None:
    data = TileDataset(index, cache=cache)
    images = [data[item]["image"] for item in range(len(data))]
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 4000 and not copy._slides
    assert all(torch.equal(copy[item]["image"], image) for item, image in enumerate(images))


def test_few_slides_stay_open(index: TileIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "_OPEN_SLIDES", 1)
    opened = []
    monkeypatch.setattr(
        dataset_module, "open_slide", lambda *args, **kw: (opened.append(args[0]), open_slide(*args, **kw))[1]
    )
    data = TileDataset(index)
    for item in (0, 1, 6, 7, 0):
        data[item]
        assert len(data._slides) == 1
    assert [Path(path).stem for path in opened] == ["even-2x", "odd-2x", "even-2x"]


def test_spawned_workers_read_the_same(index: TileIndex) -> None:
    data = TileDataset(index)
    here = torch.stack([data[item]["image"] for item in range(len(data))])
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="spawn")
    batches = list(loader)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), here)
    assert torch.cat([batch["label"] for batch in batches]).tolist() == index.label.tolist()


def test_forked_workers_read_the_same(index: TileIndex) -> None:
    data = TileDataset(index)
    here = torch.stack([data[item]["image"] for item in range(len(data))])
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), here)


def test_slides_are_opened_with_the_scale_of_the_index(tmp_path: Path, coding: Any) -> None:
    path = tmp_path / "bare.tif"
    coding.write_levels(path, [coding.coded_pixels(128, 128)], 500.0, 2)  # no microscope has 500 um per pixel
    with pytest.raises(MissingMppError, match=r"bare\.tif"):
        TileDataset(index_of([path], [(0, 0, 0, 0)], slide_mpp=None))[0]
    index = index_of([path], [(0, 0, 0, 0)], slide_mpp=0.25)
    image = TileDataset(index)[0]["image"]
    expected = open_slide(path, mpp=0.25).read(0, 0, 32, 32, mpp=0.5)
    assert np.array_equal(image.numpy(), expected.transpose(2, 0, 1))
    path.unlink()
    with pytest.raises(SlideError, match="no such file"):
        TileDataset(index)[0]


def pool(sizes: dict[str, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and slides of a pool of (normal, tumour) tiles by slide."""
    rows = [(label, name) for name, counts in sizes.items() for label in (0, 1) for _ in range(counts[label])]
    return np.array([label for label, _ in rows], np.int8), np.array([name for _, name in rows])


UNEVEN = pool({"a": (1000, 0), "b": (3, 50), "c": (40, 0), "d": (0, 1), "e": (7, 7)})


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8),
    samples=st.integers(1, 200),
    run=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_every_draw_is_exact(sizes: list[tuple[int, int]], samples: int, run: int, seed: int) -> None:
    labels, groups = pool({f"s{i}": size for i, size in enumerate(sizes)})
    if len(set(labels.tolist())) < 2:
        with pytest.raises(DatasetError, match="tiles to train on"):
            SlideGroupedSampler(labels, groups, samples, run, seed)
        return
    sampler = SlideGroupedSampler(labels, groups, samples, run, seed)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == samples and all(type(item) is int for item in drawn)
    tumour = int((labels[drawn] == 1).sum())
    assert abs(2 * tumour - samples) <= 1
    for label in (0, 1):
        slides = np.unique(groups[labels == label])
        counts = Counter(groups[item] for item in drawn if labels[item] == label)
        by_slide = [counts[name] for name in slides]
        assert max(by_slide) - min(by_slide) <= 1
        for name in slides:  # nobody is drawn twice before all of the slide are drawn once
            times = Counter(item for item in drawn if labels[item] == label and groups[item] == name)
            members = np.flatnonzero((labels == label) & (groups == name))
            assert max(times.values(), default=0) - min(times.get(int(m), 0) for m in members) <= 1


def test_tiles_have_a_place_and_a_fingerprint_whatever_their_labels(index: TileIndex) -> None:
    tiles = TileDataset(index)
    assert tiles.place(4) == f"{index.paths[0]}: tile at ({index.x[4]}, {index.y[4]})"
    assert TileDataset(replace(index, label=1 - index.label)).fingerprint() == tiles.fingerprint()
    assert TileDataset(replace(index, x=index.x + 1)).fingerprint() != tiles.fingerprint()


def test_items_come_in_runs_of_one_slide_and_class() -> None:
    labels, groups = UNEVEN
    drawn = list(SlideGroupedSampler(labels, groups, samples=480, run=8))
    keys = [(int(labels[item]), str(groups[item])) for item in drawn]
    lengths = [len(list(run)) for _, run in itertools.groupby(keys)]
    assert sum(length >= 8 for length in lengths) >= 0.9 * len(lengths)
    # A batch of 32 still mixes slides and classes.
    assert np.mean([len(set(keys[start : start + 32])) for start in range(0, 480, 32)]) > 2


def test_the_draw_depends_on_seed_and_epoch_alone() -> None:
    def draw(seed: int, epoch: int, again: bool = False) -> list[int]:
        sampler = SlideGroupedSampler(*UNEVEN, samples=100, seed=seed)
        if again:
            list(sampler)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(1, 3) == draw(1, 3, again=True)
    assert len({tuple(draw(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    samples=st.integers(1, 100),
    run=st.integers(1, 9),
    epoch=st.integers(0, 9),
    done=st.integers(0, 100),
)
def test_draws_without_labels_are_even_over_the_groups(
    sizes: list[int], samples: int, run: int, epoch: int, done: int
) -> None:
    groups = np.array([f"s{number}" for number, size in enumerate(sizes) for _ in range(size)])
    sampler = GroupedSampler(groups, samples, run, seed=2)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    counts = Counter(groups[drawn].tolist())
    by_group = [counts[f"s{number}"] for number in range(len(sizes))]
    assert sum(by_group) == len(sampler) == samples and max(by_group) - min(by_group) <= 1
    for number, size in enumerate(sizes):  # nobody is drawn twice before all of the group are drawn once
        times = [drawn.count(int(item)) for item in np.flatnonzero(groups == f"s{number}")]
        assert len(times) == size and max(times) - min(times) <= 1
    sampler.set_epoch(epoch, done)
    assert list(sampler) == drawn[done:] and len(sampler) == samples
    sampler.set_epoch(epoch + 1)
    assert samples < 20 or max(sizes) < 5 or list(sampler) != drawn


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6),
    samples=st.integers(2, 200),
    run=st.integers(1, 9),
    share=st.floats(0, 1),
    pick=st.integers(1, 2**20 - 1),
)
def test_a_share_of_the_normal_draws_is_hard(
    sizes: list[tuple[int, int]], samples: int, run: int, share: float, pick: int
) -> None:
    labels, groups = pool({f"s{i}": size for i, size in enumerate(sizes)})
    normal = np.flatnonzero(labels == 0)
    hard = [int(item) for bit, item in enumerate(normal) if pick >> (bit % 20) & 1]
    before = SlideGroupedSampler(labels, groups, samples, run, seed=1)
    sampler = SlideGroupedSampler(labels, groups, samples, run, seed=1)
    sampler.set_hard(hard, share)
    drawn = list(sampler)
    wanted = samples - samples // 2
    assert len(drawn) == samples and int((labels[drawn] == 0).sum()) == wanted
    by_tumour_slide = Counter(groups[item] for item in drawn if labels[item] == 1)
    assert by_tumour_slide.total() == samples // 2
    assert max(by_tumour_slide[name] for name in groups) - min(by_tumour_slide[name] for name in groups) <= 1
    of_hard = round(share * wanted) if hard else 0
    if not of_hard:
        assert drawn == list(before)
        return
    counts = Counter(item for item in drawn if labels[item] == 0)
    least, most = of_hard // len(hard), -(-of_hard // len(hard))
    assert all(counts[item] >= least for item in hard)  # evenly over the items
    others = wanted - of_hard
    by_slide = Counter(groups[item] for item in counts.elements())
    expected = Counter(str(groups[item]) for item in hard)
    for name in np.unique(groups[normal]):  # and the rest evenly over the slides
        extra = others // len(np.unique(groups[normal]))
        assert expected[str(name)] * least + extra <= by_slide[name] <= expected[str(name)] * most + extra + 1


def test_hard_items_alone_are_drawn_evenly() -> None:
    sampler = SlideGroupedSampler(*UNEVEN, samples=400, run=4)
    normal = np.flatnonzero(UNEVEN[0] == 0)
    hard = normal[[1, 3, 1000, 1002]]
    sampler.set_hard(hard, 1.0)
    counts = Counter(item for item in sampler if UNEVEN[0][item] == 0)
    assert counts == dict.fromkeys(hard.tolist(), 50)
    keys = [(int(UNEVEN[0][item]), str(UNEVEN[1][item])) for item in sampler]
    lengths = [len(list(run)) for key, run in itertools.groupby(keys) if key[0] == 0]
    assert all(length % 4 == 0 for length in lengths)


def test_hard_draws_depend_on_seed_and_epoch_alone() -> None:
    def draw(seed: int, epoch: int, hard: list[int], earlier: int = 0) -> list[int]:
        sampler = SlideGroupedSampler(*UNEVEN, samples=100, seed=seed)
        for number in range(earlier):
            sampler.set_epoch(number)
            list(sampler)
        sampler.set_hard(hard, 0.5)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(1, 3, [0, 5, 9]) == draw(1, 3, [9, 0, 5, 5], earlier=2)
    assert len({tuple(draw(seed, epoch, [0, 5])) for seed in range(2) for epoch in range(3)}) == 6
    assert draw(1, 3, []) != draw(1, 3, [0, 5])
    sampler = SlideGroupedSampler(*UNEVEN, samples=100, seed=1)
    before = list(sampler)
    sampler.set_hard([0, 5], 0.5)
    assert list(sampler) != before
    sampler.set_hard([], 0.5)
    assert list(sampler) == before


@pytest.mark.parametrize("items", [[-1], [10**6], [0, 1003]])
def test_hard_items_must_be_normal_ones(items: list[int]) -> None:
    sampler = SlideGroupedSampler(*UNEVEN, samples=100)
    assert UNEVEN[0][1003] == 1
    with pytest.raises(DatasetError, match="some items are not normal tiles of this data set; find them again"):
        sampler.set_hard(items, 0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"hard_negative_share=.*: must be a number from 0 to 1"):
            sampler.set_hard([0], share)


def test_mixed_tiles_are_never_drawn_and_a_class_must_be_there() -> None:
    labels, groups = np.array([0, -1, 1, -1], np.int8), np.array(["a", "a", "b", "b"])
    assert set(SlideGroupedSampler(labels, groups, 20)) == {0, 2}
    for missing in (0, 1):
        kept = labels != missing
        with pytest.raises(DatasetError, match=f"no tiles to train on of class {missing}"):
            SlideGroupedSampler(labels[kept], groups[kept], 20)
