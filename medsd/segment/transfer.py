"""Weights between timm's encoders and those of segmentation-models-pytorch, with a report of every tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from medsd.errors import WeightsError

_WRAPPED = "model."


@dataclass(frozen=True)
class Transfer:
    """What became of every tensor, by name.

    Attributes:
        loaded: target's name by source's.
        missing: of the target, left as they were.
        unexpected: of the source, without a place in the target, such as a head's.
    """

    loaded: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def in_words(self) -> str:
        """One line."""
        return ", ".join(
            f"{len(names)} tensors {kind}{': ' + ', '.join(names) if named and names else ''}"
            for kind, names, named in (
                ("loaded", tuple(self.loaded), False),
                ("missing", self.missing, True),
                ("unexpected", self.unexpected, True),
            )
        )


def transfer_weights(source: nn.Module, target: nn.Module) -> Transfer:
    """Copy an encoder's tensors into another form of the same encoder, whose names differ.

    The forms are timm's own (`timm.create_model`, with or without a head), its features alone (`features_only=True`,
    which joins levels of a name by underscores), and the encoders of segmentation-models-pytorch, both those with
    timm's names inside (`tu-resnet18`, where they begin "model.") and its own ResNets. Either way round. Two tensors
    are one when their names are the same without "model." and with dots in underscores' places.

    Args:
        source: where the weights are.
        target: gets them, in its own precision; changed in place, or not at all where it raises.

    Returns:
        Every tensor of both, see `Transfer`. The caller judges what is missing or left over.

    Raises:
        WeightsError: nothing is common to both, or tensors of one name differ in shape: these are different encoders.

    Example:
        >>> import segmentation_models_pytorch as smp, timm
        >>> encoder = timm.create_model("test_resnet", num_classes=0)  # or your own, from pre-training
        >>> network = smp.Unet("tu-test_resnet", encoder_weights=None)
        >>> report = transfer_weights(encoder, network.encoder)
        >>> len(report.loaded), report.missing, report.unexpected
        (90, (), ())
    """
    given, state = source.state_dict(), target.state_dict()
    names, places = _by_common_name(given), _by_common_name(state)
    loaded = {names[name]: places[name] for name in names if name in places}
    if not loaded:
        raise WeightsError(
            f"{type(source).__name__} and {type(target).__name__}: no tensor of one has a name of the other's; they "
            "are different encoders, use the same timm name for both"
        )
    for name, place in loaded.items():
        if given[name].shape != state[place].shape:
            raise WeightsError(
                f"'{name}' {tuple(given[name].shape)} does not fit '{place}' {tuple(state[place].shape)}; these are "
                "different encoders, use the same timm name for both"
            )
    with torch.no_grad():
        for name, place in loaded.items():
            state[place].copy_(given[name])  # a state dict shares its tensors with the module
    return Transfer(
        loaded,
        missing=tuple(places[name] for name in places if name not in names),
        unexpected=tuple(names[name] for name in names if name not in places),
    )


def common_name(name: str) -> str:
    """What a tensor's name is compared by."""
    return name.removeprefix(_WRAPPED).replace("_", ".")


def _by_common_name(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(common_name(name), name)) != name:
            raise WeightsError(f"'{name}' and '{other}' cannot be told apart without underscores; rename one")
    return found
