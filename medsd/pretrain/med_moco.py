"""Med-MoCo (Hassanpour et al., ISBI 2024, arXiv 2402.14611): MoCo v2 with local features and feature decorrelation.

The paper's equations are not public; what is filled in is told where it is done (`local`, `whitening`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.errors import NetworkError
from medsd.networks.classifier import Classifier, Normalise
from medsd.networks.geometry import measure_fields
from medsd.networks.modes import evaluating, map_of_layer, recorded
from medsd.objectives.decorrelation import decorrelation_loss
from medsd.pretrain.collapse import effective_rank
from medsd.pretrain.contrast import follow, info_nce, momentum_at, shuffle_ranks, unshuffle_ranks
from medsd.pretrain.local import left_edge_vectors, region_contrast, region_vectors, shared_regions
from medsd.pretrain.queue import UNKNOWN_GROUP, KeyQueue
from medsd.pretrain.whitening import ShuffledWhitening, put_iter_norm, without_iter_norm

logger = logging.getLogger(__name__)

Decorrelation = Literal["none", "w2", "w1", "corr"]
Reading = Literal["c", "b"]

_PROBE_PX = 64


@dataclass(frozen=True)
class MedMoCoSettings:
    """What is learnt from two views.

    Attributes:
        dim: channels of queries and keys.
        queue: keys of earlier batches; a multiple of the batch, best at most a quarter of the data set.
        temperature: of both contrasts.
        momentum: the key encoder's at the start, from which it rises to 1.
        local: weight of the local term, 0 for none.
        regions: cells along a side of what two views share (reading "b": squares down the left edge).
        local_layer: the encoder's layer whose map the regions are taken from, by timm's name such as "layer3"; None for
            the last map, whitened where the features are.
        least_overlap: share of the smaller view that both must show, or the image has no local term.
        decorrelation: "w2" whitens the last map before the projector and leaves the encoder as it is, "w1" puts
            IterNorm in its last block, "corr" adds `decorrelation_loss` of the pooled features, all channels together:
            their mean squared correlation, and a hinge that pushes deviations below 1 upwards (our choice: the one that
            acts on what is kept), "none".
        penalty: weight of "corr".
        group_size, eps: of "w2", see `ShuffledWhitening`.
        separate_slides: keys of the same slide (or volume) are no negatives: what lies near looks alike, but then the
            stain of a slide may be enough to tell keys apart.
        reading: of the local term, see `medsd.pretrain.local`.

    Raises:
        ConfigError: a value is out of its range.
    """

    dim: int = 128
    queue: int = 1024
    temperature: float = 0.2
    momentum: float = 0.99
    local: float = 0.5
    regions: int = 3
    local_layer: str | None = None
    least_overlap: float = 0.2
    decorrelation: Decorrelation = "w2"
    penalty: float = 1.0
    group_size: int = 64
    eps: float = 1e-3
    separate_slides: bool = False
    reading: Reading = "c"

    def __post_init__(self) -> None:
        check_number("dim", self.dim, "[1, inf)", whole=True)
        check_number("queue", self.queue, "[1, inf)", whole=True)
        check_number("temperature", self.temperature, "(0, inf)")
        check_number("momentum", self.momentum, "[0, 1)")
        check_number("local", self.local, "[0, inf)")
        check_number("regions", self.regions, "[2, inf)", whole=True)
        check_number("least_overlap", self.least_overlap, "[0, 1]")
        check_choice("decorrelation", self.decorrelation, get_args(Decorrelation))
        check_number("penalty", self.penalty, "[0, inf)")
        ShuffledWhitening(self.group_size, self.eps)
        check_choice("reading", self.reading, get_args(Reading))


@dataclass(frozen=True)
class PretrainTerms:
    """The loss of one batch.

    Attributes:
        total: the weighted sum to call backward on, a scalar with the graph.
        parts: scalars without graph: `contrast`, `local` where it has a weight, `correlation` of the penalty,
            `accuracy` (queries nearest to their own key) and `rank` (effective rank of the batch's pooled features,
            before whitening; below the batch).
        keys: (B, dim) of unit length, without graph, to enqueue after the step.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    keys: Tensor


