#!/usr/bin/env python
"""Draws the pictures of docs/ that show maps of real tissue.

    python scripts/draw_pictures.py DATA --weights runs/pcam/model.safetensors

DATA holds `bcss_tumour_regions/images/1008.jpg` (a field of breast cancer, BCSS, CC0) and `pcam_patches` (lymph node,
PatchCamelyon, CC0); the weights are those of `configs/pcam.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medsd.cohort.entry import SlideEntry
from medsd.cohort.patches import read_patch_table
from medsd.drawing import Canvas, resized
from medsd.errors import MedsdError
from medsd.files import atomic_path
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.folder import OVERLAY
from medsd.heatmap.model import MapRequest
from medsd.networks.weights import load_classifier
from medsd.objectives.masking import mask_lowest, pixel_scores

_FIELD, _FIELD_MPP = "bcss_tumour_regions/images/1008.jpg", 0.25
_PATCHES, _SHOWN_PX, _GAP_PX, _TEXT_PX = 6, 192, 10, 22
# Of SaliencyDecor's defaults.
_SHARE = 0.2
_WIDTH_PX, _QUALITY = 1400, 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    try:
        field = arguments.data / _FIELD
        draw_map(field, arguments.weights, (), arguments.out / "map.jpg")
        draw_map(field, arguments.weights, ("gradient", "gradcam", "tsm"), arguments.out / "methods" / "local.jpg")
        draw_masked(arguments.data / "pcam_patches", arguments.weights, arguments.out / "methods" / "masked.jpg")
    except MedsdError as error:
        sys.exit(f"draw_pictures: {error}")


def draw_map(field: Path, weights: Path, methods: tuple[str, ...], path: Path) -> None:
    """The overview that `medsd heatmap` leaves of a field, smaller; no methods are those of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        entry = SlideEntry("BCSS_1008", field, mpp=_FIELD_MPP)
        (row,) = map_slides([entry], weights, folder, MapRequest(methods=methods, faithful_tiles=0))
        if row.status != "ok":
            sys.exit(f"draw_pictures: {row.reason}")
        with Image.open(Path(folder) / entry.name / OVERLAY) as overlay:
            save(overlay.convert("RGB"), path)


def draw_masked(patches: Path, weights: Path, path: Path) -> None:
    """Patches as read, and as the consistency term sees them: the pixels that matter least filled with the mean."""
    classifier = load_classifier(weights)[0]
    table = read_patch_table(patches, "stain_cluster")
    rows = np.linspace(0, len(table.paths) - 1, _PATCHES).round().astype(int)
    images = np.stack([table.pixels(row) for row in rows])
    normalise = classifier.normalise
    x = normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
    scores = pixel_scores(classifier, x, torch.from_numpy(table.label[rows]).long(), "absolute")
    masked = (mask_lowest(x, scores, _SHARE, "mean", None) * normalise.std + normalise.mean) * 255
    seen = masked.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    step = _SHOWN_PX + _GAP_PX
    canvas = Canvas(_PATCHES * step + _GAP_PX, 2 * (step + _TEXT_PX) + _GAP_PX)
    for line, (words, shown) in enumerate((("As read", images), (f"{_SHARE:.0%} of the pixels masked", seen))):
        top = line * (step + _TEXT_PX) + _TEXT_PX
        canvas.text(_GAP_PX, top, words, 14, bold=True)
        for number, pixels in enumerate(shown):
            square = resized(pixels, _SHOWN_PX, _SHOWN_PX, Image.Resampling.NEAREST)
            canvas.paste(square, _GAP_PX + number * step, top + _GAP_PX)
    save(canvas.image, path)


def save(picture: Image.Image, path: Path) -> None:
    """A JPEG for pages, at most 1,400 px wide."""
    picture.thumbnail((_WIDTH_PX, _WIDTH_PX))
    with atomic_path(path) as temporary:
        picture.save(temporary, "JPEG", quality=_QUALITY, optimize=True)


if __name__ == "__main__":
    main()
