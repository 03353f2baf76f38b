"""The saliency methods by name. Imports nothing heavy, so that they can be listed at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from medsd.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

    from medsd.saliency.method import Method, Output

    Build = Callable[[nn.Module, str | None, Output], Method]


@dataclass(frozen=True)
class MethodCard:
    """What is known of a method before it runs.

    Attributes:
        name: in configurations and on the command line.
        words: what its map shows.
        signed: its map has both signs; else it is 0 or more.
        needs_label: it explains a class, so the network must give logits; the others explain features.
        needs_gradient: it runs backward passes.
        complete: "no", or when attributions sum to the output's change from the baseline.
        cost: passes an image; a backward pass reaches down to the layer only.
        at_input: it can explain the input itself (no layer).
        build: makes it for a network, a layer and an output.
    """

    name: str
    words: str
    signed: bool
    needs_label: bool
    needs_gradient: bool
    complete: str
    cost: str
    at_input: bool
    build: Build


def make_method(name: str, network: nn.Module, layer: str | None = None, output: Output = "logit") -> Method:
    """The method of that name, with its default options.

    Args:
        name: a key of `METHODS`.
        network: gives logits (B, K); for label-free methods anything.
        layer: a module's name in the network; None is the input.
        output: what class methods explain; label-free ones do not look at it.

    Raises:
        ConfigError: no such method or output, or no layer where the method needs one.
        NetworkError: no such layer.
    """
    from medsd.saliency.method import check_output

    if name not in METHODS:
        raise ConfigError(f"method '{name}': use one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    card = METHODS[name]
    if layer is None and not card.at_input:
        raise ConfigError(f"layer: method '{name}' needs a hidden layer; name a module that gives a map (B, C, h, w)")
    return card.build(network, layer, check_output(output))


def table() -> list[tuple[str, ...]]:
    """Rows for people: first the headings, then name, words, label, gradient, completeness and cost of each method."""
    rows: list[tuple[str, ...]] = [("method", "shows", "label", "gradient", "complete", "cost")]
    for card in METHODS.values():
        label, gradient = ("yes" if needed else "no" for needed in (card.needs_label, card.needs_gradient))
        rows.append((card.name, card.words, label, gradient, card.complete, card.cost))
    return rows


def _class_method(module: str, name: str) -> Build:
    def build(network: nn.Module, layer: str | None, output: Output) -> Method:
        method: Method = getattr(import_module(f"medsd.saliency.{module}"), name)(network, layer, output)
        return method

    return build


def _label_free(name: str, *options: str) -> Build:
    def build(network: nn.Module, layer: str | None, output: Output) -> Method:
        method: Method = getattr(import_module("medsd.saliency.label_free"), name)(network, layer, *options)
        return method

    return build


def _explains_class(name: str, words: str, complete: str, cost: str, build: Build, at_input: bool = True) -> MethodCard:
    return MethodCard(name, words, True, True, True, complete, cost, at_input, build)


def _explains_features(name: str, words: str, signed: bool, build: Build) -> MethodCard:
    return MethodCard(name, words, signed, False, False, "no", "1 forward", False, build)


METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        _explains_class(
            "gradient",
            "slope of the output at each place",
            "no",
            "1 forward, 1 backward",
            _class_method("gradient", "Gradient"),
        ),
        _explains_class(
            "gradient_x_activation",
            "slope times activation",
            "no",
            "1 forward, 1 backward",
            _class_method("gradient", "GradientXActivation"),
        ),
        _explains_class(
            "deeplift",
            "what changed the output from the baseline, by DeepLift's rules",
            "if all nonlinearities have a rule",
            "2 forward, 1 backward",
            _class_method("deeplift", "DeepLift"),
        ),
        _explains_class(
            "integrated_gradients",
            "what changed the output from the baseline, by slopes along the way",
            "to the error of 50 steps",
            "52 forward, 50 backward",
            _class_method("integrated_gradients", "IntegratedGradients"),
        ),
        _explains_class(
            "gradcam",
            "channels weighted by their mean slope",
            "no",
            "1 forward, 1 backward",
            _class_method("gradient", "GradCAM"),
            at_input=False,
        ),
        _explains_class(
            "smoothgrad",
            "mean slope over noisy copies",
            "no",
            "21 forward, 20 backward",
            _class_method("smoothgrad", "SmoothGrad"),
        ),
        _explains_features(
            "eigencam", "first principal map of the features, its sign fixed", True, _label_free("EigenCAM")
        ),
        _explains_features(
            "eigencam_reference",
            "EigenCAM as pytorch-grad-cam has it, sign by chance",
            True,
            _label_free("EigenCAM", "reference"),
        ),
        _explains_features(
            "multivec_eigencam", "all principal maps, magnitudes summed", False, _label_free("MultivecEigenCAM")
        ),
        _explains_features("tsm", "magnitude of the first Tucker map", False, _label_free("TSM")),
        _explains_features("mtsm", "all Tucker maps, magnitudes summed", False, _label_free("MTSM")),
        _explains_features("mean_map", "mean of the channels", True, _label_free("MeanMap")),
        _explains_features("channel_energy", "sum of the squared channels", False, _label_free("ChannelEnergy")),
    )
}
