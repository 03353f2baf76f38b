"""Tile grids against counting, and tile tables on disk."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, box

from medsd.annotations import Annotations
from medsd.cohort.index import MIXED, NORMAL, TileGrid, TileIndex, join, no_tiles, tile_labels, tiles_of_slide
from medsd.errors import ConfigError, DatasetError
from medsd.slides.tissue import TissueMask

HEAD = ("names", "paths", "slide_mpp", "tile_px", "mpp")


class Blank:
    """A slide of a size and scale, without pixels."""

    path, mpp_source, mpp_doubt, reader = Path("blank.tif"), "test", "", "test"

    def __init__(self, width: int, height: int, mpp: float = 1.0) -> None:
        self.dimensions, self.mpp = (width, height), mpp

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> Any:
        raise AssertionError("the index needs no pixels")

    def read_seen(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> Any:
        raise AssertionError("the index needs no pixels")

    def close(self) -> None:
        pass


def all_tissue(width: int, height: int) -> TissueMask:
    return TissueMask(np.ones((height, width), bool), 1.0)


def index_of(names: tuple[str, ...], rows: list[tuple[int, int, int, int]], tile_px: int = 8) -> TileIndex:
    """An index of rows (slide, x, y, label)."""
    table = np.array(rows).reshape(-1, 4)
    return TileIndex(
        names,
        tuple(f"{name}.tif" for name in names),
        tuple(0.25 * (number + 1) for number in range(len(names))),
        table[:, 0].astype(np.int32),
        table[:, 1].astype(np.int32),
        table[:, 2].astype(np.int32),
        table[:, 3].astype(np.int8),
        np.linspace(0.5, 1, len(table), dtype=np.float32),
        tile_px,
        0.5,
    )


def same(one: TileIndex, other: TileIndex) -> bool:
    heads = all(getattr(one, name) == getattr(other, name) for name in HEAD)
    columns = ("slide", "x", "y", "label", "tissue")
    pairs = [(getattr(one, name), getattr(other, name)) for name in columns]
    return heads and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    tile=st.integers(1, 64),
    stride=st.integers(5, 64),
    scale=st.floats(0.3, 4),
)
def test_tiles_lie_on_the_grid_and_inside_the_slide(
    size: tuple[int, int], tile: int, stride: int, scale: float
) -> None:
    slide = Blank(*size, mpp=0.5)
    tiles = tiles_of_slide(slide, "a", TileGrid(tile, stride, 0.5 * scale), all_tissue(*size))
    side, step = tile * scale, stride * scale
    expected = []
    row = 0
    while row * step + side <= size[1] + 1e-6:
        column = 0
        while column * step + side <= size[0] + 1e-6:
            expected.append((column * step, row * step))
            column += 1
        row += 1
    assert len(tiles) == len(expected)
    for x, y, (wanted_x, wanted_y) in zip(tiles.x, tiles.y, expected, strict=True):
        assert abs(x - wanted_x) < 1 and abs(y - wanted_y) < 1
        assert 0 <= x <= size[0] - side + 1e-5 and 0 <= y <= size[1] - side + 1e-5


def test_whole_factors_give_exact_places_in_row_major_order() -> None:
    tiles = tiles_of_slide(Blank(64, 33, 0.25), "a", TileGrid(8, 8, 0.5), all_tissue(64, 33))
    assert tiles.x.tolist() == [0, 16, 32, 48] * 2 and tiles.y.tolist() == [0] * 4 + [16] * 4
    assert (tiles.x.dtype, tiles.label.dtype, tiles.tissue.dtype) == (np.int32, np.int8, np.float32)
    assert (tiles.names, tiles.paths, tiles.slide_mpp) == (("a",), ("blank.tif",), (0.25,))
    assert (tiles.label == NORMAL).all()


def test_tiles_need_their_share_of_tissue() -> None:
    mask = np.zeros((32, 32), bool)
    mask[:, :12] = True  # the tile at x=8 holds half
    for least, columns in ((0.5, {0, 8}), (0.51, {0}), (0.0, {0, 8, 16, 24})):
        tiles = tiles_of_slide(Blank(32, 32), "a", TileGrid(8, 8, 1.0, min_tissue=least), TissueMask(mask, 1.0))
        assert set(tiles.x.tolist()) == columns
    shares = dict(zip(tiles.x.tolist(), tiles.tissue.tolist(), strict=True))
    assert shares == {0: 1.0, 8: 0.5, 16: 0.0, 24: 0.0}


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), st.sampled_from([0.0, 0.4, 0.5, 1.0])), max_size=30),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_a_tile_is_of_the_one_class_that_covers_it(shares: list[tuple[float, float]], least: float) -> None:
    table = np.array(shares, np.float64).reshape(-1, 2)
    found = tile_labels({1: table[:, 0], 3: table[:, 1]}, len(table), least)
    for label, (one, three) in zip(found.tolist(), shares, strict=True):
        covering = [number for number, share in ((1, one), (3, three)) if share >= least]
        assert label == (covering[0] if len(covering) == 1 else NORMAL if one == three == 0 else MIXED)


@pytest.mark.parametrize(("outlined_from", "at_eight"), [(0.5, 1), (0.51, MIXED), (1.0, MIXED), (0.01, 1)])
def test_labels_by_the_share_inside_the_annotation(outlined_from: float, at_eight: int) -> None:
    drawn = Annotations(MultiPolygon([box(0, 0, 12, 32)]), 0, MultiPolygon())
    grid = TileGrid(8, 8, 1.0, outlined_from=outlined_from)
    tiles = tiles_of_slide(Blank(32, 32), "a", grid, all_tissue(32, 32), {1: drawn})
    labels = {x: set(tiles.label[tiles.x == x].tolist()) for x in (0, 8, 16, 24)}
    assert labels == {0: {1}, 8: {at_eight}, 16: {NORMAL}, 24: {NORMAL}}


def test_a_step_that_makes_far_too_many_tiles_is_told() -> None:
    with pytest.raises(DatasetError, match=r"8993 x 4993 tiles, above 20,000,000 in all; raise stride_px \(1\)"):
        tiles_of_slide(Blank(9000, 5000), "big", TileGrid(8, 1, 1.0), all_tissue(9, 5))


def test_a_slide_smaller_than_a_tile_has_none() -> None:
    assert len(tiles_of_slide(Blank(7, 100), "a", TileGrid(8, 8, 1.0), all_tissue(7, 100))) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tile_px", 0),
        ("stride_px", 0),
        ("stride_px", -3),
        ("mpp", 0.0),
        ("mpp", float("nan")),
        ("mpp", float("inf")),
        ("min_tissue", 1.1),
        ("min_tissue", -0.1),
        ("outlined_from", 0.0),  # every tile of an annotated slide would be tumour
        ("outlined_from", 1.5),
    ],
)
def test_grids_that_mean_nothing(name: str, value: float) -> None:
    values: dict[str, Any] = {"tile_px": 8, "stride_px": 8, "mpp": 1.0, name: value}
    with pytest.raises(ConfigError, match=rf"{name}=.*must be"):
        TileGrid(**values)


INDEX = index_of(("a", "b", "c"), [(0, 0, 0, 0), (0, 8, 0, 1), (2, 16, 24, -1), (2, 8, 8, 1)])


@pytest.mark.parametrize("index", [INDEX, index_of(("ä 1", "b"), []), INDEX.rows(INDEX.label == 5)])
def test_what_is_saved_is_loaded(tmp_path: Path, index: TileIndex) -> None:
    index.save(tmp_path / "deep" / "tiles.npz")
    assert same(TileIndex.load(tmp_path / "deep" / "tiles.npz"), index)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tiles.npz"]
    with np.load(tmp_path / "deep" / "tiles.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_a_missing_index_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"tiles\.npz: no tile index; run the stage 'prepare' \(or medsd tiles\) first"
    ):
        TileIndex.load(tmp_path / "tiles.npz")


def without_scales(path: Path) -> None:
    """An index as it was before it kept the slides' scales."""
    head = {"names": ["a"], "paths": ["a.tif"], "tile_px": 8, "mpp": 0.5}
    columns = {name: getattr(index_of(("a",), [(0, 0, 0, 0)]), name) for name in ("slide", "x", "y", "label", "tissue")}
    np.savez_compressed(path, head=np.array(json.dumps(head)), **columns)


