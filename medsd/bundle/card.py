"""The card of the weights that the stage finetune writes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch.utils.data import DataLoader

from medsd.bundle.data import Data
from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import DatasetError
from medsd.evaluate.temperature import fit_scaling, fit_temperature
from medsd.files import as_json
from medsd.heatmap.appearance import appearance_card
from medsd.heatmap.engine import make_engine
from medsd.heatmap.faithfulness import randomised_card
from medsd.heatmap.maps import MapSettings
from medsd.networks.calibrated import Calibration, class_offset
from medsd.networks.classifier import Classifier
from medsd.networks.memory import freed_memory_kept
from medsd.networks.start import weights_sha256
from medsd.networks.weights import ModelCard
from medsd.progress import progress_bar
from medsd.training.predict import collect

logger = logging.getLogger(__name__)


def card_of(
    network: Classifier,
    data: Data,
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator,
    map_settings: MapSettings,
    settings: dict[str, Any],
    learnt: tuple[str, ...],
) -> ModelCard:
    """What goes with the weights of the stage finetune, with what validation data fix; `learnt`: see `learnt_from`."""
    with freed_memory_kept():
        logits, labels = collect(network, evaluator.data_loader, progress_bar("calibrate"))
    sampler = cast(DataLoader[Any], trainer.data_loader).sampler
    drawn, tissue = cast(SlideGroupedSampler, sampler).class_shares, data.tissue_shares()
    if tissue:
        temperature, bias = fit_scaling(logits, labels, drawn)
    else:
        logger.warning("probabilities stay those of the training's class shares: validation tissue lacks a class")
        temperature, bias = fit_temperature(logits, labels), ()
    offset = class_offset(drawn, tissue, bias)

    def fixed(target: int) -> Calibration:
        engine = make_engine(network, data.tile_px, data.mpp, target, map_settings, temperature, offset=offset)
        return replace(data.calibrate(engine), drawn_shares=drawn, tissue_shares=tissue, bias=bias)

    calibration, others = fixed(1), dict[str, Calibration]()
    for number, name in enumerate(network.classes[2:], start=2):
        try:
            others[name] = fixed(number)
        except DatasetError as reason:
            logger.warning("class '%s' cannot be mapped with these weights: %s", name, reason)
    validation = data.part("validation")
    return ModelCard(
        encoder=network.encoder_name,
        classes=network.classes,
        tile_px=data.tile_px,
        mpp=data.mpp,
        trained_on=data.description,
        tissue=data.tissue,
        start=_start_of(network),
        calibration=calibration,
        data_sha256=settings["data"]["split"],
        settings_sha256=sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        # Through JSON, as the card goes: tuples are lists there.
        stain_target=None if data.stain_target is None else as_json(data.stain_target),
        architecture=network.architecture,
        options=network.options,
        others=others,
        randomised=randomised_card(network, calibration, validation, validation.labels),
        appearance=appearance_card(validation, len(validation.labels)),
        learnt_from=learnt,
        **input_of(network),
    )


def input_of(network: Classifier) -> dict[str, Any]:
    return {"input_mean": network.normalise.input_mean, "input_std": network.normalise.input_std}


def _start_of(network: Classifier) -> str:
    """What the encoder started from, in words."""
    if network.encoder_weights is None:
        return "ImageNet weights (timm)" if network.pretrained else "random weights"
    path = Path(network.encoder_weights)
    return f"{path.name}, SHA-256 {weights_sha256(path)}"
