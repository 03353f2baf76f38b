"""How to read a contact sheet: the warning at its head, the sentences at its foot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from medsd import RESEARCH_USE_ONLY
from medsd.classes import target_number
from medsd.explain.explained import ExplainedImages
from medsd.heatmap.findings import prevalence_words
from medsd.heatmap.legend import ADDITIVE, MASK, explains_class, meaning
from medsd.heatmap.numbers import percent
from medsd.heatmap.scale import OPACITY
from medsd.saliency.registry import method_card

# An image this many times larger or smaller than the tiles of the training shows other things than they did.
_FAR = 2.0
# Log-odds from which the network has an answer (our choice): the sign of smaller ones turns with rounding.
_SURE = 1.0


def reading_notes(explained: ExplainedImages) -> Iterator[str]:
    """What a reader of the sheet must know."""
    settings, card, images = explained.settings, explained.model.card, explained.images
    sizes = [image.size_px for image in images]
    yield f"{RESEARCH_USE_ONLY} Maps show what the model reacts to, not where any class is."
    methods: dict[str, list[str]] = {}
    for name in settings.methods:
        output = f"{explained.output}, but for what its map lacks"
        methods.setdefault(meaning(name, "the class below its map", "an image", output), []).append(name)
    yield from (f"{', '.join(names)}: {words[0].lower()}{words[1:]}" for words, names in methods.items())
    if explained.reference is not None:
        yield additivity(explained)
    if any(explains_class(name) for name in settings.methods):
        yield "Orange is above 0, blue below."
    if MASK in settings.methods:
        yield "Green is open, which speaks for no class; masks lie at the network's stages, whatever the layer above."
    free = [method_card(name) for name in settings.methods if name != MASK and not explains_class(name)]
    if free:
        colours = "yellow is above 0, violet below" if any(card.signed for card in free) else "yellow is strong"
        yield (
            f"In maps for no class {colours}. Each image is taken apart for itself: what is strong in one row may be "
            "something else than in the next, and blank glass may be strongest."
        )
        if settings.smoothing == "backward_hook":
            yield "backward_hook smooths gradients: maps for no class are as without it."
    if "eigencam_reference" in settings.methods:
        yield "The sign of eigencam_reference is arbitrary, image by image."
    yield (
        "A column has one scale for all images; colours of two columns do not compare. Maps lie over the picture in "
        f"light grey, their strongest colours at {percent(OPACITY)}, bars over all those greys; their squares are the "
        "cells of the layer."
    )
    if len(set(sizes)) > 1:
        yield "The images differ in size, and values with it: compare the colours of images of one size only."
    if card is None:
        yield "The weights do not say which scale (µm per pixel) they expect."
    else:
        yield (
            f"The weights expect {card.mpp:g} µm per pixel; pictures do not tell theirs, so check it "
            f"(tiles of {card.tile_px} px, trained on {card.trained_on})."
        )
        yield prevalence_words(card, 1, card.calibration)
        far = sum(not 1 / _FAR <= math.sqrt(height * width) / card.tile_px <= _FAR for height, width in sizes)
        if far:
            yield f"{far} image(s) are over {_FAR:g} times larger or smaller than those tiles."
        if card.stain_target is not None:
            yield "The weights were trained on stain-normalised tiles; these images are taken as they are."
    if explained.masked and not any(image.region is not None and image.region.any() for image in images):
        yield "No mask marks anything, so nothing is compared with masks."
    elif explained.masked:
        yield "Black and white outline: the mask."
        if settings.target == "predicted":
            yield "Masks are compared with maps of the predicted class; name the masks' class as target."
    if explained.failed:
        yield f"{len(explained.failed)} image(s) could not be used and are left out."


def orange_elsewhere(explained: ExplainedImages) -> str:
    """A warning where orange is not for the class that it is for on slides, the second; "" where it is."""
    if not any(explains_class(name) for name in explained.settings.methods):
        return ""
    classes, found = explained.model.classes, Counter(image.explained for image in explained.images)
    usual = classes[target_number(classes, None)]
    if set(found) == {usual}:
        return ""
    if len(found) == 1:
        (name,) = found
        return f"Orange speaks for {name} here, blue against it: name {usual} as target to see what speaks for that."
    shares = ", ".join(f"for {name} in {count}" for name, count in found.most_common())
    return (
        f"Orange changes its meaning from row to row: of {found.total()} images it speaks {shares}; the class stands "
        "below each map. Name one as target to compare rows."
    )


def additivity(explained: ExplainedImages) -> str:
    """What DeepLift compared with, and how far its maps add up; "" without that method."""
    reference, output = explained.reference, explained.output
    if reference is None:
        return ""
    lacking = sorted(image.unexplained for image in explained.images)
    least, most = f"{lacking[0]:+.2g}", f"{lacking[-1]:+.2g}"
    extent = {"plane": "an endless plane", "tile": "a map of a tile's size"}[reference.extent]
    sure = [image for image in explained.images if abs(image.output) > _SURE]
    alike = sum((image.output - image.unexplained) * image.output > 0 for image in sure)
    signs = f" Its sum has the sign of that in {alike} of {len(sure)} image(s) beyond +-{_SURE:g}." if sure else ""
    return (
        f"{ADDITIVE} compares with the neutral reference from {reference.source}, whose {output} as {extent} is "
        f"{reference.log_odds:.1g}. An image's map lacks {least if least == most else f'{least} to {most}'} of its "
        f"{output}: the reference's own at that size, and what smoothing and DeepLift's rules leave.{signs}"
    )
