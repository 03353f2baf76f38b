"""What validation data fixed of a classifier, once for all slides: what its logits come to, and from where on.

A training that draws its classes evenly learns how much more likely an image is in one class than in another, as if the
classes were equally frequent. In tissue they are not. With z the logits, T the temperature, and p and q the classes'
shares of the training's draws and of the validation tissue, Bayes' rule gives the log-probabilities of tissue, but for
what all classes share, as

    z / T + log(q / p),

the logit adjustment (Saerens et al. 2002; Menon et al. 2021). A network need not have learnt what it was drawn: its
logits of new slides may lean to a class, and the adjustment alone would then assume another share than it says. So a
bias b, a number a class, is fitted beside it (Platt 1999), as the temperature is, on validation tiles: with it, the
mean probability of the validation tissue is q. The log-odds of two classes become

    (z1 - z0) / T + logit(q1) - logit(p1) + b1 - b0.

All but the first part is the same for every tile and place. So it ranks nothing anew, and a neutral reference of
log-odds 0 must lie where the first part is its negative: then a map's sum, the difference of a tile's log-odds and
those of the reference, is still the tile's log-odds. `calibrated` is the one place where it is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Smoothing = Literal["backward_hook", "none"]
Way = Literal["auto", "dense", "tiled"]


@dataclass(frozen=True)
class SlideCutOff:
    """The slide score from which a slide is taken for one with the target, and how that went on validation slides.

    Attributes:
        score: slides of this score or a higher one are raised.
        having, found: validation slides with the target, and how many of them are raised.
        without, raised: those without it, and how many of them are raised.
        sensitivity, specificity: their share (0 to 1) with the bounds of its exact 95 % interval (Clopper and Pearson
            1934); None without such slides.
    """

    score: float
    having: int
    found: int
    without: int
    raised: int
    sensitivity: tuple[float, float, float]
    specificity: tuple[float, float, float] | None


@dataclass(frozen=True)
class LesionPoint:
    """How the threshold of regions went on validation slides: false regions against lesions found.

    Attributes:
        budget: false regions a slide that were allowed.
        slides, false_regions: validation slides whose target is outlined in full, and the regions on them off all of
            it.
        lesions, found: those outlined on any validation slide, and how many of them a region touches.
    """

    budget: float
    slides: int
    false_regions: int
    lesions: int
    found: int


@dataclass(frozen=True)
class Calibration:
    """What validation data fixed once for all slides.

    Attributes:
        threshold: probability of the target from which a place counts as one.
        limits: ends of the colour scales by method, the 99.5th percentile of |saliency| in validation tissue. The
            first method is the slide's saliency, see `medsd.heatmap.maps.MapSettings`. 0: each slide has its own.
        layer: hidden layer of the saliency.
        smoothing: "backward_hook" or "none".
        source: the data that fixed these values, for legends.
        temperature: divides the logits, see `calibrated`.
        smooth_um: of additive maps, see `medsd.heatmap.maps.MapSettings`.
        reference: fields of the layer's `medsd.saliency.neutral.NeutralReference`, which "deeplift" compares with; None
            without that method.
        drawn_shares: the classes' shares of the training's draws; empty in cards that do not say.
        tissue_shares: those of the validation tissue's tiles; empty where they are not known, and logits get no offset.
        bias: a number a class, added to logits beside the adjustment to those shares; none for 0.
        lesions: what the threshold was chosen by; None where there were no slides, and it is Youden's of patches.
        cut_off: of slides; None where none is known.
        way: how slides are mapped, see `medsd.heatmap.maps.MapSettings`; "tiled" where the network answers otherwise to
            tiles with their surroundings than alone.
    """

    threshold: float
    limits: dict[str, float]
    layer: str
    smoothing: Smoothing
    source: str
    temperature: float = 1.0
    smooth_um: float = 0.0
    reference: dict[str, Any] | None = None
    drawn_shares: tuple[float, ...] = ()
    tissue_shares: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    lesions: LesionPoint | None = None
    cut_off: SlideCutOff | None = None
    way: Way = "auto"

    @property
    def offset(self) -> tuple[float, ...]:
        """What is added to each class's logit, see `calibrated`."""
        return class_offset(self.drawn_shares, self.tissue_shares, self.bias)


def read_calibration(fields: Mapping[str, Any]) -> Calibration:
    """The calibration of a card's JSON; KeyError or TypeError where that holds something else."""
    given = dict(fields)
    for name in ("drawn_shares", "tissue_shares", "bias"):
        given[name] = tuple(given.get(name, ()))
    if given.get("lesions") is not None:
        given["lesions"] = LesionPoint(**given["lesions"])
    if given.get("cut_off") is not None:
        before = {"tumour": "having", "normal": "without"}  # what these were called
        cut_off = {before.get(name, name): value for name, value in given["cut_off"].items()}
        for name in ("sensitivity", "specificity"):
            cut_off[name] = cut_off[name] and tuple(cut_off[name])
        given["cut_off"] = SlideCutOff(**cut_off)
    return Calibration(**given)


def logit_adjustment(drawn: Sequence[float], tissue: Sequence[float]) -> tuple[float, ...]:
    """log(tissue / drawn) of each class's shares; nothing where either is not known.

    Example:
        >>> adjustment = logit_adjustment((0.5, 0.5), (0.96, 0.04))
        >>> round(adjustment[1] - adjustment[0], 4), round(math.log(0.04 / 0.96), 4)
        (-3.1781, -3.1781)
    """
    if not (drawn and tissue):
        return ()
    return tuple(math.log(after / before) for before, after in zip(drawn, tissue, strict=True))


def class_offset(drawn: Sequence[float], tissue: Sequence[float], bias: Sequence[float] = ()) -> tuple[float, ...]:
    """The adjustment of each class's logit from shares to shares, and its bias."""
    adjustment = logit_adjustment(drawn, tissue)
    return tuple(shift + lean for shift, lean in zip(adjustment, bias or (0.0,) * len(adjustment), strict=True))


def calibrated(logits: Tensor, temperature: float, offset: Sequence[float] = ()) -> Tensor:
    """Logits (B, K, ...) divided by the temperature, and moved from the training's class shares to the tissue's.

    Their softmax are the probabilities; what they are for two classes stands above.

    Args:
        logits: of the network.
        temperature: above 0.
        offset: one number a class, as of `class_offset`; none leaves the training's shares.
    """
    tempered = logits / temperature
    if not offset:
        return tempered
    return tempered + tempered.new_tensor(offset).view(-1, *[1] * (logits.dim() - 2))
