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


@dataclass(frozen=True)
class NeutralReference:
    """A layer's reference of log-odds 0 (our choice), plain numbers as a model card keeps them.

    Attributes:
        layer: its name in the network.
        vector: one number a channel.
        log_odds: of the uniform map after the search, 0 but for rounding.
        position: on the line from the mean of tissue against the target (0) to that of tissue for it (1).
        extent: "plane", uniform without end; or "tile", uniform over the layer's map of one tile, with its borders.
        source: what it was found from, in words.
    """

    layer: str
    vector: tuple[float, ...]
    log_odds: float
    position: float
    extent: Literal["plane", "tile"]
    source: str


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


def find_neutral(evidence_of: Callable[[Tensor], float], low: Tensor, high: Tensor) -> tuple[Tensor, float, float]:
    """The vector on a line whose evidence is 0, nearest the middle of the two that span it.

    Args:
        evidence_of: log-odds of the uniform map of a vector (C,).
        low, high: (C,) means of what speaks against and for the target; the line is searched from -2 to 3.

    Returns:
        The vector (C,) float64, its evidence, and its position on the line: 0 is `low`, 1 `high`.

    Raises:
        NetworkError: the evidence has one sign all along.
    """
    low, high = low.detach().double(), high.detach().double()
    values: dict[float, float] = {}

    def at(place: float) -> float:
        if place not in values:
            values[place] = float(evidence_of(low + place * (high - low)))
        return values[place]

    steps = [_FIRST + (_LAST - _FIRST) * step / _STEPS for step in range(_STEPS + 1)]
    # From the middle of the two outwards, for a point beyond them is seldom needed.
    for left, right in sorted(pairwise(steps), key=lambda ends: abs(sum(ends) - 1)):
        if at(left) * at(right) <= 0 and at(left) != at(right):
            brentq(at, left, right, xtol=1e-9)
            place = min(values, key=lambda it: abs(values[it]))
            return low + place * (high - low), values[place], place
    raise NetworkError(
        f"neutral reference: the evidence is {min(values.values()):.3g} to {max(values.values()):.3g} from tissue "
        "against the target to tissue for it and beyond, never 0; check that the network tells the classes apart, or "
        "choose a method without a reference"
    )


def plane_evidence(
    cells: nn.Module, vector: Tensor, target: int, bias: Tensor | None = None, temperature: float = 1.0
) -> float:
    """Evidence for a class of one cell of an endless uniform plane.

    Args:
        cells: fully convolutional, maps (1, C, h, w) to logits (1, K, h', w').
        vector: (C,).
        target: the class.
        bias: (K,) of the logits, where `cells` leaves it out.
        temperature: divides the logits.

    Raises:
        NetworkError: `cells` is no function of cells and their neighbours.
    """
    with evaluating(cells):
        logits = plane_output(cells, vector.to(_like(cells))).double()
    logits = (logits if bias is None else logits + bias.detach().to(logits)) / temperature
    return float(evidence(logits[None])[0, target])


def tile_evidence(
    network: nn.Module, layer: str, output: Output, target: Target, shape: tuple[int, int, int]
) -> Callable[[Tensor], float]:
    """Gives what is explained of a vector (C,): the network's, its layer's output replaced by the uniform map.

    Args:
        network, layer, output, target: as a class method's; the target is a class number.
        shape: (C, H, W) of a tile, which sets the size of the layer's map.
    """
    like = _like(network)
    image = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
    module = dict(network.named_modules())[full_name(network, layer)]

    def of(vector: Tensor) -> float:
        with evaluating(network), tapped(network, module) as hidden, torch.no_grad():
            hidden.turned = lambda given: vector.to(given)[:, None, None].expand_as(given)
            logits = check_logits(network(image), 1)
        return float(explained_output(logits.double(), targets_of(logits, target), output))

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
    network: nn.Module, layer: str, batches: Iterable[Tensor], output: Output, target: int
) -> NeutralReference:
    """A neutral reference of extent "tile" from images at hand, split by the sign of what is explained of each.

    Args:
        network, layer, output, target: as a class method's; the layer is hidden.
        batches: images (B, C, H, W) as the network takes them. The reference is neutral at the size of the first.

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
        above = explained_output(logits, targets_of(logits, target), output) > 0
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
    vector, log_odds, position = find_neutral(of, low, high)
    source = f"{images} images, by the network's answers"
    return NeutralReference(layer, tuple(vector.tolist()), log_odds, position, "tile", source)


def _like(network: nn.Module) -> Tensor:
    """A tensor of the type and on the device of the network's weights."""
    return next(network.parameters(), torch.zeros(1)).detach()
