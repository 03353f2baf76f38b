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

SCHEMA = json.loads(Path(__file__).with_name("meta_schema.json").read_text())


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
