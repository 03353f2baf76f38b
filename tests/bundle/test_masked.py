"""A folder of images with masks: each pair read and cropped alike, groups whole, bad rows named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medsd.bundle.masked import MaskedFolder
from medsd.errors import ConfigError, DatasetError, MedsdError

SIDE = 32


def write_masked(folder: Path, groups: int = 5, side: int = SIDE + 6, rows: tuple[str, ...] = ()) -> Path:
    """Two images a group, dark where their mask is set: whole cells of 8 px once the middle is cropped."""
    draws = np.random.default_rng(0)
    (folder / "masks").mkdir(parents=True)
    lines = ["file,mask,patient"]
    for number in range(2 * groups):
        mask = np.zeros((side, side), np.uint8)
        inside = mask[3 : 3 + SIDE, 3 : 3 + SIDE]
        inside[...] = np.kron(draws.integers(2, size=(4, 4)), np.ones((8, 8)))[: inside.shape[0], : inside.shape[1]]
        pixels = np.where(mask[..., None] > 0, 60, 200) + draws.integers(-20, 20, (side, side, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask * 255).save(folder / "masks" / f"{number}.png")
        lines.append(f"{number}.png,masks/{number}.png,p{number // 2}")
    (folder / "index.csv").write_text("\n".join([*lines, *rows]) + "\n")
    return folder


def encoder() -> nn.Module:
    """Mean colours of squares of 8 px."""
    network = nn.Conv2d(3, 3, 8, 8, bias=False)
    network.weight.data.copy_(torch.eye(3)[..., None, None].expand(-1, -1, 8, 8) / 64)
    return network


def test_a_mask_that_is_the_colour_is_found_in_groups_that_were_not_learnt_from(tmp_path: Path) -> None:
    found = MaskedFolder(str(write_masked(tmp_path)), "patient", SIDE).scores(encoder())
    assert (found.images, found.groups, found.stride) == (4, 2, 8)
    assert found.dice.value > 0.97 * found.oracle.value > 0.8
    assert found.dice == MaskedFolder(str(tmp_path), "patient", SIDE).scores(encoder()).dice


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gone.png,masks/0.png,p9", r"row 12: no file .*gone\.png in the folder"),
        ("../outside.png,masks/0.png,p9", r"row 12: no file .*outside\.png in the folder"),
        ("extra.png,small.png,p9", r"small\.png: 8 x 8 px, its image 38 x 38"),
        (
            "small.png,small2.png,p9",
            r"small\.png: 8 x 8 px is smaller than masked::side_px=32; lower it",
        ),
    ],
)
def test_a_bad_row_is_told_in_a_line(tmp_path: Path, row: str, message: str) -> None:
    folder = write_masked(tmp_path / "masked", rows=(row,))
    for path in (folder.parent / "outside.png", folder / "small.png", folder / "small2.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    Image.fromarray(np.zeros((SIDE + 6, SIDE + 6), np.uint8)).save(folder / "extra.png")
    with pytest.raises(DatasetError, match=message) as told:
        MaskedFolder(str(folder), "patient", SIDE).scores(encoder())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masked_dir": None}, ConfigError, "masked_dir: not set"),
        ({"masked_dir": "gone"}, DatasetError, "gone: no such folder; set masked_dir"),
        ({"group_column": "slide"}, DatasetError, "slide"),
        ({"side_px": 4}, ConfigError, "side_px=4"),
        ({"held_out": 1.0}, ConfigError, r"held_out=1\.0"),
    ],
)
def test_bad_settings_are_told_in_a_line(
    tmp_path: Path, change: dict[str, object], error: type[MedsdError], message: str
) -> None:
    given = {"masked_dir": str(write_masked(tmp_path, groups=2)), "group_column": "patient", "side_px": SIDE, **change}
    with pytest.raises(error, match=message):
        MaskedFolder(**given).scores(encoder())  # type: ignore[arg-type]
