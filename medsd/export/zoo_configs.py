"""The JSON files of a bundle in the shape of MONAI's model zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

import medsd
from medsd.export.source import TrainedClassifier
from medsd.networks.weights import ModelCard

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
VERSION = "0.1.0"
"""Of the bundle; what is exported is its first version."""

_PACKAGES = ("openslide-python", "pytorch-ignite", "safetensors", "scikit-image", "tifffile", "timm")
_NETWORKS = {"tile": "medsd.networks.classifier.TileClassifier", "aim": "medsd.networks.aim.AimClassifier"}
_EVALUATED = ("$", "@", "%")


def inference_config(trained: TrainedClassifier) -> dict[str, Any]:
    """`configs/inference.json`: maps of slides by default, and the classifier on their tiles as an evaluator.

    The maps are made by `medsd.heatmap` of `models/model.safetensors`, which holds what belongs to the weights (scale,
    threshold, neutral reference); the evaluator takes the plain `models/model.pt`.
    """
    card = trained.card
    calibration = card.calibration
    return {
        "_desc_": "Maps of slides; the stage 'tiles' writes the classes' probabilities of each tile to tiles.csv.",
        "imports": ["$import medsd.bundle as bundle"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/slides'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "weights": "$@bundle_root + '/models/model.safetensors'",
        "batch_size": 64,
        "workers": 0,
        "target": None,
        "block_px": None,
        "also": [],
        "faithful_tiles": 64,
        "temperature": 1.0 if calibration is None else calibration.temperature,
        "offset": [] if calibration is None else list(calibration.offset),
        "network_def": network_config(trained),
        "network": {
            "_target_": "medsd.bundle.inference.filled",
            "network": "@network_def",
            "state": "$@bundle_root + '/models/model.pt'",
            "device": "@device",
        },
        "grid": {
            "_target_": "medsd.cohort.index.TileGrid",
            "tile_px": card.tile_px,
            "stride_px": card.tile_px,
            "mpp": card.mpp,
        },
        "stain_target": card.stain_target,
        "data": {
            "_target_": "medsd.bundle.inference.FoundSlides",
            "dataset_dir": "@dataset_dir",
            "work_dir": "$@output_dir + '/prepared'",
            "grid": "@grid",
            "stain_target": "@stain_target",
            "target": "@target",
        },
        **_tile_evaluator(),
        "maps": ["$bundle.heatmap(@data, @output_dir, @device, @block_px, @also, @faithful_tiles, @workers, @weights)"],
        "check": ["$bundle.check_slides(@data, @output_dir)"],
        "initialize": ["$bundle.check()"],
        "run": ["@maps", "@check"] if calibration is not None else ["@tiles"],
    }


def _tile_evaluator() -> dict[str, Any]:
    """MONAI's evaluator of the tiles of `data`, and the stage `tiles` that runs it."""
    return {
        "dataset": "$@data.tiles()",
        "dataloader": {
            "_target_": "torch.utils.data.DataLoader",
            "dataset": "@dataset",
            "batch_size": "@batch_size",
            "num_workers": "@workers",
        },
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "medsd.bundle.inference.Calibrated",
            "temperature": "@temperature",
            "offset": "@offset",
        },
        "handlers": [
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": "tiles.csv",
                "batch_transform": "$lambda batch: batch",
                "output_transform": "$monai.handlers.from_engine(['pred'])",
            },
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "tiles": ["$@evaluator.run()"],
    }


def network_config(trained: TrainedClassifier) -> dict[str, Any]:
    """`network_def`: the network of the weights, to be filled by them."""
    card = trained.card
    return {
        "_target_": _NETWORKS[card.architecture],
        "encoder": card.encoder,
        "classes": list(card.classes),
        "input_mean": list(card.input_mean),
        "input_std": list(card.input_std),
        **card.options,
    }


def train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`configs/train.json`: a run's own configuration, of which places on its machine are taken out.

    Outputs go to `runs` in the bundle; what lay at an absolute path is looked for in its `data`, by name.
    """
    placed = {name: _placed(value) for name, value in config.items()}
    placed |= {"bundle_root": ".", "output_dir": "$@bundle_root + '/runs'"}
    if isinstance(config.get("phantom_dir"), str):
        placed["phantom_dir"] = "$@bundle_root + '/data/phantom'"
    if _is_place(config.get("dataset_dir")):
        placed["dataset_dir"] = f"$@bundle_root + '/data/{Path(config['dataset_dir']).name}'"
    return placed


def _placed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _placed(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(each) for each in value]
    if isinstance(value, str) and _is_place(value) and (Path(value).is_absolute() or PureWindowsPath(value).drive):
        return f"$@bundle_root + '/data/{PureWindowsPath(value).name}'"
    return value


def _is_place(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not value.startswith(_EVALUATED)


def metadata(trained: TrainedClassifier, name: str) -> dict[str, Any]:
    """`configs/metadata.json`, after MONAI's schema of 2024-07-25."""
    card = trained.card
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"exported by medsd {medsd.__version__}"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {"medsd": medsd.__version__, **{each: _version(each) for each in _PACKAGES}},
        "name": name,
        "task": f"Classification of tiles ({', '.join(card.classes)}) and saliency maps of whole-slide images",
        "description": f"Tile classifier ({card.encoder}) trained on {card.trained_on}; maps of slides",
        "authors": "not stated",
        "copyright": "not stated",
        "data_source": card.trained_on,
        "data_type": "whole-slide images",
        "image_classes": f"RGB brightfield, {card.tissue or 'tissue not stated'}, tiles of {card.tile_px} px at "
        f"{card.mpp:g} um per pixel",
        "label_classes": ", ".join(f"{number} {word}" for number, word in enumerate(card.classes)),
        "pred_classes": f"logits of {', '.join(card.classes)}",
        "intended_use": "research use only, not for diagnosis",
        "references": [],
        "network_data_format": _network_data_format(card),
    }


def _network_data_format(card: ModelCard) -> dict[str, Any]:
    """Of normalised tiles and logits."""
    normalised = [
        [(limit - mean) / std for limit in (0, 1)] for mean, std in zip(card.input_mean, card.input_std, strict=True)
    ]
    return {
        "inputs": {
            "image": {
                "type": "image",
                "format": "RGB",
                "num_channels": 3,
                "spatial_shape": [card.tile_px, card.tile_px],
                "dtype": "float32",
                "value_range": [
                    math.floor(min(low for low, _ in normalised)),
                    math.ceil(max(high for _, high in normalised)),
                ],
                "is_patch_data": True,
                "channel_def": {"0": "R", "1": "G", "2": "B"},
            }
        },
        "outputs": {
            "pred": {
                "type": "logits",
                "format": "classification",
                "num_channels": len(card.classes),
                "spatial_shape": [],
                "dtype": "float32",
                "value_range": [],
                "is_patch_data": True,
                "channel_def": {str(number): word for number, word in enumerate(card.classes)},
            }
        },
    }


def _version(package: str) -> str:
    return version(package).partition("+")[0]
