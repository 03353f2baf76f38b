"""The saliency methods by name. Imports nothing heavy, so that they can be listed at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from medsd.checks import check_options
from medsd.errors import ConfigError, nearest
from medsd.saliency import CAPTUM

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from medsd.saliency.method import ClassMethod, Method, Output

_ONE_PASS = "1 forward, 1 backward"


@dataclass(frozen=True)
class MethodCard:
    """What is known of a method before it runs.

    Attributes:
        name: in configurations and on the command line.
        words: what its map shows.
        home: its class, or, of label-free ones, its function, below `medsd.saliency`.
        cost: passes an image; a backward pass reaches down to the layer only.
        complete: "no", or when attributions sum to the output's change from the baseline.
        signed: its map has both signs; else it is 0 or more.
        needs_label: it explains a class, so the network must give logits; the others explain features.
        at_input: it can explain the input itself (no layer).
        options: what is set of it, by keyword.
    """

    name: str
    words: str
    home: str
    cost: str
    complete: str = "no"
    signed: bool = True
    needs_label: bool = True
    at_input: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_gradient(self) -> bool:
        """It runs backward passes."""
        return "backward" in self.cost


def make_method(
    name: str,
    network: nn.Module,
    layer: str | None = None,
    output: Output = "logit",
    options: Mapping[str, Any] | None = None,
    reference: Tensor | Literal["neutral"] | None = None,
) -> Method:
    """The method of that name.

    Those that explain a class also give attributions of channels (`attribute`) and logits (`explain`): type checkers
    know of them after `isinstance(method, ClassMethod)`, or where the class itself is made, as `DeepLift`.

    Args:
        name: a key of `METHODS`; or "captum." and an attribution of `captum.attr`, see `captum_method`.
        network: gives logits (B, K); for label-free methods anything.
        layer: a module's name in the network; None is the input.
        output: what class methods explain; label-free ones do not look at it.
        options: of the method's class or function by keyword, such as `{"steps": 100}` of integrated gradients.
        reference: what "deeplift" compares with, see `DeepLift`; the same as the option of that name.

    Raises:
        ConfigError: no such method, option or output, or no layer where the method needs one.
        NetworkError: no such layer.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> method = make_method("smoothgrad", resnet18(), "layer4", "evidence", {"samples": 2})
        >>> method(torch.zeros(1, 3, 64, 64), target=1).shape
        torch.Size([1, 2, 2])
    """
    from medsd.networks.symmetry import is_symmetric
    from medsd.saliency.label_free import LabelFree
    from medsd.saliency.method import check_output
    from medsd.saliency.symmetric import SymmetricMethod

    card = method_card(name)
    if layer is None and not card.at_input:
        raise ConfigError(f"layer: method '{name}' needs a hidden layer; name a module that gives a map (B, C, h, w)")
    check_output(output)
    chosen = {**card.options, **(options or {})} | ({} if reference is None else {"reference": reference})
    module, _, kind = card.home.rpartition(".")
    made: Any = getattr(import_module(f"medsd.saliency.{module}"), kind)
    if not name.startswith(CAPTUM):
        check_options(name, chosen, set(signature(made).parameters) - {"network", "layer", "output", "features"})
    if not card.needs_label:
        return LabelFree(network, layer, partial(made, **chosen))
    method: ClassMethod = (
        made(name, network, layer, output, chosen)
        if name.startswith(CAPTUM)
        else made(network, layer, output, **chosen)
    )
    return SymmetricMethod(network, layer, output, of=method) if is_symmetric(network) else method


def method_card(name: str) -> MethodCard:
    """The card of a method, captum's too.

    Raises:
        ConfigError: no such method.
    """
    if name.startswith(CAPTUM):
        from medsd.saliency.captum_method import needs_layer

        words = "as captum has it, mean of channels"
        return MethodCard(name, words, "captum_method.captum_method", "captum's", at_input=not needs_layer(name))
    if name not in METHODS:
        raise ConfigError(f"method '{name}': use one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    return METHODS[name]


def check_label_free(names: Iterable[str], weights: Path) -> None:
    """Raises ConfigError: a method that explains a class, of weights without any."""
    for name in names:
        if method_card(name).needs_label:
            free = ", ".join(card.name for card in METHODS.values() if not card.needs_label)
            raise ConfigError(
                f"method '{name}' explains a class, {weights} is an encoder without any; use label-free ones: {free}"
            )


def table() -> list[tuple[str, ...]]:
    """Rows for people: first the headings, then name, words, label, gradient, completeness and cost of each method."""
    rows: list[tuple[str, ...]] = [("method", "shows", "label", "gradient", "complete", "cost")]
    for card in METHODS.values():
        label, gradient = ("yes" if needed else "no" for needed in (card.needs_label, card.needs_gradient))
        rows.append((card.name, card.words, label, gradient, card.complete, card.cost))
    return rows


_of_features = partial(MethodCard, cost="1 forward", needs_label=False, at_input=False)
_FREE = "label_free."

METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard("gradient", "slope of the output at each place", "gradient.Gradient", _ONE_PASS),
        MethodCard("gradient_x_activation", "slope times activation", "gradient.GradientXActivation", _ONE_PASS),
        MethodCard(
            "deeplift",
            "what changed the output from the baseline or reference, by DeepLift's rules",
            "deeplift.DeepLift",
            "2 forward, 1 backward",
            "if every function has a rule",
        ),
        MethodCard(
            "integrated_gradients",
            "what changed the output from the baseline, by slopes along the way",
            "integrated_gradients.IntegratedGradients",
            "52 forward, 50 backward",
            "to the error of 50 steps",
        ),
        MethodCard("gradcam", "channels weighted by their mean slope", "gradient.GradCAM", _ONE_PASS, at_input=False),
        MethodCard("smoothgrad", "mean slope over noisy copies", "gradient.SmoothGrad", "21 forward, 20 backward"),
        _of_features("eigencam", "first principal map of the features, its sign fixed", _FREE + "eigencam"),
        _of_features(
            "eigencam_reference",
            "EigenCAM as pytorch-grad-cam has it, sign by chance",
            _FREE + "eigencam",
            options={"variant": "reference"},
        ),
        _of_features(
            "multivec_eigencam", "all principal maps, magnitudes summed", _FREE + "multivec_eigencam", signed=False
        ),
        _of_features("tsm", "magnitude of the first Tucker map", _FREE + "tsm", signed=False),
        _of_features("mtsm", "all Tucker maps, magnitudes summed", _FREE + "mtsm", signed=False),
        _of_features(
            "mtsm_b",
            "MTSM in which a map's singular value counts once",
            _FREE + "mtsm",
            signed=False,
            options={"weights": "b"},
        ),
        _of_features("mean_map", "mean of the channels", _FREE + "mean_map"),
        _of_features("channel_energy", "sum of the squared channels", _FREE + "channel_energy", signed=False),
    )
}
