"""The tissue mask against drawn scenes and real tiles of every kind, and tile shares against counting pixels."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter

from medsd.phantom import PhantomSpec, draw_phantom
from medsd.slides.slide import open_slide
from medsd.slides.tissue import TissueMask, find_tissue, tissue_from_rgb

GLASS = (241, 240, 242)
EOSIN = (214, 150, 190)
NUCLEI = (120, 80, 150)


def rgb(path: Path) -> np.ndarray[Any, Any]:
    picture = Image.open(path).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def scene(*, size: int = 256, glass: tuple[int, int, int] = GLASS) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Glass with a disc of tissue of 100 px radius in the middle."""
    picture = Image.new("RGB", (size, size), glass)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((28, 28, 228, 228), fill=EOSIN)
    return picture, draw


def noisy(picture: Image.Image) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(0).normal(0, 2, (*picture.size[::-1], 3))
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


def disc(radius: float) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:256, :256] - 128
    return np.asarray(np.hypot(x, y) < radius)


# ---- real tiles; their scale is unknown, so the mpp is a guess from the level in the name (0: 0.5, 1: 2, 2: 8 um)


@pytest.mark.parametrize("mpp", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("name", ["almost-white-1", "no-tissue", "no-tissue-line", "no-tissue-green-pen"])
def test_glass_dust_line_and_pen_are_no_tissue(name: str, mpp: float, shared_data: Path) -> None:
    assert tissue_from_rgb(rgb(shared_data / "he_tiles" / f"{name}.png"), mpp).mean() < 0.01


@pytest.mark.parametrize(
    ("name", "mpp", "least", "most"),
    [
        ("high-nuclei-score-level2", 8.0, 0.12, 0.16),
        ("tissue-level2-1784-6289-5880-10386", 8.0, 0.68, 0.80),
        ("tissue-level2-4640-4649-8736-8746", 8.0, 0.70, 0.80),
        ("low-nuclei-score-level0", 0.5, 0.25, 1.0),  # fat: pale, a part of it is found
        ("tcga-green-pen", 2.0, 0.65, 0.80),
        ("medium-nuclei-score-green-pen-level1", 2.0, 0.25, 0.45),
    ],
)
def test_share_of_real_tiles(name: str, mpp: float, least: float, most: float, shared_data: Path) -> None:
    assert least < tissue_from_rgb(rgb(shared_data / "he_tiles" / f"{name}.png"), mpp).mean() < most


def test_green_pen_on_tissue_is_left_out_and_the_tissue_beside_it_stays(shared_data: Path) -> None:
    mask = tissue_from_rgb(rgb(shared_data / "he_tiles" / "tcga-green-pen.png"), 2.0)
    assert mask[:150, 370:430].mean() < 0.02
    assert mask[150:, 480:].mean() > 0.98
    assert mask[50:200, :220].mean() > 0.98


def test_pens_on_a_thumbnail(shared_data: Path) -> None:
    image = rgb(shared_data / "he_tiles" / "diagnostic-slide-thumb-rgb.png")
    mask = tissue_from_rgb(image, 40.0)
    assert 0.35 < mask.mean() < 0.5
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    assert mask[green > red + 15].mean() < 0.03
    assert mask[(red > 170) & (red - green > 110)].mean() < 0.06
    assert mask[(red < 70) & (green < 70) & (blue < 90)].mean() < 0.03
    assert mask[:20].mean() == mask[-10:].mean() == 0
    assert mask[412:430, 150:300].mean() > 0.95


def test_camelyon_patches_of_tumour_are_tissue(shared_data: Path) -> None:
    """96 px at 0.97 um: patches may hold much glass or fat, so a share of them is asked for, not each."""
    folder = shared_data / "pcam_patches"
    files = {file.stem: file for file in (folder / "images").rglob("*.*")}
    rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))[::4]
    shares: dict[str, list[float]] = {"0": [], "1": []}
    for row in rows:
        shares[row["label"]].append(tissue_from_rgb(rgb(files[row["id"]]), 0.97).mean())
    assert np.mean(np.array(shares["1"]) > 0.5) > 0.94
    assert np.mean(np.array(shares["1"]) > 0.99) > 0.85
    # Nearly white patches exist among the normal ones: colours near glass everywhere must give nothing.
    assert min(shares["0"]) == 0


def test_phantom_tumour_lies_in_tissue_and_corners_do_not() -> None:
    phantom = draw_phantom(PhantomSpec(seed=1, tumour=True, size_px=2048))
    mask = tissue_from_rgb(phantom.image, 0.5)
    assert mask[phantom.mask > 0].mean() > 0.99
    assert 0.3 < mask.mean() < 0.8
    assert not any(corner.any() for corner in (mask[:50, :50], mask[:50, -50:], mask[-50:, :50], mask[-50:, -50:]))


# ---- drawn scenes


