"""What a slide's maps are asked for with, what they are, and what the dense and the tiled engine share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medsd.checks import WORKERS, check_choice, check_number
from medsd.errors import ConfigError
from medsd.heatmap.additive import blurred, change_of_sums
from medsd.heatmap.grid import MapGrid, block_any, seam_score
from medsd.heatmap.label_free import LABEL_FREE
from medsd.heatmap.legend import ADDITIVE, MASK, Legend, legend
from medsd.heatmap.numbers import percent
from medsd.heatmap.value_map import Floats, ValueMap
from medsd.networks.calibrated import Smoothing, Way, calibrated
from medsd.networks.classifier import Classifier
from medsd.networks.modes import is_out_of_memory
from medsd.progress import Progress, no_progress
from medsd.saliency import smooth
from medsd.saliency.method import ClassMethod, Explanation, evidence
from medsd.saliency.neutral import EvidenceOf, NeutralReference
from medsd.saliency.registry import make_method, method_card
from medsd.slides.readers.base import Bools
from medsd.slides.reading import opened_times
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask


@dataclass(frozen=True)
class MapSettings:
    """How a slide's maps are made.

    Attributes:
        methods: saliency methods by name, see `medsd.saliency.registry`, captum's too; or "mask": the share of an
            `AimClassifier`'s masks that are open, 0 to 1. The first is the slide's saliency, the others come beside it.
            "deeplift" compares with the neutral reference and adds up to the log-odds of every tile.
        layer: hidden layer of the saliency, a name in the encoder such as "layer3"; "mask" does not use it.
        smoothing: "backward_hook" (Smooth Deep Saliency, variant B, symmetric) or "none", of methods with gradients.
        smooth_um: standard deviation of a Gaussian over the finished additive map, in um; 0 leaves it exact. The map's
            sum stays, that of a tile changes by what `SlideMaps.missed` says.
        block_px: side of what the dense engine computes at once, in pixels at the model's mpp, without the halo;
            about. None: as large as memory allows.
        way: "dense", "tiled", or "auto": dense where network and methods allow it.
        batch: tiles that the tiled engine computes at once.
        workers: how many read a slide at once, each with its own child process where slides are isolated; None for one,
            and four threads of that one where a GPU computes.
        false_lesions: regions off the target that the threshold of regions may leave on a validation slide, on average.

    Raises:
        ConfigError: a value that is none of these.
    """

    methods: Sequence[str] = (ADDITIVE,)
    layer: str = "layer3"
    smoothing: Smoothing = "backward_hook"
    smooth_um: float = 0.0
    block_px: int | None = None
    way: Way = "auto"
    batch: int = 32
    false_lesions: float = 0.5
    workers: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.methods, str) or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods={self.methods!r}: give a list of different names, such as ['{ADDITIVE}']")
        object.__setattr__(self, "methods", tuple(self.methods))
        for name in self.methods:
            if name != MASK and not method_card(name).needs_label and name not in LABEL_FREE:
                raise ConfigError(f"method '{name}': has no map of a whole slide; use one of {', '.join(LABEL_FREE)}")
            if name.startswith("captum.") and method_card(name).at_input:
                raise ConfigError(
                    f"method '{name}': explains images and no layer, whose pixels a slide's map has; use one of "
                    "captum's for layers, such as captum.LayerGradientXActivation"
                )
        check_number("smooth_um", self.smooth_um, "[0, inf)")
        check_number("false_lesions", self.false_lesions, "[0, inf)")
        check_number("batch", self.batch, "[1, inf)", whole=True)
        if self.workers is not None:
            check_number("workers", self.workers, WORKERS, whole=True)
        if self.block_px is not None:
            check_number("block_px", self.block_px, "[1, inf)", whole=True)
        for name, known in (("smoothing", Smoothing), ("way", Way)):
            check_choice(name, getattr(self, name), get_args(known))


@dataclass(frozen=True)
class SlideMaps:
    """The maps of one slide, and what was read for them.

    Attributes:
        probability: of the target.
        explanations: by their methods, in the order of `MapSettings.methods`.
        blocks: number of blocks (dense) or tiles (tiled) that the maps are made of.
        pixels_read: number of pixels read at the model's mpp, halos and overlaps included.
        seam: jump of the saliency across the borders of blocks over that beside them, 1 where nothing is to be seen;
            None where there are hardly any borders, see `seam_score`.
        moved: absolute sum of the correction to exact sums over that of the additive saliency, in tissue; None
            where there is no such map.
        missed: mean of what smoothing changes of a tile's sum, over the mean size of such a sum; None where there is no
            additive map, or no tile that is tissue all over.
        unseen: share of the tissue (0 to 1) that could not be decoded; NaN in the maps.
        lost: (height, width) bool on the saliency's grid, True where something could not be decoded; None if nothing.
    """

    probability: ValueMap
    explanations: Mapping[str, ValueMap]
    blocks: int
    pixels_read: int
    seam: float | None = None
    moved: float | None = None
    missed: float | None = None
    unseen: float = 0.0
    lost: Bools | None = None

    @property
    def saliency(self) -> ValueMap:
        """The first of the explanations."""
        return next(iter(self.explanations.values()))


@dataclass(frozen=True)
class Assembled:
    """A slide's maps on their grids, glass and all.

    Attributes:
        probability: (height, width) on the probability's grid.
        explanations: by method, on the saliency's grid.
        lost: (n, 2) rows and columns of the saliency's map pixels in which something could not be decoded.
        blocks, pixels_read: as in `SlideMaps`.
        owner: (height, width) on the probability's grid: number of the block that made it, -1 for none; None where
            blocks have no borders.
        moved: as in `SlideMaps`.
    """

    probability: Floats
    explanations: dict[str, Floats]
    lost: npt.NDArray[np.int32]
    blocks: int
    pixels_read: int
    owner: npt.NDArray[np.int32] | None = None
    moved: float | None = None


@dataclass(eq=False, repr=False)
class Engine(ABC):
    """Maps slides with one classifier.

    Args:
        classifier: put into eval mode while it runs.
        tile_px: side of the tiles it was trained on, a multiple of its stride, in pixels at `mpp`.
        mpp: micrometres per pixel that the classifier expects.
        target: number of the class to map.
        settings: how the maps are made.
        temperature: of the logits, see `medsd.networks.calibrated`; additive maps sum to the log-odds of those.
        reference: of the method "deeplift"; None until it is found, see `neutral`.
        offset: of the logits, a number a class; none for the shares of classes that the training drew.

    Raises:
        NetworkError: no such layer, no masks, or a stride that does not divide the tile.
        ConfigError: a temperature that is not positive.
    """

    classifier: Classifier
    tile_px: int
    mpp: float
    target: int = 1
    settings: MapSettings = MapSettings()
    temperature: float = 1.0
    reference: NeutralReference | None = None
    offset: Sequence[float] = ()
    _methods: dict[str, ClassMethod] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "(0, inf)", hint="1 leaves probabilities as they are")

    def map(
        self, slide: Slide, tissue: TissueMask, progress: Progress = no_progress, store: Path | None = None
    ) -> SlideMaps:
        """Probability and explanations of the slide's tissue; NaN where there is none.

        What cannot be decoded is white to the network, and NaN in the maps (its own pixels; our choice). Where memory
        runs out, half as much is computed at once, also for the slides that follow.

        Args:
            slide: read at the model's mpp.
            tissue: what holds none is not read.
            progress: shows the blocks or tiles as they are done.
            store: folder that keeps finished blocks: those in there, which the caller knows to be of this very slide,
                network and settings, are not made again. The caller removes it. None: nothing is kept.

        Raises:
            ConfigError: the method "deeplift" without a reference.
        """
        with (
            TemporaryDirectory(prefix="medsd-") if store is None else nullcontext(store) as folder,
            opened_times(slide, self.settings.workers or 1) as shared,
        ):
            while True:
                try:
                    return self._finished(slide, tissue, self.assemble(shared, tissue, Path(folder), progress))
                except RuntimeError as error:  # torch has a class of its own for devices only
                    if not is_out_of_memory(error) or not self.use_less_memory():
                        raise
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    @abstractmethod
    def assemble(self, slide: Slide, tissue: TissueMask, store: Path, progress: Progress) -> Assembled:
        """Make the blocks that the store lacks, then the maps of all; arguments as in `map`."""

    @abstractmethod
    def use_less_memory(self) -> bool:
        """Compute half as much at once from now on; False if it is the least already."""

    @abstractmethod
    def run(self, images: Tensor, method: str | None = None) -> tuple[Floats, Floats]:
        """Probability and a method's map of images (B, 3, H, W) uint8 on the classifier's device, without any placing.

        Args:
            images: of the device of the classifier.
            method: one of the settings'; None for the first.
        """

    @abstractmethod
    def neutral(self, without: Iterable[Tensor], having: Iterable[Tensor], source: str) -> NeutralReference:
        """The neutral reference of the layer, as this engine's "deeplift" takes it.

        Args:
            without, having: batches (B, 3, tile_px, tile_px) uint8 of tiles without and with the target.
            source: what they are, in words.

        Raises:
            NetworkError: no point on the line between their mean activations has log-odds 0.
        """

    @property
    @abstractmethod
    def strides(self) -> tuple[int, int]:
        """Sides of a map pixel of the probability and of the explanations, in pixels at the model's mpp."""

    @property
    @abstractmethod
    def tiles(self) -> str:
        """The way that is taken and the tiles, in words."""

    def maker_of(self, _method: str) -> Engine:
        """The engine that makes a method's map."""
        return self

    def patch_saliency(self, images: Tensor, method: str | None = None) -> Floats:
        """A method's map (B, h, w) of images (B, 3, tile_px, tile_px) uint8, in the values of the slide's map."""
        return self.run(images.to(self.classifier.device), method)[1]

    def method(self, name: str, network: nn.Module, layer: str | None, plane: bool) -> ClassMethod:
        """The saliency method of that name, of the evidence, made once."""
        if name not in self._methods:
            options: dict[str, Any] = {}
            if name == ADDITIVE:
                known = None if self.reference is None else (self.reference.layer, self.reference.extent == "plane")
                if self.reference is None or known != (self.settings.layer, plane):
                    raise ConfigError(
                        f"method '{ADDITIVE}': these weights have no neutral reference at layer "
                        f"'{self.settings.layer}' for maps that are {'dense' if plane else 'tiled'}; run the stage "
                        "'finetune' again, or choose 'gradient_x_activation'"
                    )
                vector = torch.tensor(self.reference.vector, device=self.classifier.device)
                options = {"reference": vector, "plane": True} if plane else {"reference": vector}
            method = make_method(name, network, layer, "evidence", options)
            assert isinstance(method, ClassMethod)
            self._methods[name] = method
        return self._methods[name]

    def explain(self, method: ClassMethod, images: Tensor) -> Explanation:
        """What the method says of what its network takes, gradients smoothed as the settings ask."""
        smoothed = self.settings.smoothing == "backward_hook"
        with smooth.backward_hook(self.classifier.encoder, "symmetric") if smoothed else nullcontext():
            return method.explain(images, self.target)

    def probability(self, logits: Tensor) -> Tensor:
        """Of the target (B, ...), of logits (B, K, ...)."""
        return calibrated(logits, self.temperature, self.offset).softmax(dim=1)[:, self.target]

    def evidence(self, logits: Tensor) -> Tensor:
        """Log-odds of the target (B, ...), of logits (B, K, ...): its calibrated logit above the mean of the others."""
        return evidence(calibrated(logits, self.temperature, self.offset))[:, self.target]

    def calibrated_evidence(self, evidence_of: EvidenceOf) -> EvidenceOf:
        """The evidence of a vector, calibrated, from that of the network's own logits; see `find_neutral`."""
        nothing = torch.zeros(1, len(self.classifier.classes), dtype=torch.float64)
        added = float(self.evidence(nothing))
        return lambda vector: evidence_of(vector) / self.temperature + added

    def _finished(self, slide: Slide, tissue: TissueMask, made: Assembled) -> SlideMaps:
        """The maps with their words: NaN outside the tissue, and where something could not be decoded."""
        grids = [MapGrid.over(slide, self.mpp, stride) for stride in self.strides]
        target, settings = self.classifier.classes[self.target], self.settings
        seen = [grid.tissue(tissue) for grid in grids]
        lost = None
        unseen = 0.0
        if len(made.lost):
            lost = np.zeros(grids[1].shape, bool)
            lost[tuple(made.lost.T)] = True
            unseen = float(lost[seen[1]].mean()) if seen[1].any() else 0.0
            seen[1] &= ~lost
            seen[0] &= ~block_any(lost, grids[0].stride // grids[1].stride, grids[0].shape)

        def finished(grid: MapGrid, mask: Bools, values: Floats, words: Legend) -> ValueMap:
            return ValueMap(np.where(mask, values, np.nan), grid.level0_px, grid.stride * grid.mpp, *words)

        probability = Legend("probability", target, self.tiles, "probability", "")
        explanations = {
            name: finished(
                grids[1],
                seen[1],
                values,
                legend(
                    *(name, settings.layer, settings.smoothing, target, self.maker_of(name).tiles),
                    len(self.classifier.classes),
                ),
            )
            for name, values in made.explanations.items()
        }
        missed = None
        if ADDITIVE in explanations:
            exact = explanations[ADDITIVE]
            smoothed = blurred(exact.values, settings.smooth_um / exact.mpp)
            missed = change_of_sums(exact.values, smoothed, self.tile_px // grids[1].stride)
            if settings.smooth_um:
                words = f"{exact.method}, then Gaussian of {settings.smooth_um:g} µm"
                change = "" if missed is None else f", which smoothing changes by {percent(missed)} on average"
                meaning = f"{exact.meaning.removesuffix('.')}{change}."
                explanations[ADDITIVE] = replace(exact, values=smoothed, method=words, meaning=meaning)
        first = next(iter(explanations.values())).values
        return SlideMaps(
            finished(grids[0], seen[0], made.probability, probability),
            explanations,
            made.blocks,
            made.pixels_read,
            None if made.owner is None else seam_score(first, made.owner),
            made.moved,
            missed,
            unseen,
            lost,
        )


def as_array(values: Tensor) -> Floats:
    """A tensor of any device as a float32 array."""
    array: Floats = values.detach().float().cpu().numpy()
    return array
