"""Any attribution of captum as a `Method`: `make_method("captum.LayerConductance", network, "layer3")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_options
from medsd.errors import ConfigError, NetworkError, nearest
from medsd.networks.modes import map_of_layer, recorded, uncompiled
from medsd.networks.tokens import token_grid
from medsd.saliency import CAPTUM
from medsd.saliency.method import Attribution, ClassMethod, Output, Target, evidence, targets_of

_SQUARES = 8  # along each side of an image, where a part of it is left out at a time (our choice)
_SEED = 0
_RANDOM = ("GradientShap", "KernelShap", "LayerGradientShap", "Lime", "ShapleyValueSampling")
_ACROSS_IMAGES = (CAPTUM + "FeaturePermutation", CAPTUM + "LayerFeaturePermutation")
_GIVEN = {"self", "forward_func", "model", "layer", "inputs", "target", "kwargs"}
_REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True, eq=False)
class CaptumMethod(ClassMethod):
    """A `Method` by an attribution of captum; its own limits (ReLUs used twice, in-place ones) hold.

    Those that draw at random do so from one seed for each image (our choice), and leave the random state elsewhere.

    Args:
        name: as in the registry, "captum." before its name in `captum.attr`.
        options: of its constructor or its `attribute`, plain values. Where it leaves out parts of the input and is not
            told which, they are squares, 8 a side; a baseline that it must be given is 0. The rest as `ClassMethod`.

    Raises:
        ConfigError: no such attribution or option, beside what every class method raises.
    """

    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name

    def attributed(self, images: Tensor, target: Target) -> Attribution:
        seen = nullcontext([images]) if self.layer is None else recorded(self.network, self.layer)
        with torch.no_grad(), uncompiled(), seen as outputs:
            logits = self.logits(images.clone())
        map_of_layer(self.layer or "input", outputs[0], images)  # some attributions have no channels left to tell
        grid = token_grid(self.network, self.layer or "", images)
        numbers = targets_of(logits, target)
        # What draws at random draws for the batch as a whole; an image's map is not to depend on the others.
        at_once = 1 if self.name.removeprefix(CAPTUM) in _RANDOM else len(images)
        parts = zip(torch.split(images, at_once), torch.split(numbers, at_once), strict=True)
        found = [map_of_layer(self.layer or "input", self._found(*part), grid=grid).detach() for part in parts]
        return Attribution(torch.cat(found), logits, numbers)

    def _found(self, images: Tensor, numbers: Tensor) -> object:
        """What captum gives for images and their classes."""
        kind = _attribution(self.name)
        made, called = (_parameters(kind, function) for function in ("__init__", "attribute"))
        chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}
        given = {"target": numbers, **_defaults(images, called, chosen), **chosen}
        places = [_Explained(self.network, self.output), *([self.module] if "layer" in made else [])]
        try:
            with uncompiled(), _seeded(images.device):
                method = kind(*places, **{key: value for key, value in chosen.items() if key in made})
                return method.attribute(
                    images.detach().requires_grad_(), **{key: value for key, value in given.items() if key in called}
                )
        except _REFUSALS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NetworkError(f"method '{self.name}': captum cannot explain this network ({reason})") from error


def captum_method(
    name: str, network: nn.Module, layer: str | None, output: Output, options: Mapping[str, Any]
) -> CaptumMethod:
    """The method; what explains the input alone (`captum.Occlusion`) does so whatever the layer."""
    kind = _attribution(name)
    known = {*_parameters(kind, "__init__"), *_parameters(kind, "attribute")} - _GIVEN
    check_options(name, options, known)
    return CaptumMethod(network, layer if needs_layer(name) else None, output, name, options)


def needs_layer(name: str) -> bool:
    """Whether it is made for a layer."""
    return "layer" in _parameters(_attribution(name), "__init__")


def _attribution(name: str) -> Any:
    import captum.attr

    known = {}
    for kind in captum.attr.__all__:
        attribution = getattr(captum.attr, kind)
        made, called = (_parameters(attribution, function) for function in ("__init__", "attribute"))
        # Not one of a neuron, of another attribution, or of parts that are code.
        if {"forward_func", "model"} & made.keys() and "inputs" in called and "neuron_selector" not in called:
            known[CAPTUM + kind] = attribution
    for kind in (CAPTUM + "LimeBase", *_ACROSS_IMAGES):
        del known[kind]
    if name in _ACROSS_IMAGES:
        raise ConfigError(
            f"method '{name}': permutes parts between images, so it has no map of one; use captum.Occlusion"
        )
    if name not in known:
        hint = nearest(name, known) or "; see captum.attr"
        raise ConfigError(f"method '{name}': captum has no such attribution of an input or a layer{hint}")
    return known[name]


def _parameters(kind: Any, function: str) -> Mapping[str, Parameter]:
    return signature(getattr(kind, function)).parameters if hasattr(kind, function) else {}


class _Explained(nn.Module):
    """A network whose output for a class is what is explained of it."""

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        # A network may write to its input, which is the caller's, or what captum makes others of.
        logits: Tensor = self.network(x.clone()).flatten(1)
        return evidence(logits) if self.output == "evidence" else logits


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Inside, torch and NumPy draw from one seed; their states are put back."""
    state, devices = np.random.get_state(), [device] if device.type == "cuda" else []  # noqa: NPY002 (captum's own)
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed, which would seed the other devices for good.
        torch.default_generator.manual_seed(_SEED)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _defaults(images: Tensor, called: Mapping[str, Parameter], chosen: Mapping[str, Any]) -> dict[str, Any]:
    _, channels, *sides = images.shape
    window = chosen.get("sliding_window_shapes", (channels, *(-(-side // _SQUARES) for side in sides)))
    squares = torch.arange(float(_SQUARES**2), device=images.device).view(1, 1, _SQUARES, _SQUARES)
    defaults = {
        "sliding_window_shapes": window,
        "strides": (window[0], *(-(-side // 2) for side in window[1:])),
        "feature_mask": F.interpolate(squares, sides).long().expand(1, channels, *sides).contiguous(),
    }
    if "baselines" in called and called["baselines"].default is Parameter.empty:
        defaults["baselines"] = images.new_zeros(2, *images.shape[1:])  # of distributions, which one would not be
    return defaults
