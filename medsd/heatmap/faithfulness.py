"""Does the network's answer follow the slide's map? What the map shows brightest is hidden, against random places.

One step of deletion (RISE, Petsiuk et al. 2018) to blur, in log-odds, on tiles drawn from the slide. No labels are
needed, so it says for each slide whether its map can be believed, not whether the network is right. Numbers: our
choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medsd.cohort.dataset import Sample, tiles_of_each_class
from medsd.errors import NetworkError
from medsd.heatmap.legend import ADDITIVE, MASK, evidence_word
from medsd.heatmap.maps import Engine
from medsd.heatmap.sample import LEAST_TILES, TileSample
from medsd.heatmap.scale import explanation_scale
from medsd.intervals import Interval, bootstrap_mean
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import Classifier
from medsd.networks.modes import full_name
from medsd.saliency.method import Method
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.perturb import at_pixels, baseline_image, perturbed_logits, pixel_ranks
from medsd.saliency.metrics.randomisation import randomised_cascade
from medsd.saliency.registry import make_method, method_card

SHARE = 0.1
_SEED = 0
_OF_CLASS = 8
# Smoothing moves sums across borders, so a few may differ (our choice).
_LEAST_SURE, _LEAST_AGREEING = 8, 0.8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Faithfulness:
    """By how much hiding a tenth of each tile lowers its log-odds: means over tiles, with 95 % bootstrap intervals.

    Attributes:
        kind: of the map, the word of its title: "evidence" (which adds up), "saliency", "mask", "strength".
        tiles: that were judged; of all that are tissue throughout, at random.
        brightest, random, lowest: hidden where the map is highest, anywhere (map pixels as a whole, as for the others),
            and where it is lowest.
        gained: `brightest` less `random`, paired by tiles.
        output: what is lowered, see `evidence_word`.
        sure, agreeing: tiles that the network, shown each alone, gives |log-odds| above 1, and those of them whose sum
            of a map that adds up has their sign; 0 of other maps.
    """

    kind: str
    tiles: int
    brightest: Interval
    random: Interval
    lowest: Interval
    gained: Interval
    output: str = "log-odds"
    sure: int = 0
    agreeing: int = 0

    @property
    def words(self) -> str:
        """What was found, in a sentence."""
        agreed = (
            f" In {self.agreeing} of {self.sure} of them that the network, shown the tile alone, is sure of, the map's "
            "sum has its sign."
            if self.sure
            else ""
        )
        apart = self.gained.low > 0 or self.gained.high < 0
        told = "" if apart else " The map is not told apart from random places."
        return (
            f"On {self.tiles} tiles of this slide, hiding the 10 % brightest of the {self.kind} map "
            f"{self._change(self.brightest)}, hiding a random 10 % {self._change(self.random)}, hiding the 10 % lowest "
            f"{self._change(self.lowest)} (means, 95 % intervals over tiles; hidden places are blurred).{told}{agreed}"
        )

    @property
    def warning(self) -> str:
        """What a reader has to be warned of; empty where the map does better than random places, or is right in sign.

        Most tissue is normal, and which of its places is hidden matters little: that alone is no reason to distrust a
        map whose sums have the sign of what the network says of the tiles.
        """
        gained, enough = self.gained, self.sure >= _LEAST_SURE
        agreeing = self.agreeing >= _LEAST_AGREEING * self.sure
        if enough and not agreeing and not gained.high < 0:
            return (
                f"Do not believe the maps: on this slide, {self.sure - self.agreeing} of {self.sure} tiles that the "
                "network is sure of when shown alone have the other sign in them. Run the stage 'finetune' again: it "
                "chooses to map tile by tile where surroundings change the answer."
            )
        if gained.value > 0 or (enough and agreeing and not gained.high < 0):
            return ""
        sure = "Do not believe the {} map" if gained.high < 0 else "The {} map may mean nothing here"
        return (
            f"{sure.format(self.kind)}: on this slide, hiding what it shows brightest lowers the {self.output} no more "
            f"than hiding random tissue (difference {gained:+.2f}, on {self.tiles} tiles)."
        )

    def _change(self, drop: Interval) -> str:
        if math.isnan(drop.low):  # all tiles lose alike
            return f"changes the {self.output} by {-drop.value:+.2f}"
        ends = sorted((abs(drop.low), abs(drop.high)))
        if drop.low < 0 < drop.high:
            return f"changes the {self.output} by {-drop.value:+.2f} ({-drop.high:+.2f} to {-drop.low:+.2f})"
        word = "lowers" if drop.value >= 0 else "raises"
        return f"{word} the {self.output} by {abs(drop.value):.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def judge_map(engine: Engine, sample: TileSample) -> Faithfulness | None:
    """How far the answer of the network follows a slide's map.

    Args:
        engine: that made the map.
        sample: of the slide.

    Returns:
        None where it has fewer than 16 tiles.
    """
    if len(sample.images) < LEAST_TILES:
        return None
    clean, drops = _drops(engine, sample.images, sample.maps)
    means = {name: bootstrap_mean(values, seed=_SEED) for name, values in drops.items()}
    drop = means["brightest"], means["random"], means["lowest"], means["gained"]
    word, tiles = evidence_word(len(engine.classifier.classes)), len(sample.images)
    method = engine.settings.methods[0]
    kind = explanation_scale(method, 1.0, "").label.lower()
    if method != ADDITIVE:
        return Faithfulness(kind, tiles, *drop, output=word)
    sure, sums = np.abs(clean) > 1, sample.maps.double().sum(dim=(1, 2)).numpy()
    counts = int(sure.sum()), int((sums * clean > 0)[sure].sum())
    return Faithfulness(kind, tiles, *drop, word, *counts)


def _drops(
    engine: Engine, images: Tensor, maps: Tensor
) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """Each tile's log-odds, and what they lose, by what is hidden."""
    generator = torch.Generator().manual_seed(_SEED)
    anywhere = torch.rand(maps.shape, generator=generator)
    device, classifier = engine.classifier.device, engine.classifier
    x = classifier.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
    hidden, count = baseline_image(x, "blur"), round(SHARE * images.shape[2] * images.shape[3])
    drops: dict[str, npt.NDArray[np.float64]] = {}
    clean: Tensor | None = None
    for name, order in (("brightest", maps), ("random", anywhere), ("lowest", -maps)):
        ranks = pixel_ranks(at_pixels(order, images), generator).to(device)
        counts = [count] if clean is not None else [0, count]
        log_odds = engine.evidence(perturbed_logits(classifier, x, hidden, ranks, counts).flatten(0, 1))
        log_odds = log_odds.view(len(images), -1).double().cpu()
        clean = log_odds[:, 0] if clean is None else clean
        drops[name] = (clean - log_odds[:, -1]).numpy()
    assert clean is not None
    return clean.numpy(), drops | {"gained": drops["brightest"] - drops["random"]}