def test_an_index_of_an_earlier_version_asks_to_be_made_again(tmp_path: Path) -> None:
    without_scales(tmp_path / "tiles.npz")
    with pytest.raises(DatasetError, match=r"tiles\.npz: not a tile index .*run the stage 'prepare'"):
        TileIndex.load(tmp_path / "tiles.npz")


def test_a_slide_that_never_opened_has_no_scale_and_no_tiles(tmp_path: Path) -> None:
    lost = no_tiles("a", "a.tif", None, TileGrid(8, 8, 0.5))
    joined = join([lost, index_of(("b",), [(0, 1, 2, 0)])])
    joined.save(tmp_path / "tiles.npz")
    assert TileIndex.load(tmp_path / "tiles.npz").slide_mpp == joined.slide_mpp == (None, 0.25)
    for scales in ((0.25, None), (0.25, -1.0), (0.25,)):
        replace(joined, slide_mpp=scales).save(tmp_path / "tiles.npz")
        with pytest.raises(DatasetError, match="not a tile index"):
            TileIndex.load(tmp_path / "tiles.npz")


def test_every_truncation_is_the_error(tmp_path: Path) -> None:
    path = tmp_path / "tiles.npz"
    INDEX.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"tiles\.npz: not a tile index"):
            TileIndex.load(path)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_are_the_error_or_the_same_tiles(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "tiles.npz"
    INDEX.save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(whole)
        for spot in generator.integers(0, len(data), 3):
            data[spot] = int(generator.integers(0, 256))
        path.write_bytes(data)
        try:
            assert same(TileIndex.load(path), INDEX)
        except DatasetError as error:
            assert "tiles.npz" in str(error) and "\n" not in str(error)


def test_other_numpy_files_and_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiles.npz"
    contents: list[Any] = [lambda f: np.save(f, np.ones(3)), lambda f: np.savez(f, x=np.ones(3)), lambda f: f.touch()]
    contents += [
        lambda f: f.write_bytes(pickle.dumps({"a": 1})),
        lambda f: np.savez(f, head=np.array("{}"), **{n: np.zeros(1) for n in ("slide", "x", "y", "label", "tissue")}),
        lambda f: np.savez(f, head=np.array(["a", None], object)),
    ]
    for make in contents:
        make(path)
        if not path.exists() or (tmp_path / "tiles.npz.npy").exists():
            (tmp_path / "tiles.npz.npy").replace(path)
        with pytest.raises(DatasetError, match="not a tile index"):
            TileIndex.load(path)


@pytest.mark.parametrize("change", [{"slide": np.array([0, 9], np.int32)}, {"x": np.zeros(3, np.int32)}, {"y": None}])
def test_tables_that_contradict_themselves_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    index = index_of(("a",), [(0, 0, 0, 0), (0, 8, 0, 1)])
    for name, value in change.items():
        object.__setattr__(index, name, index.y.astype(np.float64) if value is None else value)
    index.save(tmp_path / "tiles.npz")
    with pytest.raises(DatasetError, match="not a tile index"):
        TileIndex.load(tmp_path / "tiles.npz")


def test_joining_renumbers_the_slides() -> None:
    one = index_of(("a",), [(0, 1, 2, 0)])
    two = index_of(("b", "c"), [(1, 3, 4, 1), (0, 5, 6, -1)])
    none = index_of(("d",), [])
    joined = join([one, none, two])
    assert joined.names == ("a", "d", "b", "c") and joined.paths == ("a.tif", "d.tif", "b.tif", "c.tif")
    found = [(joined.names[s], int(x), int(y)) for s, x, y in zip(joined.slide, joined.x, joined.y, strict=True)]
    assert found == [("a", 1, 2), ("c", 3, 4), ("b", 5, 6)]
    assert joined.slide.dtype == np.int32 and joined.slide_mpp == (0.25, 0.25, 0.25, 0.5)
    assert same(join([one]), one)


def test_what_cannot_be_joined() -> None:
    with pytest.raises(DatasetError, match="two slides are named 'a'"):
        join([INDEX, index_of(("a",), [])])
    with pytest.raises(DatasetError, match="different tile sizes"):
        join([INDEX, index_of(("z",), [], tile_px=16)])
    with pytest.raises(DatasetError):
        join([])


def test_tiles_of_named_slides_leave_mixed_ones_out() -> None:
    chosen = INDEX.of_slides(["c", "b"])
    assert chosen.names == INDEX.names
    assert (chosen.slide.tolist(), chosen.x.tolist(), chosen.label.tolist()) == ([2], [8], [1])
    assert len(INDEX.of_slides([])) == 0
    assert INDEX.of_slides(["a"]).label.tolist() == [0, 1]
