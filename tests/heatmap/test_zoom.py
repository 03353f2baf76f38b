from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import medsd.heatmap.zoom as zoom
from medsd.heatmap.findings import mapped_slide
from medsd.heatmap.model import MapRequest, load_map_model
from medsd.heatmap.overlay import MappedSlide
from medsd.heatmap.zoom import TILE_PX, cut_tiles, read_tile, zoom_steps
from medsd.slides.slide import Slide, open_slide, thumbnail
from medsd.slides.tissue import find_tissue


@pytest.fixture(scope="module")
def slide(fiducial_slide: Path) -> Slide:
    with open_slide(fiducial_slide) as opened:
        yield opened


@pytest.fixture(scope="module")
def mapped(slide: Slide, green_weights: Path) -> MappedSlide:
    model = load_map_model(green_weights, MapRequest(), "cpu")
    picture, level0_px = thumbnail(slide, 200)
    return mapped_slide(slide.path.stem, slide, model.engine.map(slide, find_tissue(slide)), model, picture, level0_px)


@pytest.mark.parametrize(("size", "steps"), [((256, 10), [1]), ((257, 10), [1, 2]), ((2048, 3000), [1, 2, 4, 8, 16])])
def test_levels_are_halved_until_there_is_one_tile(size: tuple[int, int], steps: list[int]) -> None:
    assert zoom_steps(size) == steps


def test_a_tile_holds_the_pixels_of_its_square(slide: Slide) -> None:
    np.testing.assert_array_equal(read_tile(slide, 1, 2, 3), slide.read(512, 768, 256, 256, slide.mpp))
    coarse = read_tile(slide, 4, 0, 1)
    np.testing.assert_array_equal(coarse, slide.read(0, 1024, 256, 256, 4 * slide.mpp))


def test_the_last_tiles_end_with_the_slide(tmp_path: Path) -> None:
    Image.new("RGB", (602, 301), (10, 200, 30)).save(tmp_path / "odd.png")
    with open_slide(tmp_path / "odd.png", 0.5) as odd:
        assert read_tile(odd, 1, 2, 1).shape == (45, 90, 3)
        assert read_tile(odd, 4, 0, 0).shape == (76, 151, 3)
        assert (read_tile(odd, 4, 0, 0)[-2, -2] == (10, 200, 30)).all()


@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    level0_px=st.floats(1, 1500),
    steps=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_tile_that_a_seen_pixel_meets_is_cut(
    size: tuple[int, int], level0_px: float, steps: int, seed: int
) -> None:
    shape = [max(1, round(side / level0_px)) for side in reversed(size)]
    seen = np.random.default_rng(seed).random(shape) < 0.3
    side, wanted = TILE_PX * steps, set()
    for row, column in np.argwhere(seen):
        ends = [
            range(int(place * level0_px // side), min(-(-length // side), math.ceil((place + 1) * level0_px / side)))
            for place, length in zip((row, column), reversed(size), strict=True)
        ]
        wanted |= {(1, x, y) for y in ends[0] for x in ends[1]}
    assert set(zoom._tissue_places(size, [1, steps], 1, seen, level0_px)) == wanted


def test_with_room_for_all_the_tissue_is_there_as_scanned(slide: Slide, mapped: MappedSlide) -> None:
    tiles = cut_tiles(slide, mapped)
    seen = mapped.maps[0].value_map
    for row, column in np.argwhere(seen.seen):
        x, y = ((index + 0.5) * seen.level0_px for index in (column, row))
        assert (0, int(x // TILE_PX), int(y // TILE_PX)) in tiles.kept
    assert "the tissue at 0.5" in tiles.words and "medsd view" not in tiles.words
    shown = np.asarray(Image.open(io.BytesIO(tiles.kept[0, 3, 3]))).astype(int)
    assert np.abs(shown - read_tile(slide, 1, 3, 3)).mean() < 6


def test_a_small_budget_is_kept_and_goes_to_the_regions_first(
    slide: Slide, mapped: MappedSlide, fiducials: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 900_000
    monkeypatch.setattr(zoom, "_AROUND_PX", 200)
    tiles, every = cut_tiles(slide, mapped, budget), cut_tiles(slide, mapped).kept
    assert sum(map(len, tiles.kept.values())) <= budget
    assert mapped.findings is not None and len(mapped.findings.regions) == 3
    for x, y in fiducials:
        assert (0, x // TILE_PX, y // TILE_PX) in tiles.kept
    assert "the 3 largest regions for 100 µm around the most probable place at 0.5, as scanned" in tiles.words
    assert "the 3 largest regions as finely as 'Show' needs" in tiles.words and "medsd view" in tiles.words
    # Coarse levels are whole before finer ones are begun, and the words name the finest that is.
    levels = [{place for place in kept if place[0] == level} for kept in (tiles.kept, every) for level in range(4)]
    whole = [level for level in range(4) if levels[level] == levels[level + 4]]
    assert whole and whole == list(range(whole[0], 4)) and whole[0] > 0
    assert f"the tissue at {tiles.steps[whole[0]] * 0.5:g};" in tiles.words


def test_what_is_most_probable_is_cut_first(slide: Slide, mapped: MappedSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(zoom, "read_tile", lambda _, *place: asked.append(place) or np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(zoom, "_AROUND_PX", 2)
    assert mapped.findings is not None
    region = replace(mapped.findings.regions[0], peak=(300.0, 900.0))
    cut_tiles(slide, replace(mapped, findings=replace(mapped.findings, regions=[region])))
    assert asked[0] == (1, 1, 3)


def test_a_slide_without_classes_or_regions_has_tiles(slide: Slide, mapped: MappedSlide) -> None:
    assert mapped.findings is not None
    for other in (replace(mapped, findings=None), replace(mapped, findings=replace(mapped.findings, regions=[]))):
        assert len(cut_tiles(slide, other).kept) > 40
