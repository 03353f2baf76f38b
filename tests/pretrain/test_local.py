"""Local regions: known losses, and cells that show the same tissue in both views whatever the turns and crops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.pretrain.local import ViewRegions, left_edge_vectors, region_contrast, region_vectors, shared_regions
from medsd.pretrain.views import ViewSettings, draw_views

ALL = torch.ones(2, dtype=torch.bool)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_regions_that_are_alike_cannot_be_told_apart() -> None:
    same = draw(2, 1, 5).expand(2, 9, 5)
    assert float(region_contrast(same, same, ALL, 0.2)) == pytest.approx(math.log(9))
    constant = torch.full((2, 9, 5), 0.3)
    assert float(region_contrast(constant, constant, ALL, 0.2)) == pytest.approx(math.log(9), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_orthonormal_regions(temperature: float) -> None:
    basis = torch.eye(9, dtype=torch.float64)
    regions = torch.stack([basis, -basis])  # their mean is zero
    loss = float(region_contrast(regions, regions, ALL, temperature))
    assert loss == pytest.approx(math.log(1 + 8 * math.exp(-1 / temperature)))
    if temperature == 0.2:
        assert loss == pytest.approx(0.0525, abs=5e-5)


def test_one_order_of_cells_is_like_another_but_not_two_orders() -> None:
    first, second = draw(2, 9, 16), draw(2, 9, 16) + 0.3 * draw(2, 9, 16, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    loss = region_contrast(first, second, ALL, 0.2)
    torch.testing.assert_close(region_contrast(first[:, order], second[:, order], ALL, 0.2), loss)
    assert region_contrast(first[:, order], second, ALL, 0.2) > loss + 1


def test_a_common_mean_does_not_hide_the_regions() -> None:
    first, second = draw(2, 9, 16), draw(2, 9, 16, seed=1)
    loss = region_contrast(first, second, ALL, 0.2)
    torch.testing.assert_close(region_contrast(first + 50, second + 50, ALL, 0.2), loss)


def test_images_left_out_do_not_count() -> None:
    first, second = draw(3, 4, 6), draw(3, 4, 6, seed=1)
    kept = torch.tensor([True, False, True])
    torch.testing.assert_close(
        region_contrast(first, second, kept, 0.2), region_contrast(first[kept], second[kept], ALL, 0.2)
    )
    first.requires_grad_()
    loss = region_contrast(first, second, ~torch.ones(3, dtype=torch.bool), 0.2)
    loss.backward()
    assert float(loss.detach()) == 0 and first.grad is not None and not first.grad.any()


def test_gradcheck() -> None:
    second = draw(2, 4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: region_contrast(z, second, ALL, 0.5), draw(2, 4, 5).requires_grad_())


class Ramp(nn.Module):
    """An encoder whose cells tell where in the view they look: in x, in y."""

    def __init__(self, stride: int, centre: float) -> None:
        super().__init__()
        self.stride, self.centre = stride, centre

    def forward(self, to_source: Tensor, size_px: int) -> Tensor:
        """The map (B, 2, h, w) of source places that an exact linear encoder has of a view of a coordinate ramp."""
        places = self.centre + self.stride * torch.arange(size_px // self.stride, dtype=torch.float64)
        y, x = torch.meshgrid(places, places, indexing="ij")
        homogeneous = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
        return (to_source @ homogeneous).unflatten(2, x.shape)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), regions=st.sampled_from([1, 2, 3, 4]), centre=st.sampled_from([None, 0.5, 3.0]))
def test_cells_of_both_views_show_the_same_place(seed: int, regions: int, centre: float | None) -> None:
    side, stride = 96, 4
    images = torch.zeros(6, 3, 120, 150, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    how = ViewSettings(side, scale=(0.3, 1.0), stain=0.0, blur=0.0, grey=0.0)
    one, other = (draw_views(images, generator, how).to_source for _ in range(2))
    shared = shared_regions(one, other, side, regions, 0.2)
    ramp = Ramp(stride, stride / 2 if centre is None else centre)
    first = region_vectors(ramp(one, side), shared.first, side, centre)
    second = region_vectors(ramp(other, side), shared.second, side, centre)
    low = torch.maximum(corners(one, side).amin(2), corners(other, side).amin(2))
    high = torch.minimum(corners(one, side).amax(2), corners(other, side).amax(2))
    steps = (torch.arange(regions, dtype=torch.float64) + 0.5) / regions
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    expected = low[:, None] + torch.stack([x, y], 2).flatten(0, 1) * (high - low)[:, None]
    for vectors, to_source, view in ((first, one, shared.first), (second, other, shared.second)):
        # Beyond the outermost centres a map has no values: exact where cells do not reach there.
        reach = side / stride
        edges = (view.boxes - ramp.centre) / stride
        inside = (edges.amin(dim=1) >= 0) & (edges.amax(dim=1) <= reach - 1) & shared.kept
        torch.testing.assert_close(vectors[inside], expected[inside], rtol=0, atol=1e-4)
        pixel = to_source[:, :, :2].abs().sum(dim=2).amax(dim=1).view(-1, 1, 1)
        error = ((vectors - expected).abs() / pixel)[shared.kept]
        assert not len(error) or float(error.max()) <= stride


def corners(to_source: Tensor, side: int) -> Tensor:
    return to_source @ torch.tensor([[0.0, side], [0, side], [1, 1]], dtype=torch.float64)


def test_an_exactly_shifted_and_mirrored_crop() -> None:
    """Spec's plain case: one view is a shifted crop of the other, mirrored; vectors agree."""
    source = draw(1, 3, 128, 128)
    one = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]], dtype=torch.float64)
    other = torch.tensor([[[-1.0, 0, 112], [0, 1, 24]]], dtype=torch.float64)  # columns 16 to 112, rows 24 to 120
    encoder = nn.AvgPool2d(8)
    first_map = encoder(source[..., :96, :96])
    second_map = encoder(source[..., 24:120, 16:112].flip(3))
    shared = shared_regions(one, other, 96, 2, 0.2)
    first, second = (
        region_vectors(maps, view, 96) for maps, view in ((first_map, shared.first), (second_map, shared.second))
    )
    torch.testing.assert_close(shared.first.boxes, torch.tensor([[16.0, 24, 96, 96]], dtype=torch.float64))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    assert float((first[:, 0] - second[:, 1]).abs().max()) > 0.01


