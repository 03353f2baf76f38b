"""Finding the tissue of a slide: methods, what was not seen, and what must not matter."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from medsd.errors import ConfigError, NotBrightFieldError
from medsd.slides import slide as slide_module
from medsd.slides.slide import open_slide
from medsd.slides.tissue import METHODS, TissueMask, find_tissue
from medsd.slides.tissue.saturation import _blur, tissue_from_rgb

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

GLASS = (241, 240, 242)
EOSIN = (214, 150, 190)


class Canvas:
    """A slide given at the scale of its mask; parts of it may be unseen."""

    path, mpp_source, reader = Path("canvas.svs"), "test", "canvas"

    def __init__(self, image: Bytes, seen: Bools | None = None, step: int = 32) -> None:
        self.image, self.seen, self.step = image, seen, step
        self.mpp = 8.0 / step
        self.dimensions = image.shape[1] * step, image.shape[0] * step

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> Bytes:
        return self.read_seen(x, y, width, height, mpp)[0]

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[Bytes, Bools | None]:
        assert mpp == 8.0
        left, top = round(x / self.step), round(y / self.step)
        place = np.s_[top : top + height, left : left + width]
        if self.seen is None or self.seen[place].all():
            return self.image[place], None
        return np.where(self.seen[place][..., None], self.image[place], np.uint8(255)), self.seen[place]

    def close(self) -> None: ...


def blobs(seed: int, height: int = 200, width: int = 180, share: float = 0.3) -> Bytes:
    """Pieces of tissue on glass with noise."""
    rng = np.random.default_rng(seed)
    shape = gaussian_filter(rng.normal(size=(height, width)), 9)
    stained = shape > np.quantile(shape, 1 - share)
    image = np.where(stained[..., None], EOSIN, GLASS) + rng.normal(0, 2, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


# ---- what must not matter


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), block=st.integers(7, 400))
def test_the_size_of_blocks_does_not_matter(seed: int, block: int) -> None:
    canvas = Canvas(blobs(seed))
    whole = find_tissue(canvas).mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_module, "_BLOCK_PX", block)
        assert (find_tissue(canvas).mask == whole).all()


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top=st.integers(4, 60),
    left=st.integers(4, 60),
    more=st.tuples(*[st.integers(4, 90)] * 2),
)
def test_glass_around_it_moves_the_mask_and_adds_nothing(seed: int, top: int, left: int, more: tuple[int, int]) -> None:
    """The tissue is a piece away from the edge: what is cut by the edge may be judged anew."""
    image = np.full((160, 150, 3), GLASS, np.uint8)
    image[12:-12, 12:-12] = blobs(seed, 136, 126)
    image[12:-12, 12:-12][[0, -1]], image[12:-12, 12:-12][:, [0, -1]] = GLASS, GLASS
    wide = np.full((image.shape[0] + top + more[0], image.shape[1] + left + more[1], 3), GLASS, np.uint8)
    place = np.s_[top : top + image.shape[0], left : left + image.shape[1]]
    wide[place] = image
    before, after = find_tissue(Canvas(image)).mask, find_tissue(Canvas(wide)).mask
    assert before.any()
    assert (after[place] == before).all()
    assert after.sum() == before.sum()


def test_turned_and_mirrored_slides_have_turned_and_mirrored_masks() -> None:
    image = blobs(5)
    mask = tissue_from_rgb(image, 8.0)
    assert 0.2 < mask.mean() < 0.4
    for turn in range(4):
        # The passes of the blur round along the rows first: a pixel on the threshold may fall on either side.
        assert (tissue_from_rgb(np.rot90(image, turn), 8.0) != np.rot90(mask, turn)).mean() < 1e-3
    assert (tissue_from_rgb(image[:, ::-1], 8.0) == mask[:, ::-1]).all()
    assert (tissue_from_rgb(image[::-1], 8.0) == mask[::-1]).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), side=st.integers(9, 60), level0_px=st.sampled_from([1.0, 3.7, 32.0]))
def test_shares_of_a_tiling_sum_to_the_area_of_the_mask(seed: int, side: int, level0_px: float) -> None:
    tissue = TissueMask(np.random.default_rng(seed).random((37, 53)) < 0.4, level0_px)
    x, y = np.meshgrid(np.arange(0, 53 * level0_px, side), np.arange(0, 37 * level0_px, side))
    area = tissue.share(x.ravel(), y.ravel(), side).sum() * side**2
    assert area == pytest.approx(tissue.mask.sum() * level0_px**2, abs=1e-6 * side**2 * x.size)
    columns, rows = x.shape[::-1]
    assert tissue.at(columns, rows, side).sum(dtype=float) * side**2 == pytest.approx(area, rel=1e-4, abs=1e-3)


def test_blur_is_pillows() -> None:
    for shape in [(1, 1), (1, 9), (9, 1), (2, 2), (40, 30)]:
        image = np.random.default_rng(2).integers(1, 256, (*shape, 3), np.uint8)
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.75)))
        assert (_blur(image).reshape(image.shape) == expected).all()


# ---- what was not seen


def test_what_was_not_seen_is_no_tissue_and_its_share_is_known() -> None:
    image = blobs(3, 400, 300)
    seen = np.ones((400, 300), np.bool_)
    seen[100:260, 40:200] = False
    whole, found = find_tissue(Canvas(image)), find_tissue(Canvas(image, seen))
    assert whole.unseen == 0
    assert found.unseen == pytest.approx(160 * 160 / 120_000)
    assert not found.mask[~seen].any()
    # Away from the hole's edge the mask is what it is without a hole.
    far = np.asarray(~np.pad(~seen, 12)[tuple(np.s_[12:-12, 12:-12])])
    far[85:275, 25:215] = False
    assert (found.mask[far] != whole.mask[far]).mean() < 0.002


def test_a_small_unseen_spot_in_tissue_is_not_filled() -> None:
    image = np.full((200, 200, 3), EOSIN, np.uint8)
    seen = np.ones((200, 200), np.bool_)
    seen[90:100, 90:100] = False
    found = find_tissue(Canvas(image, seen))
    assert not found.mask[~seen].any()
    assert found.mask[:80].all()
    assert found.mask[105:].all()


def test_unseen_white_has_no_part_in_the_threshold() -> None:
    """Tinted glass without tissue: white beside it would make the glass the coloured one of two modes."""
    image = np.full((300, 200, 3), (240, 225, 236), np.uint8)
    seen = np.zeros((300, 200), np.bool_)
    seen[100:200] = True
    assert not find_tissue(Canvas(image, seen)).mask.any()
    white = np.where(seen[..., None], image, np.uint8(255))
    assert find_tissue(Canvas(white)).mask.any()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_is_empty(method: str) -> None:
    found = find_tissue(Canvas(blobs(1), np.zeros((200, 180), np.bool_)), method=method)
    assert found.unseen == 1
    assert not found.mask.any()


# ---- methods


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiatoolbox-otsu'"):
        find_tissue(Canvas(blobs(1)), method="tiatoolbox_otsu")
    with pytest.raises(ConfigError, match="saturation, tiatoolbox-otsu, tiatoolbox-morphological"):
        find_tissue(Canvas(blobs(1)), method="magic")


def test_tiatoolbox_methods_are_tiatoolbox(shared_data: Path) -> None:
    from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker

    picture = Image.open(shared_data / "he_tiles" / "tissue-level2-4640-4649-8736-8746.png").convert("RGB")
    image = np.asarray(picture)
    otsu = OtsuTissueMasker().fit_transform(image[None])[0]
    grown = MorphologicalMasker(mpp=8.0).fit_transform(image[None])[0]
    assert (find_tissue(Canvas(image), method="tiatoolbox-otsu").mask == otsu).all()
    assert (find_tissue(Canvas(image), method="tiatoolbox-morphological").mask == grown).all()
    assert not (otsu == grown).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_pieces_and_leaves_out_what_was_not_seen(method: str) -> None:
    image = blobs(7)
    seen = np.ones(image.shape[:2], np.bool_)
    seen[:60] = False
    found = find_tissue(Canvas(image, seen), method=method)
    stained = image[..., 1] < 200
    assert not found.mask[~seen].any()
    assert (found.mask == (stained & seen)).mean() > 0.9
    assert found.unseen == pytest.approx(0.3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_an_inverted_slide_unless_forced(method: str) -> None:
    canvas = Canvas(255 - blobs(7))
    with pytest.raises(NotBrightFieldError, match=r"canvas\.svs"):
        find_tissue(canvas, method=method)
    assert find_tissue(canvas, method=method, force=True).mask.shape == (200, 180)


# ---- pens


def test_the_thin_edge_of_a_red_stroke_is_no_tissue(shared_data: Path) -> None:
    image = np.asarray(Image.open(shared_data / "he_tiles" / "diagnostic-slide-thumb-rgb.png").convert("RGB"))
    mask = tissue_from_rgb(image, 40.0)
    assert mask[230:360, 452:].mean() < 0.03  # a thin stroke on glass, right of the tissue
    assert mask[250:330, 400:430].mean() > 0.7  # the tissue beside it
    assert mask[100:170, 350:400].mean() > 0.88  # tissue inside a red ring


def test_pink_far_from_red_ink_stays() -> None:
    """The colour of a diluted stroke, 0.8 mm away from one; no ink without a stroke."""
    image = np.full((300, 300, 3), GLASS, np.uint8)
    image[50:250, 20:120] = (235, 175, 180)
    assert tissue_from_rgb(image, 8.0)[55:245, 25:115].all()
    image[50:250, 230:280] = (210, 30, 60)
    mask = tissue_from_rgb(image, 8.0)
    assert mask[55:245, 25:115].all()
    assert not mask[:, 130:].any()


# ---- size


def test_memory_is_a_few_bytes_per_pixel_of_the_mask() -> None:
    canvas = Canvas(np.tile(blobs(2, 500, 500), (4, 4, 1)))
    tracemalloc.start()
    find_tissue(canvas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2000**2


def test_real_slide_by_every_method(shared_data: Path) -> None:
    with open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        shares = {method: find_tissue(slide, method=method).mask.mean() for method in METHODS}
    assert shares["saturation"] == pytest.approx(0.397, abs=0.02)
    assert shares["tiatoolbox-otsu"] == pytest.approx(0.333, abs=0.02)
    assert shares["tiatoolbox-morphological"] == pytest.approx(0.42, abs=0.02)
