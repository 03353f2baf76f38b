"""Views: coordinate-coded images show that each pixel comes from where the view says; colours and draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsd.errors import ConfigError
from medsd.pretrain import views as of_views
from medsd.pretrain.views import Views, ViewSettings, _blur, draw_views

PLAIN = {"stain": 0.0, "blur": 0.0, "grey": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(height: int, width: int, batch: int = 1) -> Tensor:
    """Red is 20 + x * 200 / W, green 20 + y * 200 / H of pixel centres: resampling keeps what is linear."""
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.stack([20 + x * 200 / width, 20 + y * 200 / height, np.full_like(x, 90)])
    return torch.from_numpy(np.rint(image).astype(np.uint8)).expand(batch, -1, -1, -1)


def sources(views: Views) -> Tensor:
    """(B, 2, S, S): the place in the source of each pixel's centre, as the view says."""
    side = views.images.shape[-1]
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)]).flatten(1).double()
    return (views.to_source @ places).unflatten(2, (side, side))


@pytest.mark.parametrize("kind", ["histology", "intensity"])
@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(60, 150),
    width=st.integers(60, 150),
    side=st.sampled_from([24, 47, 96]),
    seed=st.integers(0, 10_000),
)
def test_colours_tell_the_place_that_to_source_says(kind: str, height: int, width: int, side: int, seed: int) -> None:
    if kind == "intensity":  # geometry alone: colours change there by definition
        return check_crop_alone(height, width, side, seed)
    views = draw_views(coded(height, width, 8), generator(seed), ViewSettings(side, **PLAIN))
    found = (views.images[:, :2].double() - 20) / 200 * torch.tensor([width, height]).view(1, 2, 1, 1)
    error = (found - sources(views)).abs()
    # A grey level is `size / 200` px; both the image and the view are rounded to one. Weights are cut at a crop's edge.
    level = max(height, width) / 200
    inner = error[:, :, 3:-3, 3:-3]
    assert float(inner.max()) <= 1.3 * level
    step = views.to_source[:, :, :2].abs().sum(dim=2).amax(dim=1).view(-1, 1, 1, 1)
    assert bool((error <= 1.3 * level + 1.0 * step.clamp(min=1)).all())
    # On the mean rounding counts little: a shift by half a pixel would show.
    assert float((found - sources(views)).mean(dim=(2, 3)).abs().max()) <= 0.5 * level + 0.02


def check_crop_alone(height: int, width: int, side: int, seed: int) -> None:
    views = draw_views(coded(height, width, 8), generator(seed), ViewSettings(side, kind="intensity"))
    turns = views.to_source[:, :, :2]
    assert bool((turns.diagonal(dim1=1, dim2=2) > 0).all()) and not turns[:, [0, 1], [1, 0]].any()
    corners = views.to_source @ torch.tensor([[0.0, side], [0, side], [1, 1]], dtype=torch.float64)
    assert float(corners.min()) >= -1e-9
    assert bool((corners.amax(dim=2) <= torch.tensor([width, height]).double() + 1e-9).all())


def test_every_symmetry_comes_and_crops_lie_inside() -> None:
    views = draw_views(coded(80, 120, 400), generator(), ViewSettings(24, **PLAIN))
    signs = {tuple(linear.sign().flatten().int().tolist()) for linear in views.to_source[:, :, :2]}
    assert len(signs) == 8
    corners = views.to_source @ torch.tensor([[0.0, 24], [0, 24], [1, 1]], dtype=torch.float64)
    assert float(corners.min()) >= -1e-9
    assert bool((corners.amax(dim=2) <= torch.tensor([120, 80]).double() + 1e-9).all())


def test_shares_of_the_area_are_drawn_evenly() -> None:
    views = draw_views(
        torch.zeros(2000, 3, 200, 300, dtype=torch.uint8), generator(), ViewSettings(8, (0.3, 0.9), **PLAIN)
    )
    share = torch.linalg.det(views.to_source[:, :, :2]).abs() * 64 / (200 * 300)
    assert float(share.min()) > 0.29 and float(share.max()) < 0.91
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.45, 0.6, 0.75], atol=0.03)


def test_a_view_of_everything_is_the_image_turned() -> None:
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    views = draw_views(image.expand(30, -1, -1, -1), generator(), ViewSettings(32, (1.0, 1.0), **PLAIN))
    for view, places in zip(views.images, sources(views), strict=True):
        x, y = (places - 0.5).round().long()
        assert torch.equal(view, image[0][:, y, x])


