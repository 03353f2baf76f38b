"""The neutral reference of a layer: one activation vector that speaks neither for the target nor against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import evaluating, full_name, recorded
from medsd.saliency.hidden import tapped
from medsd.saliency.method import Output, Target, check_logits, evidence, explained_output, targets_of
from medsd.saliency.plane import plane_output

_FIRST, _LAST, _STEPS = -2.0, 3.0, 50  # the line that is scanned, 0 against and 1 for the target
# Beside it: steps, and the most that one changes a channel, over its mean size.
_NEWTON, _LARGEST_CHANGE, _HALVED = 50, 0.5, 6


@dataclass(frozen=True)
class NeutralReference:
    """A layer's reference of log-odds 0 (our choice), plain numbers as a model card keeps them.

    Attributes:
        layer: its name in the network.
        vector: one number a channel.
        log_odds: of the uniform map after the search, 0 but for rounding.
        position: on the line from the mean of tissue against the target (0) to that of tissue for it (1); of a vector
            beside the line that of the point where the search left it.
        extent: "plane", uniform without end; or "tile", uniform over the layer's map of one tile, with its borders.
        source: what it was found from, in words.
        beside: how far the vector lies beside the line, the root mean square over channels of the relative change; 0
            for one on it.
    """

    layer: str
    vector: tuple[float, ...]
    log_odds: float
    position: float
    extent: Literal["plane", "tile"]
    source: str
    beside: float = 0.0


def neutral_of(network: nn.Module, layer: str | None) -> NeutralReference:
    """The network's own neutral reference of a layer: its attribute `neutral`, as `load_classifier` sets it.

    Raises:
        ConfigError: it has none, or one of another layer.
    """
    kept = getattr(network, "neutral", None)
    if kept is None:
        raise ConfigError(
            "reference 'neutral': the network has none; load weights that were calibrated with 'deeplift', or find one "
            "with medsd.saliency.neutral.neutral_from_images"
        )
    neutral = NeutralReference(**kept) if isinstance(kept, Mapping) else kept
    if layer is None or _name(network, neutral.layer) != _name(network, layer):
        raise ConfigError(
            f"reference 'neutral': the network's is of layer '{neutral.layer}', not '{layer or 'input'}'; choose that "
            "layer, or find another reference with medsd.saliency.neutral.neutral_from_images"
        )
    return neutral


def _name(network: nn.Module, layer: str) -> str:
    return full_name(network, layer, "encoder")


EvidenceOf = Callable[[Tensor], Tensor]
"""Log-odds (a scalar) of the uniform map of a vector (C,), differentiable in it."""


@dataclass(frozen=True)
class NeutralPoint:
    """A vector (C,) float64 whose evidence is 0, the evidence, and where it lies; see `NeutralReference`."""

    vector: Tensor
    log_odds: float
    position: float
    beside: float = 0.0


def find_neutral(evidence_of: EvidenceOf, low: Tensor, high: Tensor) -> NeutralPoint:
    """The vector whose evidence is 0: on a line, nearest the middle of the two that span it; else beside the line.

    Uniform maps of early layers may have no texture that a network takes for the target, and then no point of the line
    is neutral. The search goes on from its most neutral point by Newton's steps of least relative change,
    v - f(v) m^2 g / (g . m^2 g), g the gradient of the evidence f and m the mean size of each channel (our choice).

    Args:
        evidence_of: log-odds of the uniform map of a vector (C,).
        low, high: (C,) means of what speaks against and for the target; the line is searched from -2 to 3.

    Raises:
        NetworkError: the evidence keeps its sign on the line, and beside it as far as the search goes.
    """
    low, high = low.detach().double(), high.detach().double()
    values: dict[float, float] = {}

    def at(place: float) -> float:
        if place not in values:
            with torch.no_grad():
                values[place] = float(evidence_of(low + place * (high - low)))
        return values[place]

    steps = [_FIRST + (_LAST - _FIRST) * step / _STEPS for step in range(_STEPS + 1)]
    # From the middle of the two outwards, for a point beyond them is seldom needed.
    for left, right in sorted(pairwise(steps), key=lambda ends: abs(sum(ends) - 1)):
        if at(left) * at(right) <= 0 and at(left) != at(right):
            brentq(at, left, right, xtol=1e-9)
            place = min(values, key=lambda it: abs(values[it]))
            return NeutralPoint(low + place * (high - low), values[place], place)
    place = min(values, key=lambda it: (abs(values[it]), it))
    size = (low.abs() + high.abs()) / 2
    found = _beside(evidence_of, low + place * (high - low), size)
    if found is None:
        raise NetworkError(
            f"neutral reference: the evidence is {min(values.values()):.3g} to {max(values.values()):.3g} from tissue "
            "against the target to tissue for it and beyond, and not 0 near that line; check that the network tells "
            "the classes apart, or choose a method without a reference"
        )
    change = (found[0] - low - place * (high - low))[size > 0] / size[size > 0]
    return NeutralPoint(*found, place, float(change.square().mean().sqrt()))


def _beside(evidence_of: EvidenceOf, vector: Tensor, size: Tensor) -> tuple[Tensor, float] | None:
    """The nearest vector of evidence 0 that Newton's steps find, and its evidence; None where they find none."""

    def step(start: Tensor) -> tuple[float, Tensor]:
        place = start.clone().requires_grad_()
        with torch.enable_grad():
            found = evidence_of(place)
            (gradient,) = torch.autograd.grad(found, place)
        value, along = float(found.detach()), size.square() * gradient
        return value, -value * along / (gradient @ along)

    value, move = step(vector)
    for _ in range(_NEWTON):
        if not move.isfinite().all():
            return None
        largest = float((move.abs() / size.clamp_min(1e-12)).max())
        reach = min(1.0, _LARGEST_CHANGE / max(largest, 1e-12))
        after, next_move = step(vector + reach * move)
        for _ in range(_HALVED):  # the gradient is that of the place alone
            if abs(after) < abs(value):
                break
            reach /= 2
            after, next_move = step(vector + reach * move)
        if after * value <= 0:

            def at(share: float, start: Tensor = vector, whole: Tensor = reach * move) -> float:
                with torch.no_grad():
                    return float(evidence_of(start + share * whole))

            share = brentq(at, 0.0, 1.0, xtol=1e-9)
            return vector + share * reach * move, at(share)
        if abs(after) >= abs(value):
            return None
        vector, value, move = vector + reach * move, after, next_move
    return None