class MedMoCo(nn.Module):
    """A query encoder that learns, its slow twin that gives keys, and the queue of earlier keys.

    One step is `follow`, one or more forward passes with their backward passes, and `enqueue` of all their keys: so a
    batch in pieces has the queue and the key encoder of one step. It is used in training mode, in which each encoder
    runs once a pass; the key encoder's BatchNorms see their own batches, dealt out anew over the processes. Inside
    `DistributedDataParallel` unused parameters must be looked for.

    Args:
        encoder: gives a map (B, d, h, w), as `create_encoder` makes it; taken over, not copied.
        settings: what is learnt.
        normalise: makes the encoder's input; None for ImageNet's mean and deviation.

    Attributes:
        encoder, projector: the query's; the projector is Linear, ReLU, Linear as in MoCo v2.
        normalise: images (B, 3, S, S) uint8 as the encoder's float input.

    Raises:
        NetworkError: the encoder gives no map, has no such layer, or none that IterNorm can replace.

    Example:
        >>> from medsd.networks.classifier import create_encoder
        >>> from medsd.pretrain.views import ViewSettings, draw_views
        >>> encoder, _ = create_encoder("test_resnet", pretrained=False)
        >>> moco = MedMoCo(encoder, MedMoCoSettings(queue=16, group_size=8))
        >>> tiles = torch.randint(256, (4, 3, 96, 96), dtype=torch.uint8)
        >>> draws = torch.Generator().manual_seed(0)
        >>> one, other = (draw_views(tiles, draws, ViewSettings(size_px=96)) for _ in range(2))
        >>> moco.follow(progress=0.0)
        >>> views = moco.normalise(one.images), moco.normalise(other.images)
        >>> slides = torch.tensor([0, 0, 1, 1])
        >>> terms = moco(*views, one.to_source, other.to_source, slides, draws)
        >>> terms.total.backward()
        >>> moco.enqueue(terms.keys, slides)
    """

    def __init__(self, encoder: nn.Module, settings: MedMoCoSettings, normalise: Normalise | None = None) -> None:
        super().__init__()
        self.settings, self.encoder, self.normalise = settings, encoder, normalise or Normalise()
        self.feature_dim, local_dim = self._probed()
        aligned = settings.local > 0 and settings.reading == "c"
        self._centre_px = _measured_centre(encoder, settings.local_layer) if aligned else None
        self._whitening = ShuffledWhitening(settings.group_size, settings.eps)
        self._iter_norm = put_iter_norm(encoder) if settings.decorrelation == "w1" else None
        self.projector = _projector(self.feature_dim, settings.dim)
        self.local_projector = _projector(local_dim, settings.dim) if aligned else nn.Identity()
        self.key_encoder, self.key_projector, self.key_local_projector = (
            copy.deepcopy(part).requires_grad_(False) for part in (encoder, self.projector, self.local_projector)
        )
        self.queue = KeyQueue(settings.dim, settings.queue)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        first_to_source: Tensor,
        second_to_source: Tensor,
        groups: Tensor,
        generator: torch.Generator,
    ) -> PretrainTerms:
        """The loss of one batch of view pairs; neither the key encoder's weights nor the queue are changed.

        Args:
            first, second: (B, 3, S, S) float views as `normalise` gives them: queries and keys.
            first_to_source, second_to_source: (B, 2, 3) float64 of `Views`, on any device, best on the CPU.
            groups: (B,) int64, numbers of the slides or volumes, -1 where unknown.
            generator: draws orders, on the CPU; the first process's draws count on all.

        Raises:
            TrainingError: a batch too small to whiten, or features that are not finite.
            ConfigError: maps too small for the squares of reading "b".
        """
        settings = self.settings
        order = torch.randperm(self.feature_dim, generator=generator)
        maps = self._maps(self.encoder, first)
        pooled = _pooled(maps[0])
        rank = _batch_rank(pooled.detach())
        maps[0] = self._whitened(maps[0], order)
        q = _unit(self.projector(_pooled(maps[0])))
        with torch.no_grad():
            dealt, back = shuffle_ranks(second, generator)
            key_maps = [unshuffle_ranks(each, back) for each in self._maps(self.key_encoder, dealt)]
            key_maps[0] = self._whitened(key_maps[0], order)
            k = _unit(self.key_projector(_pooled(key_maps[0])))
        if not settings.separate_slides:
            groups = torch.full_like(groups, UNKNOWN_GROUP)
        excluded = self.queue.excluded(groups.to(q.device))
        total, accuracy = info_nce(q, k, self.queue.keys, settings.temperature, excluded)
        parts = {"contrast": total.detach(), "accuracy": accuracy, "rank": rank}
        if settings.decorrelation == "corr":
            decorrelation = decorrelation_loss(pooled, "corr")
            total = total + settings.penalty * decorrelation
            parts["decorrelation"] = decorrelation.detach()
        if settings.local:
            local = self._local(maps[-1], key_maps[-1], first_to_source, second_to_source, size_px=first.shape[-1])
            total = total + settings.local * local
            parts["local"] = local.detach()
        return PretrainTerms(total, parts, k)

    def follow(self, progress: float) -> None:
        """Move the key encoder and its projectors towards the query's; once a step, before its first pass.

        Args:
            progress: share of the training that is done, 0 to 1; see `momentum_at`.
        """
        momentum = momentum_at(progress, self.settings.momentum)
        follow(self.key_encoder, self.encoder, momentum)
        follow(self.key_projector, self.projector, momentum)
        follow(self.key_local_projector, self.local_projector, momentum)

    def enqueue(self, keys: Tensor, groups: Tensor) -> None:
        """Put a step's keys (B, dim) of groups (B,) into the queue, after its last backward pass.

        Raises:
            ConfigError: the queue's size is no multiple of the batch of all processes.
        """
        self.queue.enqueue(keys, groups.to(keys.device))

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, d), before any whitening, and embeddings (B, dim) of unit length of images (B, 3, H, W).

        For eval mode. The projector of "w2" knows whitened features alone, so what it is given is whitened by this
        batch's own moments, in groups of neighbouring channels: an embedding depends a little on its batch.
        """
        features = self._maps(self.encoder, x)[0]
        whitened = self._whitened(features, torch.arange(self.feature_dim))
        return _pooled(features), _unit(self.projector(_pooled(whitened)))

    def plain_encoder(self) -> nn.Module:
        """A copy of the query encoder as a plain timm network; the same function in evaluation mode."""
        if self._iter_norm is None:
            return copy.deepcopy(self.encoder)
        return without_iter_norm(self.encoder, self._iter_norm)

    def _maps(self, encoder: nn.Module, x: Tensor) -> list[Tensor]:
        """The last map and, where the local term takes another layer's, that one."""
        layer = self.settings.local_layer
        if layer is None or not self.settings.local:
            return [encoder(x)]
        with recorded(encoder, layer) as outputs:
            features: Tensor = encoder(x)
        return [features, *outputs]

    def _whitened(self, features: Tensor, order: Tensor) -> Tensor:
        return self._whitening(features, order) if self.settings.decorrelation == "w2" else features

    def _local(
        self, first: Tensor, second: Tensor, first_to_source: Tensor, second_to_source: Tensor, size_px: int
    ) -> Tensor:
        settings = self.settings
        if settings.reading == "b":
            vectors, keys = (left_edge_vectors(maps, settings.regions) for maps in (first, second))
            kept = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        else:
            shared = shared_regions(
                first_to_source, second_to_source, size_px, settings.regions, settings.least_overlap
            )
            vectors = self.local_projector(region_vectors(first, shared.first, size_px, self._centre_px))
            with torch.no_grad():
                keys = self.key_local_projector(region_vectors(second, shared.second, size_px, self._centre_px))
            kept = shared.kept
        return region_contrast(vectors, keys, kept, settings.temperature)

    def _probed(self) -> tuple[int, int]:
        """Channels of the last map and of the local one."""
        images = torch.zeros(1, 3, _PROBE_PX, 2 * _PROBE_PX).to(next(self.encoder.parameters()))
        with evaluating(self.encoder), torch.no_grad():
            maps = self._maps(self.encoder, images)
        checked = [map_of_layer("encoder", each, images) for each in maps]
        return checked[0].shape[1], checked[-1].shape[1]


class _Encoder(Classifier):
    """An encoder as what `measure_fields` takes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(type(encoder).__name__, ())
        self.encoder = encoder

    def feature_map(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features


def _measured_centre(encoder: nn.Module, layer: str | None) -> float | None:
    """The middle of what map cell 0 can see of the image, None for the middle of its own stride.

    Where paths are weighed (`measure_effective_field`) cells of ResNet-D look elsewhere, but regions that are placed so
    were worth less (docs/evidence.md).
    """
    try:
        fields, features = measure_fields(_Encoder(encoder), [] if layer is None else [layer])
    except NetworkError as error:
        logger.warning("local regions: map cells are taken to tile the view evenly, since %s", error)
        return None
    return (features if layer is None else fields[layer]).centre


def _projector(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, dim))


def _pooled(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3))


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=1)


def _batch_rank(features: Tensor) -> Tensor:
    """Effective rank of a batch's features, by the Gram matrix of its samples."""
    unit = _unit(features)
    with torch.autocast(unit.device.type, enabled=False):
        centred = unit - unit.mean(dim=0)
        # Values that are not finite have no eigenvalues; the step refuses their loss in words.
        return effective_rank(torch.linalg.eigvalsh((centred @ centred.mT).nan_to_num()).clamp(min=0))