@pytest.mark.parametrize("kind", ["histology", "intensity"])
def test_deterministic_bytes_and_input_untouched(kind: str) -> None:
    images = torch.randint(256, (6, 3, 40, 50), dtype=torch.uint8, generator=generator(3))
    before = images.clone()
    first, again, other = (draw_views(images, generator(s), ViewSettings(32, kind=kind)) for s in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(images, before)
    assert first.images.dtype == torch.uint8 and first.to_source.dtype == torch.float64
    assert torch.equal(first.images, again.images) and torch.equal(first.to_source, again.to_source)
    assert not torch.equal(first.images, other.images)
    assert first.images.flatten(1).float().std(dim=1).min() > 1


def test_grey_views_have_equal_channels_in_the_asked_share() -> None:
    images = torch.randint(256, (300, 3, 16, 16), dtype=torch.uint8, generator=generator())
    views = draw_views(images, generator(), ViewSettings(16, stain=0.0, blur=0.0, grey=0.3)).images
    grey = (views[:, :1] == views).all(dim=3).all(dim=2).all(dim=1)
    assert 60 < int(grey.sum()) < 120  # 90 expected, deviation 8


def test_blur_keeps_constants_and_the_mean_and_lowers_the_variance() -> None:
    kept = draw_views(
        torch.full((8, 3, 20, 20), 77, dtype=torch.uint8), generator(), ViewSettings(20, **PLAIN | {"blur": 1.0})
    )
    assert bool((kept.images == 77).all())
    noise = torch.randint(256, (40, 3, 48, 48), dtype=torch.uint8, generator=generator())
    whole = {"scale": (1.0, 1.0)}
    sharp = draw_views(noise, generator(), ViewSettings(48, **whole, **PLAIN)).images.float()
    blurred = draw_views(noise, generator(), ViewSettings(48, **whole, **PLAIN | {"blur": 1.0})).images.float()
    assert bool((blurred.flatten(1).std(dim=1) <= sharp.flatten(1).std(dim=1) + 0.1).all())
    assert float(blurred.flatten(1).std(dim=1).min()) < 15 < 70 < float(sharp.flatten(1).std(dim=1).min())
    torch.testing.assert_close(blurred.mean(dim=(1, 2, 3)), sharp.mean(dim=(1, 2, 3)), atol=1.5, rtol=0)


def test_blur_is_a_gaussian() -> None:
    points = torch.zeros(2, 3, 41, 41, dtype=torch.uint8)
    points[:, :, 20, 20] = 255
    for spread, view in zip((1.0, 1.5), _blur(points, torch.tensor([1.0, 1.5])), strict=True):
        place = np.arange(41) - 20
        profile = np.exp(-(place**2) / (2 * spread**2))
        profile /= profile.sum()
        np.testing.assert_allclose(view[0], np.rint(255 * np.outer(profile, profile)), atol=0.51)


def test_slices_stay_grey() -> None:
    slices = torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8, generator=generator()).expand(-1, 3, -1, -1)
    views = draw_views(slices, generator(), ViewSettings(32, kind="intensity")).images
    assert bool((views[:, :1] == views).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size_px": 4}, "size_px=4: must be a whole number from 8 on"),
        ({"scale": (0.0, 1.0)}, "scale=0.0"),
        ({"scale": (0.5, 0.2)}, "scale=0.2: must be a number from 0.5 to 1; the least share comes first"),
        ({"scale": (0.5,)}, "give the least and the largest"),
        ({"stain": 1.0}, "stain=1.0"),
        ({"blur": 1.5}, "blur=1.5"),
        ({"grey": -0.1}, "grey=-0.1"),
        ({"kind": "intensty"}, "did you mean 'intensity'"),
    ],
)
def test_settings_out_of_range_in_words(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as caught:
        ViewSettings(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(96, 96), (64, 80), (300, 200)])
def test_all_crops_at_once_are_what_torch_gives_one_by_one(shape):
    """As accelerators resample; torch resamples bytes with whole numbers, hence a grey level."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, *shape), dtype=torch.uint8, generator=draws)
    boxes = of_views._draw_boxes(16, *shape, (0.01, 1.0), draws)
    one_by_one, at_once = of_views._cropped(images, boxes, 64), of_views._resampled(images, boxes, 64)
    assert (one_by_one.int() - at_once.int()).abs().max() <= 1
    floats = [
        F.interpolate(image[None, :, y : y + h, x : x + w].double(), (64, 64), mode="bilinear", antialias=True)
        for image, (x, y, w, h) in zip(images, boxes.tolist(), strict=True)
    ]
    assert (torch.cat(floats) - at_once).abs().max() < 0.501