def test_disc_of_tissue() -> None:
    mask = tissue_from_rgb(noisy(scene()[0]), 8.0)
    assert mask[disc(98)].all() and not mask[~disc(103)].any()


@pytest.mark.parametrize("mpp", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("colour", [EOSIN, NUCLEI, (190, 60, 110), (232, 212, 226)])
def test_tissue_from_edge_to_edge_stays_whole(colour: tuple[int, int, int], mpp: float) -> None:
    assert tissue_from_rgb(noisy(Image.new("RGB", (300, 200), colour)), mpp).all()


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (225, 222, 214), (205, 210, 205), (0, 0, 0), (40, 30, 38)])
def test_even_glass_and_black_are_no_tissue(colour: tuple[int, int, int]) -> None:
    assert not tissue_from_rgb(noisy(Image.new("RGB", (300, 200), colour)), 8.0).any()


def test_tinted_glass_is_told_from_tissue_by_its_two_modes() -> None:
    mask = tissue_from_rgb(noisy(scene(glass=(232, 226, 232))[0]), 8.0)
    assert mask[disc(98)].all() and not mask[~disc(103)].any()


@pytest.mark.parametrize(
    ("ink", "colour"),
    [("green", (30, 130, 100)), ("blue", (40, 60, 170)), ("red", (210, 30, 60)), ("black", (35, 30, 40))],
)
def test_pen_strokes_are_no_tissue(ink: str, colour: tuple[int, int, int]) -> None:
    picture, draw = scene()
    draw.line((0, 20, 255, 236), fill=colour, width=24)
    mask = tissue_from_rgb(noisy(picture), 8.0)
    stroke = (np.asarray(picture) == colour).all(axis=2)
    assert not mask[stroke].any(), ink
    # 40 um of rim go with the stroke; beyond it the tissue stays.
    near = maximum_filter(stroke, size=19)
    assert mask[disc(98) & ~near].all()
    assert not mask[~disc(103)].any()


def test_green_specks_too_small_for_a_stroke_are_no_tissue() -> None:
    picture, draw = scene()
    draw.rectangle((4, 4, 24, 24), fill=(60, 150, 120))  # 170 um wide
    mask = tissue_from_rgb(noisy(picture), 8.0)
    assert mask[disc(98)].all() and not mask[~disc(103)].any()


def test_dense_dark_tissue_is_no_ink() -> None:
    assert tissue_from_rgb(noisy(Image.new("RGB", (200, 200), (75, 45, 80))), 8.0).all()


def test_black_frame_and_coverslip_line_are_no_tissue() -> None:
    picture, draw = scene()
    draw.line((240, 0, 250, 255), fill=(70, 75, 72), width=2)
    draw.line((10, 0, 14, 255), fill=(150, 110, 140), width=1)
    draw.rectangle((0, 0, 255, 12), fill=(3, 0, 2))
    mask = tissue_from_rgb(noisy(picture), 8.0)
    assert mask[disc(98)].all() and not mask[~disc(103)].any()


def test_small_holes_are_filled_and_large_ones_and_bays_are_not() -> None:
    picture, draw = scene()
    draw.ellipse((80, 80, 96, 96), fill=GLASS)  # 0.013 mm2
    draw.ellipse((110, 110, 160, 160), fill=GLASS)  # 0.13 mm2
    mask = tissue_from_rgb(noisy(picture), 8.0)
    assert mask[88, 88] and not mask[135, 135]


def test_dust_is_no_tissue_and_a_small_piece_is() -> None:
    picture = Image.new("RGB", (256, 256), GLASS)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 20, 27, 27), fill=EOSIN)  # 60 um wide
    draw.ellipse((120, 120, 145, 145), fill=EOSIN)  # 200 um wide
    mask = tissue_from_rgb(noisy(picture), 8.0)
    assert mask[132, 132] and not mask[:60, :60].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (7, 3)])
def test_tiny_pictures(shape: tuple[int, int]) -> None:
    for mpp in (0.25, 8.0, 60.0):
        assert tissue_from_rgb(np.full((*shape, 3), EOSIN, np.uint8), mpp).shape == shape
        assert not tissue_from_rgb(np.full((*shape, 3), 240, np.uint8), mpp).any()


# ---- shares


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    side=st.integers(1, 40),
    corners=st.lists(st.tuples(st.integers(-50, 60), st.integers(-50, 60)), min_size=1, max_size=5),
)
def test_share_equals_counting_pixels(seed: int, side: int, corners: list[tuple[int, int]]) -> None:
    mask = np.random.default_rng(seed).random((7, 9)) < 0.5
    fine = np.pad(np.kron(mask, np.ones((5, 5))), 100)  # 5 level-0 pixels a mask pixel
    x, y = np.array(corners).T
    expected = [fine[b + 100 : b + 100 + side, a + 100 : a + 100 + side].mean() for a, b in corners]
    np.testing.assert_allclose(TissueMask(mask, 5.0).share(x, y, side), expected, atol=1e-6)


