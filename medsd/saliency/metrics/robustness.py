"""Does a map account for what small changes of the image do, and does it hold still under them? captum's measures.

Maps are resized to the images and given to every channel alike. Noise is drawn from a seed, sample after sample on
the CPU, and is the same for every image: an image's value depends neither on its batch nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

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
    explained_output,
    targets_of,
)
from medsd.saliency.metrics.perturb import Resize, at_pixels
from medsd.saliency.metrics.scoring import held_target


@dataclass(frozen=True)
class Noise:
    """The changes of images, the same for every image.

    Attributes:
        size: standard deviation of Gaussian changes for infidelity, the greatest uniform one for sensitivity; in the
            unit of the network's input.
        samples: changes an image.
        seed: of the noise.
        batch_size: images in one pass, at least one sample of all of a batch.

    Raises:
        ConfigError: a size that is not above 0, samples or batch size below 1, or a seed below 0.
    """

    size: float
    samples: int = 10
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_number("size", self.size, "(0, inf)")
        for name in ("samples", "batch_size"):
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        check_number("seed", self.seed, "[0, inf)", whole=True)

    def changes(self, x: Tensor, normal: bool) -> Callable[[Tensor], Tensor]:
        """Gives the next changes for images (B * n, C, H, W), of which each of `x` comes n times in a row."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.empty(x.shape[1:]) for _ in range(self.samples)]
        for draw in draws:  # each alone, so that they do not depend on how many are asked for at a time
            _ = draw.normal_(generator=generator) if normal else draw.uniform_(-1, 1, generator=generator)
        left = iter(draws)

        def next_changes(images: Tensor) -> Tensor:
            some = torch.stack(list(islice(left, len(images) // len(x))))
            return self.size * some.repeat(len(x), 1, 1, 1).to(images)

        return next_changes

    def together(self, x: Tensor) -> int:
        """Images in one pass as captum counts them: a whole number of samples of the batch."""
        return len(x) * min(max(self.batch_size // len(x), 1), self.samples)


# Our choice, as in SmoothGrad; captum's default.
_DEVIATION, _RADIUS = Noise(0.2), Noise(0.02)


def infidelity(
    method: Method,
    x: Tensor,
    target: Target = None,
    maps: Tensor | None = None,
    noise: Noise = _DEVIATION,
    normalise: bool = True,
    resize: Resize = "nearest",
) -> Tensor:
    """Mean of (I . map - (f(x) - f(x - I)))^2 over Gaussian changes I, (B,), low is good: f is what it explains.

    Yeh et al. 2019 (arXiv 1901.09392), by `captum.metrics.infidelity`. In the square of the logit's unit: compare maps
    of one network only. It judges gradients: a map that is a gradient times the activation answers another question.

    Args:
        method: its network gives logits (B, K).
        x: (B, C, H, W) float images, as the network takes them.
        target: class numbers; None is the class predicted for each image.
        maps: (B, h, w), the method's of `x`; asked of it when None.
        noise: the changes.
        normalise: scale each map by what fits it best, as the paper's released code does: without it a map at a hidden
            layer, or averaged over channels, is judged by its unit.
        resize: how maps of a hidden layer come to the size of the images.

    Raises:
        ConfigError: a target outside the classes.
        DatasetError: images or maps that are not what they should be.
        NetworkError: the output is no logits, or as the method.
    """
    from captum.metrics import infidelity as captum_infidelity

    check_images(x)
    output: Output = getattr(method, "output", "logit")
    with torch.no_grad(), evaluating(method.network):
        classes = targets_of(check_logits(method.network(x), len(x)), target)
    given = method(x, classes) if maps is None else maps
    attributions = at_pixels(given, x, resize)[:, None].to(x).expand_as(x)
    next_changes = noise.changes(x, normal=True)

    def change(images: Tensor) -> tuple[Tensor, Tensor]:
        changes = next_changes(images)
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
            n_perturb_samples=noise.samples,
            max_examples_per_batch=noise.together(x),
            normalize=normalise,
        )
    return scores


def sensitivity(
    method: Method, x: Tensor, target: Target = None, noise: Noise = _RADIUS, resize: Resize = "nearest"
) -> Tensor:
    """Greatest |map(x + e) - map(x)| / |map(x)| over uniform changes e, (B,), low is good: a map that holds still.

    Max-sensitivity of Yeh et al. 2019 (arXiv 1901.09392), by `captum.metrics.sensitivity_max`, with Euclidean norms
    over the pixels. Of a map that is 0 everywhere the change itself is taken. A method that does not look at the
    network holds still too: read it beside a measure of faithfulness.

    Args:
        method: called on the changed images, for the class of `x`.
        x: (B, C, H, W) float images, as the network takes them.
        target: class numbers; None is the class predicted for each image as it is.
        noise: e is uniform in -size to size.
        resize: how maps of a hidden layer come to the size of the images.

    Raises:
        ConfigError: a target outside the classes.
        DatasetError: images that are not (B, C, H, W) float.
        NetworkError: as the method.
    """
    from captum.metrics import sensitivity_max

    check_images(x)
    held = held_target(method.network, x, target)
    next_changes = noise.changes(x, normal=False)

    def change(images: Tensor) -> Tensor:
        return images + next_changes(images)

    def explain(images: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        # captum calls this without gradients, once with a tuple, and then iterates over what comes back.
        (batch,) = images if isinstance(images, tuple) else (images,)
        classes = held
        if isinstance(held, Tensor) and held.ndim:
            classes = held.repeat_interleave(len(batch) // len(x))
        with torch.enable_grad():
            return (at_pixels(method(batch, classes), batch, resize),)

    scores: Tensor = sensitivity_max(
        explain, x, change, n_perturb_samples=noise.samples, max_examples_per_batch=noise.together(x)
    )
    return scores
