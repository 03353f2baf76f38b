"""Two views of an image for contrastive learning, each with the map that says where its pixels come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError
from medsd.slides.stain.augment import StainAugment
from medsd.training.augment import turn

Kind = Literal["histology", "intensity"]

_ASPECT = (3 / 4, 4 / 3)
_BLUR_SIGMA_PX = (0.1, 2.0)
_LUMA = (0.299, 0.587, 0.114)
# RandAugment of the authors' code: 2 operations of magnitude 5 of 10, of which 10 changes a factor by 0.9.
_OPERATIONS, _MAGNITUDE, _MAGNITUDE_SD, _LARGEST_CHANGE = 2, 0.5, 0.05, 0.9


@dataclass(frozen=True)
class ViewSettings:
    """How a view is drawn.

    Attributes:
        size_px: side of the view.
        scale: least and largest share of the image's area that a view shows (MoCo v2: 0.2 to 1).
        stain: strength of the change of haematoxylin and eosin on their own, 0 for none (see `StainAugment`; its shift
            is a quarter of the strength, our choice). Histology alone.
        blur: share of views with a Gaussian blur, sigma 0.1 to 2 px (MoCo v2). Histology alone.
        grey: share of views without colour (MoCo v2). Histology alone.
        kind: "histology" has no up or down, so views are turned and mirrored too. "intensity" is for CT slices: crops,
            and 2 of autocontrast, equalise, contrast, brightness, sharpness at the magnitude of Med-MoCo's authors'
            code, whose geometric operations are left out.

    Raises:
        ConfigError: a value is out of its range.
    """

    size_px: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    stain: float = 0.2
    blur: float = 0.5
    grey: float = 0.2
    kind: Kind = "histology"

    def __post_init__(self) -> None:
        check_number("size_px", self.size_px, "[8, inf)", whole=True)
        if not isinstance(self.scale, list | tuple) or len(self.scale) != 2:
            raise ConfigError(f"scale={self.scale}: give the least and the largest share of the area, such as 0.2, 1")
        check_number("scale", self.scale[0], "(0, 1]")
        check_number("scale", self.scale[1], f"[{self.scale[0]}, 1]", hint="the least share comes first")
        check_number("stain", self.stain, "[0, 1)")
        check_number("blur", self.blur, "[0, 1]")
        check_number("grey", self.grey, "[0, 1]")
        check_choice("kind", self.kind, get_args(Kind))


@dataclass(frozen=True)
class Views:
    """One view of each image of a batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        to_source: (B, 2, 3) float64, on the CPU: [x, y] of the source image = to_source @ [x, y, 1] of the view, in
            pixels from the top left corner; the centre of the first pixel is at 0.5.
    """

    images: Tensor
    to_source: Tensor


def draw_views(images: Tensor, generator: torch.Generator, settings: ViewSettings) -> Views:
    """One random view of each image: a crop of random area and shape, resampled, turned; then blur, stain and grey.

    Crops have whole pixels and the share of area that was drawn, but for rounding: where the drawn shape does not
    fit, the nearest one that does is taken (our choice; torchvision draws again). Resampling is bilinear with
    antialiasing. The blur comes before the colour, as in a scanner (our choice).

    Args:
        images: (B, 3, H, W) uint8, on any device. The CPU resamples such images with whole numbers, so devices differ
            by a grey level here and there.
        generator: draws the changes, on the CPU.
        settings: how.

    Example:
        >>> tiles = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
        >>> views = draw_views(tiles, torch.Generator().manual_seed(0), ViewSettings(size_px=64))
        >>> views.images.shape, views.to_source.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 2, 3]))
    """
    batch, _, height, width = images.shape
    boxes = _draw_boxes(batch, height, width, settings.scale, generator)
    views = _cropped(images, boxes, settings.size_px)
    symmetry = torch.zeros(batch, dtype=torch.int64)
    if settings.kind == "histology":
        symmetry = torch.randint(8, (batch,), generator=generator)
        views = _recoloured(turn(views, symmetry), generator, settings)
    else:
        views = _intensified(views, generator)
    return Views(views, _to_source(boxes, symmetry, settings.size_px))


def _draw_boxes(batch: int, height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Left, top, width, height (B, 4) int64 of random crops."""
    draws = torch.rand((4, batch), generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = torch.tensor(_ASPECT, dtype=torch.float64).log()
    # No wider and no higher than the image.
    aspect = (low + (high - low) * draws[1]).exp().clamp(area / height**2, width**2 / area)
    wide = (area * aspect).sqrt().round().clamp(1, width)
    high_px = (area / aspect).sqrt().round().clamp(1, height)
    left, top = ((width - wide + 1) * draws[2]).floor(), ((height - high_px + 1) * draws[3]).floor()
    return torch.stack([left, top, wide, high_px], dim=1).to(torch.int64)


def _cropped(images: Tensor, boxes: Tensor, size_px: int) -> Tensor:
    if images.device.type != "cpu":
        return _resampled(images, boxes.to(images.device, non_blocking=True), size_px)
    crops = [
        F.interpolate(
            image[None, :, top : top + high, left : left + wide], (size_px, size_px), mode="bilinear", antialias=True
        )
        for image, (left, top, wide, high) in zip(images, boxes.tolist(), strict=True)
    ]
    return torch.cat(crops)


def _resampled(images: Tensor, boxes: Tensor, size_px: int) -> Tensor:
    """Crops as `F.interpolate` gives them, all at once, as matrices on rows and columns: for accelerators."""
    left, top, wide, high = boxes.to(torch.float32).unbind(1)
    rows = _triangles(top, high, images.shape[2], size_px)
    columns = _triangles(left, wide, images.shape[3], size_px)
    return _bytes(rows[:, None] @ images.to(torch.float32) @ columns[:, None].mT)


def _triangles(first: Tensor, length: Tensor, source_px: int, size_px: int) -> Tensor:
    """(B, size_px, source_px): weights of bilinear resampling with antialiasing of stretches of an axis."""
    scale = (length / size_px)[:, None, None]
    middles = (torch.arange(size_px, device=first.device)[:, None] + 0.5) * scale
    places = torch.arange(source_px, device=first.device) + 0.5 - first[:, None, None]
    weights = (1 - (places - middles).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((places > 0) & (places < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def _to_source(boxes: Tensor, symmetry: Tensor, size_px: int) -> Tensor:
    left, top, wide, high = boxes.to(torch.float64).unbind(1)
    zero = torch.zeros_like(left)
    crop = torch.stack(
        [torch.stack([wide / size_px, zero, left], 1), torch.stack([zero, high / size_px, top], 1)], dim=1
    )
    last_row = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return crop @ torch.cat([_before_turn(size_px)[symmetry], last_row.expand(len(boxes), 1, 3)], dim=1)


def _before_turn(size_px: int) -> Tensor:
    """(8, 2, 3): places of a turned view to places before the turn, for the numbers of `turn`."""
    side = float(size_px)
    rows = torch.tensor([[0.0, 0, 1]], dtype=torch.float64)
    quarter = torch.tensor([[0.0, -1, side], [1, 0, 0]], dtype=torch.float64)  # (x, y) was at (S - y, x)
    mirror = torch.tensor([[-1.0, 0, side], [0, 1, 0]], dtype=torch.float64)
    turns = [torch.eye(3, dtype=torch.float64)]
    for _ in range(3):
        turns.append(turns[-1] @ torch.cat([quarter, rows]))
    mirrored = [turned @ torch.cat([mirror, rows]) for turned in turns]
    return torch.stack([*turns, *mirrored])[:, :2]


def _recoloured(views: Tensor, generator: torch.Generator, settings: ViewSettings) -> Tensor:
    batch = len(views)
    # Numbers of views, for a mask on a GPU would have to be waited for.
    blurred, grey = (
        (torch.rand(batch, generator=generator) < share).nonzero()[:, 0] for share in (settings.blur, settings.grey)
    )
    low, high = _BLUR_SIGMA_PX
    sigma = low + (high - low) * torch.rand(batch, generator=generator)
    if len(blurred):
        sigma, blurred = (each.to(views.device, non_blocking=True) for each in (sigma[blurred], blurred))
        views[blurred] = _blur(views[blurred], sigma)
    if settings.stain:
        views = StainAugment(settings.stain, settings.stain / 4)(views, generator)
    if len(grey):
        luma, grey = (each.to(views.device, non_blocking=True) for each in (torch.tensor(_LUMA).view(3, 1, 1), grey))
        views[grey] = _bytes((views[grey] * luma).sum(dim=1, keepdim=True)).expand(-1, 3, -1, -1)
    return views


def _blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussians as matrices on rows and columns, one for each view; weights at the edges are normalised again."""
    places = torch.arange(views.shape[-1], device=views.device)
    distances = (places[:, None] - places).square()
    weights = torch.softmax(-distances / (2 * sigma.square())[:, None, None, None], dim=-1)
    return _bytes(weights @ views.to(torch.float32) @ weights.mT)


def _intensified(views: Tensor, generator: torch.Generator) -> Tensor:
    batch = len(views)
    operations = torch.rand((batch, 5), generator=generator).argsort(dim=1)[:, :_OPERATIONS]
    magnitudes = _MAGNITUDE + _MAGNITUDE_SD * torch.randn((batch, _OPERATIONS), generator=generator)
    signs = 2 * torch.randint(2, (batch, _OPERATIONS), generator=generator) - 1
    factors = 1 + _LARGEST_CHANGE * signs * magnitudes.clamp(0, 1)
    changed = []
    for view, numbers, by in zip(views, operations.tolist(), factors.tolist(), strict=True):
        for number, factor in zip(numbers, by, strict=True):
            view = _intensity(view, number, factor)
        changed.append(view)
    return torch.stack(changed)


def _intensity(view: Tensor, number: int, factor: float) -> Tensor:
    if number < 2:
        changed: Tensor = (tv.autocontrast, tv.equalize)[number](view)
    else:
        changed = (tv.adjust_contrast, tv.adjust_brightness, tv.adjust_sharpness)[number - 2](view, factor)
    return changed


def _bytes(values: Tensor) -> Tensor:
    return values if values.dtype == torch.uint8 else values.round().clamp_(0, 255).to(torch.uint8)
