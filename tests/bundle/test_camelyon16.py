"""The recipe for the real CAMELYON16, tried on phantoms in both of its official layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigParser

from medsd.phantom import write_phantom_dataset

ROOT = Path(__file__).parents[2]
FILES = [str(ROOT / "bundles" / "camelyon.json"), str(ROOT / "configs" / "camelyon16.json")]


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms as the challenge gave CAMELYON16."""
    folder = tmp_path_factory.mktemp("challenge")
    write_phantom_dataset(folder / "made", slides=6, size_px=1024, mpp=0.25)
    for part in ("training", "testing"):
        shutil.copytree(folder / "made" / part, folder / "data" / part)
    (folder / "data" / "README.md").write_text("# CAMELYON16 Data Set\n")
    return folder / "data"


@pytest.fixture(scope="module")
def bucket(challenge: Path) -> Path:
    """The same phantoms as the open bucket has them."""
    folder = challenge.parent / "bucket"
    for kind, place in (("*.tif", "images"), ("*.xml", "annotations")):
        (folder / place).mkdir(parents=True)
        for path in sorted(challenge.rglob(kind)):
            shutil.copy(path, folder / place)
    rows = (challenge / "testing" / "reference.csv").read_text().split()[1:]
    classes = [row.replace(",tumor", ".tif,test,micro,0").replace(",normal", ".tif,test,negative,1") for row in rows]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "reference.csv").write_text("\n".join(["image,type,class,center", *classes]) + "\n")
    return folder


def parsed(**overrides: Any) -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_files(FILES))
    parser.update({"bundle_root": str(ROOT), **overrides})
    return parser


def test_the_recipe_asks_for_what_the_real_set_needs() -> None:
    parser = parsed()
    keys = ("tile_px", "stride_px", "mpp", "encoder", "pretrained", "cache", "amp", "accumulation", "frozen")
    values = {key: parser.get_parsed_content(key) for key in (*keys, "layer_decay", "patience", "encoder_weights")}
    assert values["mpp"] == 0.25 and values["tile_px"] == values["stride_px"] == 256  # the winners' tiles
    assert values["cache"] is False  # ten million tiles fit no memory
    assert values["amp"] in ("bfloat16", "float16", "none") and values["accumulation"] == 1
    assert values["frozen"] == [] and values["layer_decay"] == 1.0
    assert values["patience"] is None and values["encoder_weights"] is None
    epochs, hard = (parser.get_parsed_content(key) for key in ("max_epochs", "hard_negative_epoch"))
    assert 0 < hard < epochs and 0 < parser.get_parsed_content("hard_negative_share") < 1
    # A batch of fewer than eight runs takes the class out of it, see SlideGroupedSampler.
    assert parser.get_parsed_content("batch_size") / parser.get_parsed_content("tiles_in_a_row") >= 8


def test_the_data_stage_runs(bucket: Path, tmp_path: Path) -> None:
    tile_px = 128
    parser = parsed(
        dataset_dir=str(bucket),
        output_dir=str(tmp_path),
        tile_px=tile_px,
        stride_px=tile_px,
        batch_size=8,
        tiles_in_a_row=1,
        validation_samples=24,
        samples_per_epoch=16,
        workers=0,
    )
    data = parser.get_parsed_content("data")
    assert data.grid.min_tissue == 0.25 and data.mpp == 0.25
    data.prepare()
    sizes = {part: np.bincount(data.part(part).labels, minlength=2) for part in ("training", "validation", "testing")}
    assert all((counts > 0).all() for counts in sizes.values()), sizes
    assert [slide.label for slide in data.test_slides()] == [1, 0]
    batches = list(parser.get_parsed_content("validate::dataloader"))
    assert len(batches) == 3 and batches[0]["image"].shape == (8, 3, tile_px, tile_px)
    assert sum(int(batch["label"].sum()) for batch in batches) == 12
    assert parser.get_parsed_content("train::sampler").run == 1


def test_both_layouts_give_the_same_slides(challenge: Path, bucket: Path) -> None:
    """What is prepared of them is the same, then."""
    first, second = (
        [(slide.name, slide.label, slide.part, slide.annotation and slide.annotation.name) for slide in found]
        for found in (slides_of(challenge), slides_of(bucket))
    )
    assert first == second and len(first) == 6


def slides_of(folder: Path) -> Any:
    return parsed(dataset_dir=str(folder)).get_parsed_content("data")._slides
