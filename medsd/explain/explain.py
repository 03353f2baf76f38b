"""Pictures on disk and a weights file become maps side by side, with their measures."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from medsd.errors import ChannelsCancelError, ConfigError, DatasetError, MedsdError
from medsd.evaluate.measures import MeasureSettings, agreement, measure_maps
from medsd.explain.explained import ExplainedImage, ExplainedImages
from medsd.explain.images import find_images, image_names, read_image, read_png_mask
from medsd.explain.model import Model, load_model
from medsd.explain.outputs import Summary, write_outputs
from medsd.explain.reference import found_reference, known_reference
from medsd.explain.settings import CLASS_METHODS, LABEL_FREE_METHODS, MEASURED, ExplainSettings
from medsd.explain.sheet import small_picture
from medsd.explain.surrogates import load_surrogate
from medsd.files import make_folder
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.networks.aim import AimClassifier
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress
from medsd.saliency import smooth
from medsd.saliency.method import Method, Target, check_logits, explained_output, finite, targets_of
from medsd.saliency.neutral import NeutralReference
from medsd.saliency.registry import check_label_free, make_method
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.readers.damage import UNFORESEEN, in_one_line

logger = logging.getLogger(__name__)

# Pixels explained in one batch (16 of 224 px), and pixels that wait for others of their size.
_BATCH_PX = 16 * 224 * 224
_WAITING_PX = 2**26
_MOST_IN_BATCH = 64
_DEFAULT = ExplainSettings()


@freed_memory_kept()
def explain_images(
    places: Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    settings: ExplainSettings = _DEFAULT,
    masks: str | Path | None = None,
    device: torch.device | str | None = "cpu",
    progress: Progress = no_progress,
) -> Summary:
    """Explain images with several methods; leave sheets, tables and maps in `out` (see `medsd.explain.outputs`).

    An image that cannot be read is told and left out, and the others are done. Maps are made under the smoothing;
    predictions and measures are the network's own. Images of one size share a batch, which changes no map.

    "deeplift" compares with a neutral reference: the weights' own, or, where they have none of that layer, one found
    from the images, which the network must answer in either way. Its maps are in log-odds as those of slides, at the
    weights' temperature and prevalence; what they lack of the image's log-odds is told for each image.

    Args:
        places: image files, and folders of them.
        weights: a classifier's or encoder's .safetensors.
        out: folder to write to; images in it are not explained.
        settings: methods, layer, class, smoothing.
        masks: folder of PNGs named as the images (0 is background), which localisation is measured with.
        device: where the network runs; None for the first GPU, or the CPU where there is none.
        progress: shows the images.

    Raises:
        DatasetError: no images, none that can be read, masks of none of them, or one mask of several.
        WeightsError: weights that cannot be used.
        ConfigError: no such method, class or device, a method that needs a class of an encoder, or "deeplift" without
            a reference and images to find one from.
        NetworkError: no such layer, a method that the network does not allow, or no reference of log-odds 0.
        OutputError: `out` cannot be written to.
    """
    folder, left_out = Path(out), [Path(path) for path in (out, masks) if path is not None]
    paths = find_images([Path(place) for place in places], left_out)
    model = load_model(weights, device)
    settings, smoothing = _with_methods(model, settings), _smoothing(model, settings)
    found_masks = {} if masks is None else _find_masks(Path(masks), paths)
    done: dict[str, ExplainedImage] = {}
    failed: dict[str, str] = {}
    reference = None
    if ADDITIVE in settings.methods:
        batches = (model.input(_pixels(batch)) for batch in _batches(paths, {}, model.smallest_px, failed, progress))
        reference = known_reference(model, settings) or found_reference(model, settings, batches)
    explainer = _Explainer(model, _methods(model, settings, reference), settings, smoothing, reference)
    make_folder(folder)
    for batch in _batches(paths, found_masks, model.smallest_px, failed, progress):
        done |= {image.name: image for image in explainer.explain(batch)}
    if not done:
        raise DatasetError(f"none of {len(paths)} image(s) can be explained; the first: {next(iter(failed.values()))}")
    images = tuple(done[name] for name in image_names(paths) if name in done)
    return write_outputs(folder, ExplainedImages(model, settings, images, failed, masks is not None, reference))


@dataclass(frozen=True)
class _Loaded:
    """An image in memory, with its mask if it has one."""

    name: str
    pixels: RGB
    mask: Bools | None


@dataclass(frozen=True, eq=False)
class _Masks:
    """A `Method`: the mean of an AIM network's masks, 0 to 1, at the size of its finest stage, whatever the class."""

    network: nn.Module
    layer: str | None = None

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        with evaluating(self.network), torch.no_grad():
            return finite(cast(AimClassifier, self.network).open_share(x)[1], MASK)