def test_cells_of_a_map_may_be_oblong() -> None:
    x, y = (torch.arange(16).double() + 0.5) * 5, (torch.arange(8).double() + 0.5) * 10
    places = torch.stack([x.expand(8, 16), y[:, None].expand(8, 16)])[None]
    view = ViewRegions(torch.tensor([[20.0, 30, 50, 60]], dtype=torch.float64), torch.arange(4)[None])
    middles = [[27.5, 37.5], [42.5, 37.5], [27.5, 52.5], [42.5, 52.5]]
    torch.testing.assert_close(region_vectors(places, view, 80)[0], torch.tensor(middles, dtype=torch.float64))


def test_too_little_in_common_is_left_out() -> None:
    def at(left: float) -> Tensor:
        return torch.tensor([[[0.5, 0, left], [0, 0.5, 0]]], dtype=torch.float64)

    both = torch.cat([at(left) for left in (0, 24, 31, 32, 40)])  # views of 40 px: shares 1, .4, .225, .2, 0
    kept = shared_regions(at(0).expand(5, -1, -1), both, 80, 3, 0.21).kept
    assert kept.tolist() == [True, True, True, False, False]
    whole = torch.eye(2, 3, dtype=torch.float64)[None]  # of 80 px
    assert shared_regions(at(0), whole, 80, 3, 0.9).kept.all()  # the smaller view is in it
    assert not shared_regions(at(0), at(40), 80, 3, 0.0).kept.any()  # nothing in common is never enough
    shared = shared_regions(at(0), at(90), 80, 3, 0.2)
    assert region_vectors(torch.ones(1, 2, 10, 10), shared.second, 80).isfinite().all()


def test_gradient_reaches_the_map_in_single_precision_under_autocast() -> None:
    maps = torch.randn(2, 3, 6, 6).bfloat16().requires_grad_()
    eye = torch.eye(2, 3, dtype=torch.float64).expand(2, -1, -1)
    shared = shared_regions(eye, eye, 48, 3, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = region_vectors(maps, shared.first, 48)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, F.avg_pool2d(maps.float(), 2).flatten(2).mT, atol=1e-5, rtol=0)
    vectors.sum().backward()
    assert maps.grad is not None and bool((maps.grad != 0).all())


def test_reading_b_has_a_gradient_and_regions_that_differ() -> None:
    maps = torch.rand(2, 64, 11, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    vectors = left_edge_vectors(maps, 3)
    assert vectors.shape == (2, 3, 9)
    expected = (maps / maps.flatten(2).norm(dim=2)[..., None, None]).mean(dim=1)[:, 3:6, :3].flatten(1)
    torch.testing.assert_close(vectors[:, 1], expected)
    loss = region_contrast(vectors, vectors.detach(), ALL, 0.2)
    loss.backward()
    assert float(loss.detach()) < 0.9 * math.log(3) and maps.grad is not None and bool(maps.grad.any())
    # Without the normalisation of vectors, as described: log 9 to thousandths (target 0 among R x R logits).
    raw = reading_a_loss(vectors.detach(), vectors.detach())
    assert float(raw) == pytest.approx(math.log(9), abs=3e-3)
    with pytest.raises(ConfigError, match=r"regions=3: reading 'b' needs maps of at least 6 x 6 cells, here 5 x 9"):
        left_edge_vectors(torch.rand(1, 4, 5, 9), 3)


def reading_a_loss(first: Tensor, second: Tensor) -> Tensor:
    """The released head: true pairs, then the others, and only the first counts as true."""
    count = first.shape[1]
    similarities = first @ second.mT / 0.2
    off = ~torch.eye(count, dtype=torch.bool)
    logits = torch.cat([similarities.diagonal(dim1=1, dim2=2), similarities[:, off]], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(first), dtype=torch.int64))


def test_reading_a_is_a_constant_without_gradient() -> None:
    """What the released code does: max-pooled image tensors, no graph, log of R^2. Kept as a fixture alone."""
    images = [draw(4, 3, 336, 336, seed=seed).float() for seed in (0, 1)]
    first, second = (left_edge_vectors(F.max_pool2d(each, 3, 2, 1), 20) for each in images)
    assert first.shape == (4, 20, 64) and not first.requires_grad
    loss = reading_a_loss(first, second)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(math.log(400), abs=1e-3)
