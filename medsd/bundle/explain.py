"""The stage that explains images: the same as `medsd explain`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medsd.bundle.config import boundary
from medsd.errors import ConfigError, DatasetError
from medsd.explain.explain import explain_images
from medsd.explain.settings import ExplainSettings, ImageSmoothing, method_names
from medsd.progress import progress_bar
from medsd.saliency.method import Output


@boundary
def explain(
    images: str | Sequence[str] | None,
    weights: str,
    output_dir: str,
    methods: str | Sequence[str] | None = None,
    layer: str | None = None,
    target: str | int = "predicted",
    smoothing: ImageSmoothing = "none",
    surrogate: str | None = None,
    output: Output = "evidence",
    masks: str | None = None,
    measured: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """Stage explain: contact sheets, tables and maps of images, see `explain_images`; what was made, in words.

    Ends with exit code 1 when an image could not be read, after the others are done.

    Args:
        images: a folder or file, or several.
        methods: names, as a list or "a,b"; None for the usual ones.
        target: a class by name or number, or "predicted".
        weights, layer, smoothing, surrogate, output, masks, measured, seed, device: as `explain_images` and
            `ExplainSettings` take them.
    """
    if not images:
        raise ConfigError("images: not set; name a folder of images, --images FOLDER")
    places = [images] if isinstance(images, str) else list(images)
    settings = ExplainSettings(
        methods=method_names(methods),
        layer=layer,
        target=str(target),
        smoothing=smoothing,
        surrogate=surrogate,
        output=output,
        measured=measured,
        seed=seed,
    )
    explained = explain_images(places, weights, output_dir, settings, masks, device, progress_bar("explain"))
    if explained.failed:
        raise DatasetError(
            f"{len(explained.failed)} image(s) failed, the others are done; the first: "
            f"{next(iter(explained.failed.values()))}"
        )
    return f"{explained.in_words()}\n{explained.images} image(s); see {output_dir}"