@dataclass(frozen=True)
class _Explainer:
    model: Model
    methods: dict[str, Method]
    settings: ExplainSettings
    smoothing: Callable[[], AbstractContextManager[None]]
    reference: NeutralReference | None

    def explain(self, batch: Sequence[_Loaded]) -> list[ExplainedImage]:
        """Maps and measures of images of one size."""
        x = self.model.input(_pixels(batch))
        predicted, probability, target, explained = self._predict(x)
        with self.smoothing():
            maps = {name: method(x, target) for name, method in self.methods.items()}
        unexplained = None
        if self.reference is not None and explained is not None:
            # The sum over channels and not their mean, at the temperature, as of slides.
            maps[ADDITIVE] = maps[ADDITIVE] * (len(self.reference.vector) / self.model.temperature)
            unexplained = explained - maps[ADDITIVE].sum(dim=(1, 2))
        measured = self._measure(x, target, maps, batch)
        alike = agreement(maps).cpu().numpy()
        return [
            ExplainedImage(
                name=image.name,
                size_px=image.pixels.shape[:2],
                picture=small_picture(image.pixels),
                region=None if image.mask is None else small_picture(image.mask.view(np.uint8), Resampling.NEAREST) > 0,
                predicted="" if predicted is None else self.model.classes[int(predicted[row])],
                explained="" if target is None else self.model.classes[int(target[row])],
                probability=math.nan if probability is None else float(probability[row]),
                output=math.nan if explained is None else float(explained[row]),
                unexplained=math.nan if unexplained is None else float(unexplained[row]),
                maps={name: values[row].cpu().numpy() for name, values in maps.items()},
                measures={
                    method: {name: float(values[row]) for name, values in of_method.items()}
                    for method, of_method in measured.items()
                },
                agreement=alike[row],
            )
            for row, image in enumerate(batch)
        ]

    def _predict(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Predicted classes (B,), their probability, the classes to explain, their output; None for an encoder."""
        if not self.model.classes:
            return None, None, None, None
        with evaluating(self.model.network), torch.no_grad():
            logits = self.model.calibrated(check_logits(self.model.network(x), len(x)))
        probability, predicted = logits.softmax(dim=1).max(dim=1)
        target = targets_of(logits, self.model.target(self.settings.target))
        return predicted, probability, target, explained_output(logits, target, self.settings.output)

    def _measure(
        self, x: Tensor, target: Tensor | None, maps: dict[str, Tensor], batch: Sequence[_Loaded]
    ) -> dict[str, dict[str, Tensor]]:
        names = MEASURED if self.settings.measured else ()
        region = None
        if any(image.mask is not None for image in batch):
            # An image without a mask has an empty one, which nothing is measured with.
            empty = np.zeros(x.shape[2:], bool)
            masks = [empty if image.mask is None else image.mask for image in batch]
            region = torch.from_numpy(np.stack(masks)).to(x.device)
        at_once = max(1, 4 * _BATCH_PX // (x.shape[2] * x.shape[3]))
        asked = MeasureSettings(batch_size=at_once, seed=self.settings.seed)
        x = x.contiguous(memory_format=torch.channels_last)  # the faster for convolutions, on CPUs too
        return measure_maps(self.model.network, x, target, maps, names, region, asked).of


def _with_methods(model: Model, settings: ExplainSettings) -> ExplainSettings:
    """The settings with the methods that are used, which fit the network."""
    names = settings.methods or LABEL_FREE_METHODS
    if model.classes and not settings.methods:
        names = CLASS_METHODS if known_reference(model, settings) is None else (ADDITIVE, *CLASS_METHODS)
        names = (*names, MASK) if _masks_itself(model) else names
    model.target(settings.target)
    if not model.classes:
        check_label_free(names, model.path)
    asked, settings = settings.methods, replace(settings, methods=tuple(names))
    methods = _methods(model, settings, None)
    return settings if asked or not model.card else replace(settings, methods=_left(model, methods, model.card.tile_px))


def _left(model: Model, methods: dict[str, Method], side_px: int) -> tuple[str, ...]:
    """The methods that nobody asked for by name, without those whose channels cancel at the layer, which is told.

    It is so of every image or of none, and tried on noise.
    """
    noise = torch.randint(256, (1, 3, side_px, side_px), generator=torch.Generator().manual_seed(0))
    x, left = model.input(noise.to(torch.uint8)), []
    for name, method in methods.items():
        try:
            if name in CLASS_METHODS:
                method(x)
            left.append(name)
        except ChannelsCancelError as reason:
            logger.warning("method '%s' is left out: %s", name, reason)
    return tuple(left)


def _methods(model: Model, settings: ExplainSettings, reference: NeutralReference | None) -> dict[str, Method]:
    layer = model.layer(settings.layer)
    vector = None if reference is None else torch.tensor(reference.vector, device=model.device)
    if MASK in settings.methods and not _masks_itself(model):
        raise ConfigError(f"method '{MASK}': {model.path} is no network that masks itself (AIM); leave it out")
    return {
        name: _Masks(model.network)
        if name == MASK
        else make_method(name, model.network, layer, settings.output, reference=vector if name == ADDITIVE else None)
        for name in settings.methods
    }


def _masks_itself(model: Model) -> bool:
    return isinstance(model.network, AimClassifier) and bool(model.network.options["masking"])


def _smoothing(model: Model, settings: ExplainSettings) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context in which maps are made; entered once here, so that what does not fit is told first."""
    made: Callable[[], AbstractContextManager[None]] = nullcontext
    if settings.surrogate is not None:
        trained, _ = load_surrogate(settings.surrogate, model.sha256, model.device)
        made = partial(smooth.surrogate, model.network, trained)
    elif settings.smoothing != "none":
        hook = smooth.backward_hook if settings.smoothing == "backward_hook" else smooth.forward_hook
        made = partial(hook, model.encoder, "symmetric")
    with made():
        return made


def _find_masks(folder: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    """The mask of each image that has one."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder of masks; check the path")
    found = {path: folder / f"{path.stem}.png" for path in paths}
    found = {path: mask for path, mask in found.items() if mask.is_file()}
    for mask, count in Counter(found.values()).items():
        if count > 1:
            raise DatasetError(f"{mask}: the mask of {count} images of that name; give their folders one at a time")
    if not found:
        raise DatasetError(f"{folder}: no mask of any image; name them as the images, such as {paths[0].stem}.png")
    return found


def _pixels(batch: Sequence[_Loaded]) -> Tensor:
    """(B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([image.pixels for image in batch])).permute(0, 3, 1, 2)


def _batches(
    paths: Sequence[Path], masks: dict[Path, Path], smallest_px: int, failed: dict[str, str], progress: Progress
) -> Iterator[list[_Loaded]]:
    """Images of one size at a time; what cannot be read goes into `failed`, and is told when it is new there."""
    waiting: dict[tuple[int, ...], list[_Loaded]] = {}
    waiting_px = 0
    known = set(failed)
    for name, path in progress(list(zip(image_names(paths), paths, strict=True)), len(paths), "image"):
        try:
            pixels = read_image(path, smallest_px)
            mask = read_png_mask(masks[path], *pixels.shape[:2]) if path in masks else None
        except MedsdError as error:
            failed[name] = str(error)
        except UNFORESEEN as error:
            failed[name] = in_one_line(path, error)
        else:
            size = pixels.shape[:2]
            same = waiting.setdefault(size, [])
            same.append(_Loaded(name, pixels, mask))
            waiting_px += size[0] * size[1]
            if len(same) >= min(_MOST_IN_BATCH, max(1, _BATCH_PX // (size[0] * size[1]))):
                waiting_px -= len(same) * size[0] * size[1]
                yield waiting.pop(size)
            elif waiting_px > _WAITING_PX:
                yield from waiting.values()
                waiting, waiting_px = {}, 0
        if name in failed.keys() - known:
            logger.error("%s", failed[name])
    yield from waiting.values()
