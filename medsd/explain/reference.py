"""The neutral reference that DeepLift compares images with: the weights' own, or one found from the images given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from medsd.errors import ConfigError
from medsd.explain.model import Model
from medsd.explain.settings import ExplainSettings
from medsd.saliency.method import explained_output
from medsd.saliency.neutral import NeutralReference, neutral_from_images


def known_reference(model: Model, settings: ExplainSettings) -> NeutralReference | None:
    """The weights' own, which holds at its layer, and for the log-odds of two classes, whichever is explained."""
    calibration = model.card.calibration if model.card else None
    if calibration is None or not calibration.reference or settings.output != "evidence" or len(model.classes) != 2:
        return None
    known = NeutralReference(**calibration.reference)
    return known if model.layer(known.layer) == model.layer(settings.layer) else None


def found_reference(model: Model, settings: ExplainSettings, batches: Iterable[Tensor]) -> NeutralReference:
    """One from images (B, 3, H, W) as the network takes them.

    Raises:
        ConfigError: the layer is the input, the class is not one, or the network answers all images alike.
        NetworkError: nothing between the images of either answer has log-odds 0.
    """
    layer, target = model.layer(settings.layer), model.target(settings.target)
    if layer is None:
        raise ConfigError("method 'deeplift': the input has no neutral reference; name a hidden layer, such as layer3")
    if target is None:
        if settings.output == "logit" or len(model.classes) > 2:
            raise ConfigError(
                "method 'deeplift': what is neutral depends on the class; name one as target: "
                f"{', '.join(model.classes)}"
            )
        target = len(model.classes) - 1  # what is neutral for one of two is so for the other
    # In the network's own log-odds, in which the point of calibrated ones of 0 is looked for.
    nothing = torch.zeros(1, len(model.classes), dtype=torch.float64)
    added = explained_output(model.calibrated(nothing), torch.tensor([target]), settings.output) * model.temperature
    return neutral_from_images(model.network, layer, batches, settings.output, target, float(added))