def reference_at(point: NeutralPoint, layer: str, extent: Literal["plane", "tile"], source: str) -> NeutralReference:
    """A point as a model card keeps it."""
    vector = tuple(point.vector.tolist())
    return NeutralReference(layer, vector, point.log_odds, point.position, extent, source, point.beside)


def plane_evidence(cells: nn.Module, vector: Tensor, target: int, bias: Tensor | None = None) -> Tensor:
    """Evidence for a class of one cell of an endless uniform plane, a scalar with the graph of the vector.

    Args:
        cells: fully convolutional, maps (1, C, h, w) to logits (1, K, h', w').
        vector: (C,).
        target: the class.
        bias: (K,) of the logits, where `cells` leaves it out.

    Raises:
        NetworkError: `cells` is no function of cells and their neighbours.
    """
    with evaluating(cells):
        logits = plane_output(cells, vector.to(_like(cells))).double()
    logits = logits if bias is None else logits + bias.detach().to(logits)
    return evidence(logits[None])[0, target]


def tile_evidence(
    network: nn.Module, layer: str, output: Output, target: Target, shape: tuple[int, int, int]
) -> EvidenceOf:
    """Gives what is explained of a vector (C,): the network's, its layer's output replaced by the uniform map.

    Args:
        network, layer, output, target: as a class method's; the target is a class number.
        shape: (C, H, W) of a tile, which sets the size of the layer's map.
    """
    like = _like(network)
    image = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
    module = dict(network.named_modules())[full_name(network, layer)]

    def of(vector: Tensor) -> Tensor:
        with evaluating(network), tapped(network, module) as hidden, torch.set_grad_enabled(vector.requires_grad):
            hidden.turned = lambda given: vector.to(given)[:, None, None].expand_as(given)
            logits = check_logits(network(image), 1)
            found = explained_output(logits.double(), targets_of(logits, target), output).sum()
        if not vector.requires_grad:
            return found
        # The tap cuts the graph: the gradient is that of the whole map, summed over its places.
        (slope,) = torch.autograd.grad(found, hidden.activation)
        return found.detach() + (vector - vector.detach()) @ slope.sum(dim=(0, 2, 3)).to(vector)

    return of


def mean_activation(network: nn.Module, layer: str, batches: Iterable[Tensor]) -> Tensor:
    """The layer's mean over images and places, (C,) float64 on the CPU.

    Raises:
        ConfigError: no images.
    """
    total, count = torch.zeros(1, dtype=torch.float64), 0
    with evaluating(network), torch.no_grad():
        for batch in batches:
            with recorded(network, layer) as outputs:
                network(batch)
            total = total + outputs[0].double().sum(dim=(0, 2, 3)).cpu()
            count += len(outputs[0]) * outputs[0].shape[2:].numel()
    if not count:
        raise ConfigError("neutral reference: no images; give some of either class")
    return total / count


def neutral_from_images(
    network: nn.Module, layer: str, batches: Iterable[Tensor], output: Output, target: int, added: float = 0.0
) -> NeutralReference:
    """A neutral reference of extent "tile" from images at hand, split by the sign of what is explained of each.

    Args:
        network, layer, output, target: as a class method's; the layer is hidden.
        batches: images (B, C, H, W) as the network takes them. The reference is neutral at the size of the first.
        added: to what is explained before its sign is asked, such as a prevalence in the network's own log-odds.

    Raises:
        ConfigError: no images, or all on one side.
        NetworkError: no such layer, or no vector on the line has evidence 0.
    """
    totals, places, images = [torch.zeros(()), torch.zeros(())], [0, 0], 0
    shape: tuple[int, int, int] | None = None
    for batch in batches:
        shape = shape or (batch.shape[1], batch.shape[2], batch.shape[3])
        with evaluating(network), torch.no_grad(), recorded(network, layer) as outputs:
            logits = check_logits(network(batch), len(batch))
        above = explained_output(logits, targets_of(logits, target), output) + added > 0
        for number, chosen in enumerate((~above, above)):
            found = outputs[0][chosen].double()
            totals[number] = totals[number] + found.sum(dim=(0, 2, 3)).cpu()
            places[number] += len(found) * found.shape[2:].numel()
        images += len(batch)
    if shape is None:
        raise ConfigError("neutral reference: no images; give some that the network answers in either way")
    if not all(places):
        side, fix = ("for", "against") if places[1] else ("against", "for")
        raise ConfigError(
            f"neutral reference: all {images} images are {side} class {target} by the network's answer; give some that "
            f"are {fix} it as well, or choose a method that compares with nothing, such as gradient_x_activation"
        )
    low, high = (total / count for total, count in zip(totals, places, strict=True))
    of = tile_evidence(network, layer, output, target, shape)
    point = find_neutral(lambda vector: of(vector) + added, low, high)
    return reference_at(point, layer, "tile", f"{images} images, by the network's answers")


def _like(network: nn.Module) -> Tensor:
    """A tensor of the type and on the device of the network's weights."""
    return next(network.parameters(), torch.zeros(1)).detach()
