"""An encoder's hidden features of any part of a slide, stage after stage, each with its own small halo.

Every stage is computed where the next one needs it, over rectangles that follow the tissue; what it gives is put
together for the next. So a pixel goes through each layer little more than once, where blocks with a halo for the whole
network would go through all layers again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medsd.errors import NetworkError
from medsd.heatmap.features import free_bytes
from medsd.heatmap.partition import Rect, grown, partition
from medsd.networks.classifier import TileClassifier
from medsd.networks.geometry import ReceptiveField, check_local, measure_fields
from medsd.networks.modes import evaluating
from medsd.networks.segment import Segment, segments
from medsd.slides.readers.base import Bools

# Of the CPU: the whole process then stays below 4 GiB.
_CPU_BYTES = 2_000_000_000
# Of the first stage, whose results are by far the largest: more the CPU's allocator takes from the system page by page
# each time, which costs a fifth of the whole map, and smaller parts cost halos. Found for ResNet-18.
_CPU_TENSOR_BYTES = 96 << 20
# Of what a device has left.
_DEVICE_SHARE = 0.5
# Earlier stages have so many numbers a pixel that keeping them costs more memory than their halo.
_LEAST_STRIDE = 4
_PROBE_CELLS = 6


class Inner(NamedTuple):
    """A layer inside a stage, with the stride of the stage's output: behind it less of the map is needed.

    Attributes:
        name: in the encoder.
        before, after: its cells left of or above a rectangle of the stage's output, and right of or below it, that the
            layers behind it look at.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Stage:
    """A part of the encoder.

    Attributes:
        network: the part.
        taken, given: cells of its input (for the first: pixels) and of its output along a feature cell's side.
        halo: feature cells of the input needed on each side beyond those of the output.
        cell_bytes: memory at work for each feature cell, the input included.
        tensor_bytes: of its largest result, for each feature cell.
        inner: layers behind which the map is cut down to what is needed, in their order.
    """

    network: Segment
    taken: int
    given: int
    halo: int
    cell_bytes: float
    tensor_bytes: float
    inner: tuple[Inner, ...] = ()

    def kept(self, rect: Rect, crop: Rect) -> dict[str, tuple[slice, slice]]:
        """What is kept of the output of each inner layer, then of the stage's own, for `rect` of `crop`."""
        wanted, held = rect.times(self.given), crop.times(self.given)
        kept = {}
        for name, before, after in (*self.inner, Inner(self.network.end or "", 0, 0)):
            left, top, right, bottom = wanted
            part = Rect(left - before, top - before, right + after, bottom + after).meets(held) or held
            kept[name], held = part.within(held), part
        return kept

    def largest(self, block_px: int | None, stride: int, device: torch.device, at_once: int = 1) -> int:
        """Most feature cells to compute at once, halo included, where so many stages hold their input at a time."""
        if block_px is not None:
            return (max(1, block_px // stride) + 2 * self.halo) ** 2
        if device.type == "cuda":
            return max(1, int(_DEVICE_SHARE * free_bytes(device) / at_once / self.cell_bytes))
        most = _CPU_BYTES / at_once / self.cell_bytes
        if self.network.start is None:
            most = min(most, _CPU_TENSOR_BYTES / self.tensor_bytes)
        return max(1, int(most))

    def cost(self, device: torch.device) -> float:
        """Cells computed for each one wanted, in the largest squares of a device; infinite if none holds its halo."""
        side = math.sqrt(self.largest(None, 1, device))
        return (side / (side - 2 * self.halo)) ** 2 if side >= 2 * self.halo + 1 else math.inf


class Node(NamedTuple):
    """Features of a stage over `rect`, from its input over `crop` (feature cells), which `parts` give."""

    stage: int
    rect: Rect
    crop: Rect
    parts: tuple[Node, ...]

    def leaves(self) -> Iterator[Node]:
        """The nodes of the first stage, whose crops are read, in the order in which they are computed."""
        if self.stage == 0:
            yield self
        for part in self.parts:
            yield from part.leaves()


class Cascade:
    """The stages of a classifier's encoder up to a hidden layer, and the one behind it.

    Args:
        classifier: convolutional.
        layer: the hidden layer, a name in its encoder.
        smoothed: whether gradients behind the layer are smoothed at strided convolutions, which widens their reach.

    Attributes:
        features, hidden: what the cells of the encoder's output and of the layer can see.
        stages: from the image to the layer.
        top: from the layer to the output, with its gradient.
        channels: of what each stage gives.

    Raises:
        NetworkError: no such layer, a path leads around it, or the network has global operations.
    """

    def __init__(self, classifier: TileClassifier, layer: str, smoothed: bool) -> None:
        check_local(classifier)
        encoder = classifier.encoder
        layers = _cuts(classifier, layer)
        inside = _inside(encoder, layers)
        fields, self.features = measure_fields(classifier, [*layers, *(name for names in inside for name in names)])
        self.hidden = fields[layer]
        finer = [name for name in layers[:-1] if _LEAST_STRIDE <= fields[name].stride < self.hidden.stride]
        networks = segments(encoder, [*finer, layer])
        seen = [ReceptiveField(1, 0, 0), *(fields[name] for name in finer), self.hidden, self.features]
        stages, channels = [], []
        x = torch.zeros((1, 3, *2 * [_PROBE_CELLS * self.features.stride]), device=classifier.device)
        for network, below, above in zip(networks, seen, seen[1:], strict=False):
            last = above is self.features
            taken, given = (self.features.stride // field.stride for field in (below, above))
            # Smoothing widens a gradient by a cell of each strided layer's input: by less than a feature cell in all.
            widened = taken - 1 if last and smoothed else 0
            taken_bytes = x.numel() * x.element_size()
            with evaluating(encoder), torch.set_grad_enabled(last), _Allocated() as memory:
                x = network(x.requires_grad_(last))
            channels.append(x.shape[1])
            halo, at_work = _halo(below, above, taken, widened), memory.at_work(taken_bytes, last)
            # Of a stage whose own end was no cut, layers of another stride.
            names = inside[layers.index(network.end)] if network.end else inside[-1]
            inner = tuple(
                Inner(name, (field.first - above.first) // field.stride, (above.last - field.last) // field.stride)
                for name, field in ((name, fields[name]) for name in names)
                if field.stride == above.stride
            )
            stages.append(Stage(network, taken, given, halo, at_work, memory.most / _PROBE_CELLS**2, inner))
        *self.stages, self.top = stages
        *self.channels, _ = channels
        self.classifier = classifier
        # The CPU's convolutions of large maps read NHWC: half as long in the first stage. Nothing is gained on a GPU.
        self._layout = torch.contiguous_format if classifier.device.type == "cuda" else torch.channels_last

    def plan(self, needed: Bools, block_px: int | None) -> list[Node]:
        """What has to be computed for the hidden features of the needed cells.

        Args:
            needed: (height, width) bool of the canvas's feature cells.
            block_px: as in `MapSettings`.
        """
        size = needed.shape[1], needed.shape[0]
        return self._plan(len(self.stages) - 1, needed, Rect(0, 0, *size), size, block_px)

    def _plan(self, number: int, needed: Bools, frame: Rect, size: tuple[int, int], block_px: int | None) -> list[Node]:
        stage = self.stages[number]
        largest = stage.largest(block_px, self.features.stride, self.classifier.device, len(self.stages))
        # What a rectangle needs is computed for it alone, so its halo costs as far as the image.
        reach = sum(below.halo for below in self.stages[: number + 1])
        nodes = []
        wider = (math.isqrt(largest) + 2 * (reach - stage.halo)) ** 2
        for found in partition(needed, reach, wider):
            rect = found.moved(frame.left, frame.top)
            crop = rect.grown(stage.halo, size)
            below: list[Node] = []
            if number:
                wanted = np.zeros((crop.height, crop.width), bool)
                wanted[rect.within(crop)] = needed[rect.within(frame)]
                below = self._plan(number - 1, grown(wanted, stage.halo), crop, size, block_px)
            nodes.append(Node(number, rect, crop, tuple(below)))
        return nodes

    def compute(self, node: Node, images: Iterator[Tensor]) -> Tensor:
        """Hidden features (1, C, h, w) of a node; `images` gives (1, 3, H, W) uint8 of its leaves' crops, in order."""
        stage = self.stages[node.stage]
        if node.stage == 0:
            x = self.classifier.normalise(next(images).to(self.classifier.device, non_blocking=True))
            x = x.contiguous(memory_format=self._layout)
        else:
            crop = node.crop.times(stage.taken)
            shape = 1, self.channels[node.stage - 1], crop.height, crop.width
            x = torch.empty(shape, device=self.classifier.device, memory_format=self._layout).zero_()
            for part in node.parts:
                x[..., *part.rect.times(stage.taken).within(crop)] = self.compute(part, images)
        features: Tensor = stage.network(x, stage.kept(node.rect, node.crop))
        return features

    def whole(self, images: Tensor) -> Tensor:
        """Hidden features (B, C, h, w) of whole images (B, 3, H, W) uint8."""
        x: Tensor = self.classifier.normalise(images)
        for stage in self.stages:
            x = stage.network(x)
        return x


def _cuts(classifier: TileClassifier, layer: str) -> list[str]:
    """The encoder's stages below the layer where it can be cut, then the layer."""
    info: list[dict[str, Any]] = list(getattr(classifier.encoder, "feature_info", None) or [])
    names = [name for name, _ in classifier.encoder.named_modules()]
    order = {name: number for number, name in enumerate(names)}
    stages = [entry["module"] for entry in info if isinstance(entry.get("module"), str)]
    below = [name for name in stages if name in order and layer in order and order[name] < order[layer]]
    below = [name for name in below if not layer.startswith(f"{name}.")]
    try:
        segments(classifier.encoder, [*below, layer])
    except NetworkError:
        if not below:
            raise
        segments(classifier.encoder, [layer])
        return [layer]
    return [*below, layer]


def _inside(encoder: nn.Module, cuts: list[str]) -> list[list[str]]:
    """Layers inside each stage behind which the map can be cut down: what comes just before it, and its blocks."""
    info: list[dict[str, Any]] = list(getattr(encoder, "feature_info", None) or [])
    last = info[-1].get("module") if info else None
    ends = [*cuts, str(last)] if last in dict(encoder.named_modules()) and last not in cuts else cuts
    found = []
    for end in ends:
        parent, _, own = end.rpartition(".")
        siblings = [name for name, _ in encoder.get_submodule(parent).named_children()]
        before = [f"{parent}.{name}".lstrip(".") for name in siblings[: siblings.index(own)][-1:]]
        rows = {name: part for name, part in encoder.get_submodule(end).named_modules(prefix=end) if _is_row(part)}
        shortest = min(rows, key=len, default="")
        blocks = [f"{shortest}.{name}" for name, _ in rows[shortest].named_children()][:-1] if rows else []
        found.append([name for name in (*before, *blocks) if name not in ends])
    found += [[]] * (len(cuts) + 1 - len(ends))
    try:
        segments(
            encoder, [name for names, end in zip(found, [*cuts, ""], strict=True) for name in (*names, end) if name]
        )
    except NetworkError:
        return [[] for _ in found]
    return found


def _is_row(part: nn.Module) -> bool:
    return isinstance(part, nn.Sequential) and len(part) > 1


def _halo(below: ReceptiveField, above: ReceptiveField, taken: int, widened: int) -> int:
    """Feature cells of the input on each side that the output of a rectangle needs."""
    ratio = above.stride // below.stride
    first, last = ((a - b) // below.stride for a, b in ((above.first, below.first), (above.last, below.last)))
    return max(0, math.ceil((widened - first) / taken), math.ceil((last - ratio + 1 + widened) / taken))


class _Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of what is computed inside the block; views and what is computed in place take none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                size = tensor.numel() * tensor.element_size()
                self.most = max(self.most, size)
                self.total += size if _storage(tensor) not in given else 0
        return output

    def at_work(self, taken: int, kept: bool) -> float:
        """Bytes for each feature cell, from those of the input.

        Measured on the CPU for ResNet-18: with a graph for DeepLift 1.2 times all results at most; without one the
        input, a copy of it in another layout, and twice the largest result.
        """
        return (1.4 * self.total if kept else 2 * taken + 2.2 * self.most) / _PROBE_CELLS**2


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
