"""Encoders that end early, at a layer whose map is pooled in the place of the last one's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import evaluating, full_name, layer_named, recorded


class LeftOut(nn.Identity):
    """What stood behind an encoder's end: it has no weights and gives what it is given."""


def end_at(encoder: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Leave out of an encoder, in place, all that runs after a layer; names and weights before it stay as they are.

    Args:
        encoder: a timm network without pooling and head.
        layer: a name of its modules, such as "blocks.6"; the encoder then gives this one's map.
        images: (B, 3, H, W) float32 that it is tried on, not all alike: noise.

    Returns:
        The layer's map (B, d, h, w) of these images.

    Raises:
        ConfigError: the layer is no name.
        NetworkError: no such layer, one that gives no map, or one whose map is not the only one that what follows
            takes, as within a block with a shortcut.
    """
    if not isinstance(layer, str):
        raise ConfigError(f"end={layer!r}: must be the name of a layer, such as 'layer3'")
    try:
        layer = full_name(encoder, layer)
    except NetworkError as error:
        raise NetworkError(f"end: {error}") from error
    started: dict[nn.Module, int] = {}
    steps, ended = 0, -1

    def start(module: nn.Module, _inputs: object) -> None:
        nonlocal steps
        steps += 1
        started.setdefault(module, steps)

    def end(_module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal ended
        ended = steps

    handles = [module.register_forward_pre_hook(start) for module in encoder.modules()]
    handles.append(layer_named(encoder, layer).register_forward_hook(end))
    try:
        with evaluating(encoder), torch.no_grad(), recorded(encoder, layer):
            encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    later = [name for name, module in encoder.named_modules() if started.get(module, 0) > ended]
    for name in later:
        parent, _, child = name.rpartition(".")
        if parent not in later:
            setattr(encoder.get_submodule(parent), child, LeftOut())
    return _ended(encoder, layer, images)


def _ended(encoder: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The map, checked to go through to the encoder's output untouched: the very tensor, whatever the weights."""
    given, copies = [], []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        given.append(output)
        copies.append(output.clone())  # a shortcut may be added in place

    handle, reason = layer_named(encoder, layer).register_forward_hook(keep), "what follows takes more than its map"
    try:
        with evaluating(encoder), torch.no_grad():
            output = encoder(images)
        if output is given[-1] and torch.equal(output, copies[-1]):
            return copies[-1]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    finally:
        handle.remove()
    raise NetworkError(f"end='{layer}': the encoder cannot end there ({reason}); name a stage, such as 'layer3'")


def left_out(encoder: nn.Module) -> tuple[str, ...]:
    """How the names of weights begin that an encoder which ends early does without."""
    return tuple(f"{name}." for name, module in encoder.named_modules() if isinstance(module, LeftOut))