def test_share_with_fractions_by_hand() -> None:
    tissue = TissueMask(np.array([[True, False], [False, False]]), 10.0)
    assert tissue.share([2.5], [2.5], 5).tolist() == [1]
    assert tissue.share([7.5], [0], 5).tolist() == [0.5]
    assert tissue.share([7.5], [7.5], 5).tolist() == [0.25]
    assert tissue.share([-2.5], [0], 5).tolist() == [0.5]
    assert tissue.share([1000], [0], 5).tolist() == [0]
    assert tissue.share([], [], 5).shape == (0,)


def test_at_other_grids() -> None:
    mask = np.random.default_rng(3).random((12, 8)) < 0.4
    tissue = TissueMask(mask, 6.0)
    same = tissue.at(8, 12, 6.0)
    assert same.dtype == np.float32 and (same == mask).all()
    assert (tissue.at(16, 24, 3.0) == np.kron(mask, np.ones((2, 2)))).all()
    np.testing.assert_allclose(tissue.at(4, 6, 12.0), mask.reshape(6, 2, 4, 2).mean(axis=(1, 3)), atol=1e-6)
    wide = tissue.at(7, 9, 8.5)
    x, y = np.meshgrid(np.arange(7) * 8.5, np.arange(9) * 8.5)
    np.testing.assert_allclose(wide.ravel(), tissue.share(x.ravel(), y.ravel(), 8.5), atol=1e-6)
    assert wide[:, 6].max() == 0  # beyond the mask


# ---- slides


@dataclass
class ArraySlide:
    """A slide of one array; reads by picking pixels, white outside."""

    image: np.ndarray[Any, Any]
    mpp: float
    path: Path = Path("array")
    mpp_source: str = "test"
    reader: str = "array"
    reads: list[int] = field(default_factory=list)

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[0]

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> np.ndarray[Any, Any]:
        self.reads.append(width * height)
        step = (mpp or self.mpp) / self.mpp
        columns, rows = np.floor(x + np.arange(width) * step + 0.5), np.floor(y + np.arange(height) * step + 0.5)
        columns, rows = columns.astype(int), rows.astype(int)
        out = np.full((height, width, 3), 255, np.uint8)
        seen = np.ix_(rows < self.image.shape[0], columns < self.image.shape[1])
        out[seen] = self.image[np.ix_(rows[rows < self.image.shape[0]], columns[columns < self.image.shape[1]])]
        return out

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[np.ndarray[Any, Any], None]:
        return self.read(x, y, width, height, mpp), None

    def close(self) -> None: ...


def test_find_tissue_reads_in_blocks_without_seams() -> None:
    image = noisy(scene()[0]).repeat(4, axis=0).repeat(4, axis=1)  # 1024 px
    slide = ArraySlide(image, mpp=4.0)
    found = find_tissue(slide, mpp=8.0)
    assert found.mask.shape == (512, 512) and found.level0_px == 2.0
    assert len(slide.reads) == 4 and max(slide.reads) <= 256**2
    assert (found.mask == tissue_from_rgb(image[::2, ::2], 8.0)).all()
    # The disc has a radius of 400 level-0 px about (512, 512).
    assert found.share([362], [362], 300).tolist() == [1]
    assert found.share([0, 940], [0, 940], 60).tolist() == [0, 0]


def test_small_slides_are_read_finer() -> None:
    picture = noisy(scene()[0])
    found = find_tissue(ArraySlide(picture, mpp=0.5))  # 128 um wide: 16 px at 8 um
    assert found.mask.shape == (64, 64) and found.level0_px == 4.0
    found = find_tissue(ArraySlide(picture[:40, :50], mpp=0.5))
    assert found.mask.shape == (40, 50) and found.level0_px == 1.0


def test_mask_covers_slides_whose_size_is_no_multiple() -> None:
    found = find_tissue(ArraySlide(np.full((1001, 1999, 3), EOSIN, np.uint8), mpp=0.9))
    height, width = found.mask.shape
    assert height * found.level0_px >= 1001 > (height - 1) * found.level0_px
    assert width * found.level0_px >= 1999 > (width - 1) * found.level0_px


def test_empty_slide_gives_an_empty_mask() -> None:
    found = find_tissue(ArraySlide(np.full((900, 900, 3), 243, np.uint8), mpp=1.0))
    assert not found.mask.any() and found.share([0], [0], 500).tolist() == [0]


def test_real_slide(shared_data: Path) -> None:
    """CMU-1-Small-Region: a strip of skin down the middle, glass at both sides."""
    found = find_tissue(open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs"))
    assert found.mask.shape == (186, 139)
    assert 0.35 < found.mask.mean() < 0.45
    assert found.share([900, 1000, 600], [2400, 1100, 2600], 224).tolist() == [1, 1, 1]
    assert found.share([100, 1900, 50], [2000, 900, 1500], 224).tolist() == [0, 0, 0]
