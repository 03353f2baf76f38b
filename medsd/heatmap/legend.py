"""What each map is called, its unit, and what a reader may take its values for: the one home of these words."""

from __future__ import annotations

from typing import NamedTuple

from medsd.networks.calibrated import Smoothing
from medsd.saliency import CAPTUM
from medsd.saliency.registry import method_card

ADDITIVE = "deeplift"
MASK = "mask"
NO_CLASS = "no class"
"""In the place of a class where there is none, as of an encoder alone."""
# Methods whose map is linear in the gradient, so that the maps of parts of a slide add up to that of the whole.
BY_PARTS = (ADDITIVE, "gradient", "gradient_x_activation")

_NAMES = {
    ADDITIVE: "DeepLift",
    "gradcam": "Grad-CAM",
    "smoothgrad": "SmoothGrad",
    "eigencam": "EigenCAM",
    "multivec_eigencam": "Multivec-EigenCAM",
    "tsm": "TSM",
    "mtsm": "MTSM",
    "mtsm_b": "MTSM b",
}
_SLOPE, _MEAN = "{output} per unit of {layer}", "{output}, mean of channels"
_UNITS = {
    ADDITIVE: "{output}",
    "gradient": _SLOPE,
    "smoothgrad": _SLOPE,
    "gradient_x_activation": _MEAN,
    "integrated_gradients": _MEAN,
    "gradcam": "{output}, sum of channels",
    "multivec_eigencam": "activation squared",
    "mtsm": "activation squared",
    "channel_energy": "activation squared",
    MASK: "share of masks open",
}
_MEANINGS = {
    ADDITIVE: "Above 0 speaks for {target}, below 0 against it; the values over {whole} add up to its {output}.",
    "gradient": "How the answer would change with more activation. Its sign is no evidence for or against {target}, "
    "and the values do not add up.",
    "gradient_x_activation": "Slope times activation: what the model reacts to. Its sign is no evidence for or against "
    "{target}, and the values do not add up.",
    MASK: "Which of its features the model used, each seeing more than its place; no probability.",
}


# What evidence counts in, which has no name of its own where there are three classes or more.
_EVIDENCE = "logit above the others' mean"


class Legend(NamedTuple):
    """Fields of a `ValueMap` that are words."""

    quantity: str
    target: str
    method: str
    unit: str
    meaning: str


def evidence_word(classes: int) -> str:
    """What the evidence of a class is called: of two the log-odds, of more no odds follow from it alone."""
    return "log-odds" if classes <= 2 else "evidence"


def legend(method: str, layer: str, smoothing: Smoothing, target: str, tiles: str, classes: int = 2) -> Legend:
    """The words of a method's map.

    Args:
        method: a method of `MapSettings`.
        layer, smoothing: of the settings.
        target: name of the class.
        tiles: the way that was taken and the tiles, in words.
        classes: how many there are.
    """
    if method == MASK:
        # A mask is drawn before there is an answer, and belongs to none.
        return Legend("mask", "all classes", f"mean of the stages' masks, {tiles}", unit_of(MASK, ""), _MEANINGS[MASK])
    card = method_card(method)
    name = name_of(method) + (" against a neutral reference" if method == ADDITIVE else "")
    smoothed = ", smoothed at strided convolutions" if smoothing == "backward_hook" and card.needs_gradient else ""
    where = tiles if card.needs_label else "of the slide's features as a whole"
    made, word = f"{name} at {layer}{smoothed}, {where}", evidence_word(classes)
    unit = unit_of(method, word)
    output = word if classes <= 2 else f"{word}, its {_EVIDENCE}"
    words = meaning(method, target, output=output)
    return Legend("saliency", target if card.needs_label else NO_CLASS, made, unit, words)


def explains_class(method: str) -> bool:
    """Whether a method's map is of one class, so that another class has another."""
    return method != MASK and method_card(method).needs_label


def name_of(method: str) -> str:
    """What a saliency method is called, in headings."""
    return _NAMES.get(method, method.replace("_", " "))


def unit_of(method: str, output: str, layer: str = "activation") -> str:
    """The unit of a method's map.

    Args:
        method: a saliency method or "mask".
        output: what a class method explains: "log-odds", "logit", or "evidence", of three classes or more.
        layer: what its slopes are taken by: "activation", or "input".
    """
    if method == ADDITIVE and output == "evidence":
        return _EVIDENCE
    other = "as captum gives it" if method.startswith(CAPTUM) else "activation"
    return _UNITS.get(method, other).format(output=output, layer=layer)


def meaning(method: str, target: str, whole: str = "a tile", output: str = "log-odds") -> str:
    """What a reader may take a map's values for, in sentences: what their sign says, and whether they add up.

    Args:
        method: a saliency method or "mask".
        target: the class, in words.
        whole, output: what an additive map adds up over, and to.
    """
    if method != MASK and not explains_class(method):
        return "What the network's features hold, whatever the class: no evidence for or against any."
    other = "What the model reacts to. Its sign is no evidence for or against {target}, and the values do not add up."
    return _MEANINGS.get(method, other).format(target=target, whole=whole, output=output)