@dataclass(frozen=True)
class Randomised:
    """How much a map stays as it is when the network forgets what it learnt above the hidden layer.

    Attributes:
        correlation: Spearman's of a tile's map and that of the randomised network, mean over tiles; 1 is a map that
            does not depend on the weights.
        low, high: 95 % bootstrap interval over tiles.
        tiles: their number.
        layers: what was drawn anew.
    """

    correlation: float
    low: float
    high: float
    tiles: int
    layers: tuple[str, ...]

    @property
    def words(self) -> str:
        return (
            f"with random weights in {', '.join(self.layers)} the map's rank correlation with itself is "
            f"{self.correlation:.2f} ({self.low:.2f} to {self.high:.2f}, {self.tiles} tiles); 1 would mean that it "
            "does not depend on what was learnt"
        )


def randomised_check(
    classifier: Classifier, method: str, layer: str, reference: Sequence[float] | None, images: Tensor, target: int = 1
) -> Randomised:
    """Does the map depend on the weights? The cascade of Adebayo et al. 2018, down to above the hidden layer.

    Args:
        classifier: left as it is.
        method: of a class, by name.
        layer: the hidden layer, a name in the encoder.
        reference: of "deeplift", see `NeutralReference`.
        images: (B, 3, H, W) uint8, tiles of every class.
        target: the class that is explained.

    Raises:
        NetworkError: a layer that cannot draw its weights anew.
    """
    layers, where = _above(classifier, layer), full_name(classifier, layer, "encoder")
    device = classifier.device
    options = {} if reference is None else {"reference": torch.tensor(reference, device=device)}

    def maker(network: nn.Module) -> Method:
        return make_method(method, network, where, "evidence", options if method == ADDITIVE else {})

    x = classifier.normalise(images.to(device))
    first, *_, last, _all = randomised_cascade(classifier, maker, x, target, layers)
    alike = rank_correlation(first.maps, last.maps).cpu().numpy()
    found = bootstrap_mean(alike[np.isfinite(alike)], seed=_SEED)
    low, high = (found.value if math.isnan(end) else end for end in (found.low, found.high))  # all maps alike
    return Randomised(found.value, low, high, len(images), layers)


def randomised_card(
    classifier: Classifier, calibration: Calibration, dataset: Dataset[Sample], labels: npt.NDArray[np.integer[Any]]
) -> dict[str, Any] | None:
    """Fields of `Randomised` as a card keeps them, of the method of the slides' saliency.

    Args:
        classifier, calibration: what is to be kept.
        dataset: validation tiles; up to 8 of each class are taken, evenly.
        labels: (n,) theirs.

    Returns:
        None where the method's maps are of no class, or a layer cannot draw its weights anew.
    """
    method = next(iter(calibration.limits), MASK)
    if method == MASK or not method_card(method).needs_label:
        return None
    images = tiles_of_each_class(dataset, labels, _OF_CLASS)
    vector = calibration.reference["vector"] if calibration.reference else None
    try:
        found = randomised_check(classifier, method, calibration.layer, vector, images)
    except NetworkError as error:
        logger.warning("whether the map depends on the weights is not known: %s", error)
        return None
    return asdict(found) if np.isfinite(found.correlation) else None


def _above(classifier: nn.Module, layer: str) -> tuple[str, ...]:
    """Modules with weights that come after a layer of the encoder, from the head down."""
    found: list[str] = []
    holder, name = classifier.get_submodule("encoder"), "encoder"
    for part in layer.split("."):
        children = [child for child, _ in holder.named_children()]
        # What stands deeper comes sooner.
        found += [f"{name}.{child}" for child in reversed(children[children.index(part) + 1 :])]
        holder, name = holder.get_submodule(part), f"{name}.{part}"
    chosen = [one for one in found if next(classifier.get_submodule(one).parameters(), None) is not None]
    return ("head", *chosen)
