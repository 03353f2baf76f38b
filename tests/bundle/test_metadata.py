"""bundles/metadata.json says what MONAI's metadata schema asks for, and says the truth."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import torch

import medsd
from medsd.networks.classifier import TileClassifier

ROOT = Path(__file__).parents[2]
METADATA = json.loads((ROOT / "bundles" / "metadata.json").read_text())

# Required keys of MONAI's meta_schema_20240725, written anew from its published description.
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array"},
        "value_range": {"type": "array"},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
SCHEMA = {
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "required_packages_version": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                side: {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
                for side in ("inputs", "outputs")
            },
        },
    },
}


def test_metadata_fits_the_schema():
    jsonschema.validate(METADATA, SCHEMA)
    assert METADATA["version"] == medsd.__version__ and METADATA["version"] in METADATA["changelog"]


def test_versions_are_those_of_the_constraints():
    for package, key in (("monai", "monai_version"), ("torch", "pytorch_version"), ("numpy", "numpy_version")):
        assert METADATA[key] == version(package).split("+")[0]
    for package, wanted in METADATA["required_packages_version"].items():
        assert version(package) == wanted, package


def test_the_network_takes_and_gives_what_is_written():
    written = METADATA["network_data_format"]
    image, pred = written["inputs"]["image"], written["outputs"]["pred"]
    network = TileClassifier("test_resnet").eval()
    with torch.inference_mode():
        logits = network(torch.zeros(2, image["num_channels"], 64, 96))
    assert logits.shape == (2, pred["num_channels"]) and str(logits.dtype) == f"torch.{pred['dtype']}"
    assert tuple(pred["channel_def"].values()) == network.classes


def test_constraints_name_packages_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        assert name and pinned and not any(mark in line for mark in ("/", "@", " ", "--"))
