"""Does a map account for what small changes of the image do, and does it hold still under them? captum's measures.

Maps are resized to the images and given to every channel alike. Noise is drawn from a seed, sample after sample on
the CPU, and is the same for every image: an image's value depends neither on its batch nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medsd.checks import check_number
from medsd.networks.modes import evaluating
from medsd.saliency.method import (
    Method,
    Output,
    Target,
    check_images,
    check_logits,
    check_output,
    explained_output,
    targets_of,
)
from medsd.saliency.metrics.perturb import Resize, at_pixels
from medsd.saliency.metrics.scoring import held_target


def infidelity(
    method: Method,
    x: Tensor,
    target: Target = None,
    maps: Tensor | None = None,
    deviation: float = 0.2,
    samples: int = 10,
    seed: int = 0,
    normalise: bool = True,
    resize: Resize = "nearest",
    batch_size: int = 32,
    output: Output = "logit",
) -> Tensor:
    """Mean of (I . map - (f(x) - f(x - I)))^2 over Gaussian changes I, (B,), low is good: f is what is explained.

    Yeh et al. 2019 (arXiv 1901.09392), by `captum.metrics.infidelity`. In the square of the logit's unit: compare maps
    of one network only. It judges gradients: a map that is a gradient times the activation answers another question.

    Args:
        method: its network gives logits (B, K).
        x: (B, C, H, W) float images, as the network takes them.
        target: class numbers; None is the class predicted for each image.
        maps: (B, h, w), the method's of `x`; asked of it when None.
        deviation: of the noise, in the unit of the network's input (our choice: as in SmoothGrad).
        samples: changes an image.
        seed: of the noise.
        normalise: scale each map by what fits it best, as the paper's released code does: without it a map at a hidden
            layer, or averaged over channels, is judged by its unit.
        resize: how maps of a hidden layer come to the size of the images.
        batch_size: images in one pass, at least one sample of all of `x`.
        output: what the method explains of the class, see `medsd.saliency.method.Output`.

    Raises:
        ConfigError: no such output, a deviation that is not above 0, samples below 1, or a target outside the classes.
        DatasetError: images or maps that are not what they should be.
        NetworkError: the output is no logits, or as the method.
    """
    from captum.metrics import infidelity as captum_infidelity

    check_images(x)
    check_number("deviation", deviation, "(0, inf)")
    check_output(output)
    with torch.no_grad(), evaluating(method.network):
        classes = targets_of(check_logits(method.network(x), len(x)), target)
    given = method(x, classes) if maps is None else maps
    attributions = at_pixels(given, x, resize)[:, None].to(x).expand_as(x)
    noise = _Noise(x, samples, seed, normal=True)

    def change(images: Tensor) -> tuple[Tensor, Tensor]:
        changes = deviation * noise.next(images)
        return changes, images - changes

    def explained(images: Tensor) -> Tensor:
        answers = check_logits(method.network(images), len(images))
        return explained_output(answers, classes.repeat_interleave(len(images) // len(x)), output)

    with evaluating(method.network):
        scores: Tensor = captum_infidelity(
            explained,
            change,
            x,
            attributions,
            n_perturb_samples=samples,
            max_examples_per_batch=_together(x, samples, batch_size),
            normalize=normalise,
        )
    return scores


def sensitivity(
    method: Method,
    x: Tensor,
    target: Target = None,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    resize: Resize = "nearest",
    batch_size: int = 32,
) -> Tensor:
    """Greatest |map(x + e) - map(x)| / |map(x)| over uniform changes e, (B,), low is good: a map that holds still.

    Max-sensitivity of Yeh et al. 2019 (arXiv 1901.09392), by `captum.metrics.sensitivity_max`, with Euclidean norms
    over the pixels. Of a map that is 0 everywhere the change itself is taken. A method that does not look at the
    network holds still too: read it beside a measure of faithfulness.

    Args:
        method: called on the changed images, for the class of `x`.
        x: (B, C, H, W) float images, as the network takes them.
        target: class numbers; None is the class predicted for each image as it is.
        radius: e is uniform in -radius to radius, in the unit of the network's input; captum's default.
        samples: changes an image.
        seed: of the noise.
        resize: how maps of a hidden layer come to the size of the images.
        batch_size: images in one call of the method, at least one sample of all of `x`.

    Raises:
        ConfigError: a radius that is not above 0, samples below 1, or a target outside the classes.
        DatasetError: images that are not (B, C, H, W) float.
        NetworkError: as the method.
    """
    from captum.metrics import sensitivity_max

    check_images(x)
    check_number("radius", radius, "(0, inf)")
    held = held_target(method.network, x, target)
    noise = _Noise(x, samples, seed, normal=False)

    def change(images: Tensor) -> Tensor:
        return images + radius * noise.next(images)

    def explain(images: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        # captum calls this without gradients, once with a tuple, and then iterates over what comes back.
        (batch,) = images if isinstance(images, tuple) else (images,)
        classes = held
        if isinstance(held, Tensor) and held.ndim:
            classes = held.repeat_interleave(len(batch) // len(x))
        with torch.enable_grad():
            return (at_pixels(method(batch, classes), batch, resize),)

    together = _together(x, samples, batch_size)
    scores: Tensor = sensitivity_max(explain, x, change, n_perturb_samples=samples, max_examples_per_batch=together)
    return scores


class _Noise:
    """Samples (C, H, W), each drawn alone, so that they do not depend on how many are asked for at a time."""

    def __init__(self, x: Tensor, samples: int, seed: int, normal: bool) -> None:
        check_number("samples", samples, "[1, inf)", whole=True)
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.empty(x.shape[1:]) for _ in range(samples)]
        for draw in draws:
            _ = draw.normal_(generator=generator) if normal else draw.uniform_(-1, 1, generator=generator)
        self._draws, self._images, self._used = torch.stack(draws), len(x), 0

    def next(self, images: Tensor) -> Tensor:
        """The next samples for images (B * n, C, H, W), of which each of B comes n times in a row."""
        count = len(images) // self._images
        draws = self._draws[self._used : self._used + count]
        self._used += count
        return draws.repeat(self._images, 1, 1, 1).to(images)


def _together(x: Tensor, samples: int, batch_size: int) -> int:
    """Images in one pass as captum counts them: a whole number of samples of the batch."""
    return len(x) * min(max(batch_size // len(x), 1), samples)
