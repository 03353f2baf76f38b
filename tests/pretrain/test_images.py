"""Images without labels: groups from tables and folders, images of one colour, what is held out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from medsd.cohort.patches import PatchDataset
from medsd.errors import DatasetError
from medsd.pretrain.images import UnlabelledImages, hold_out, read_images

SHARED = Path(__file__).parents[3] / "shared" / "data" / "pcam_unlabelled"


def image(path: Path, colour: int | None = None) -> None:
    """Noise, or one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.stem)).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(noise if colour is None else np.full((12, 10, 3), colour, np.uint8)).save(path)


def test_tables_name_groups_across_folders(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "one/unlisted.png", "two/images/c.png", "three/x/d.png", "three/y/e.png"):
        image(tmp_path / name)
    (tmp_path / "one" / "labels.csv").write_text("id,label,component,cluster\na,1,7,0\nb,,8,0\n")
    (tmp_path / "two" / "index.csv").write_text("id,component\nc,7\n")
    table = read_images([tmp_path / "one", tmp_path / "two", tmp_path / "three"], ["component", "folder"])
    assert [path.stem for path in table.paths] == ["a", "b", "c", "d", "e"] and set(table.label) == {-1}
    assert table.group[0] == table.group[2] != table.group[1]
    assert len(set(table.group.tolist())) == 4
    alone = read_images([tmp_path / "one", tmp_path / "three"])
    assert len(set(alone.group.tolist())) == len(alone.paths) == 4


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        ("id,label\na,1\n", ["slide"], r"labels\.csv: no column slide; check group_columns"),
        ("id,label\nz,1\n", [], r"labels\.csv: row 2: no patch named 'z'"),
        ("name,label\na,1\n", [], "no column id or file"),
        ("id,label\na,1\na,1\n", [], r"row 3: 'a' is also in row 2"),
        ("id,slide\na,\n", ["slide"], r"row 2: slide is empty; give every image a group"),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path: Path, table: str, columns: list[str], words: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DatasetError, match=words) as caught:
        read_images([tmp_path], columns)
    assert "\n" not in str(caught.value)


def test_a_table_may_name_files_and_masks_are_none_of_the_images(tmp_path: Path) -> None:
    for name in ("images/x/a.png", "images/y/a.png", "masks/x/a.png"):
        image(tmp_path / name)
    (tmp_path / "index.csv").write_text("file,mask,patient\nimages/y/a.png,m,7\nimages/x/a.png,masks/x/a.png,8\n")
    table = read_images([tmp_path], ["patient"])
    assert [path.parent.name for path in table.paths] == ["y", "x"]
    assert table.group.tolist() == ["patient: 7", "patient: 8"]
    (tmp_path / "index.csv").write_text("id,patient\na,7\n")
    with pytest.raises(DatasetError, match=r"row 2: 'a' is both .*; delete one"):
        read_images([tmp_path])


def test_an_image_below_two_of_the_folders_would_be_held_out_and_trained_on(tmp_path: Path) -> None:
    image(tmp_path / "one" / "a.png")
    for folders in ([tmp_path / "one", tmp_path], [tmp_path / "one"] * 2):
        with pytest.raises(DatasetError, match=r"a\.png: below two of the folders; .* image_dirs"):
            read_images(folders)


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no images"):
        read_images([tmp_path])
    with pytest.raises(DatasetError, match="nowhere: no such folder of images; check image_dirs"):
        read_images([tmp_path / "nowhere"])


def test_images_of_one_colour_are_left_out_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, colour in enumerate([None, 255, 0, None]):
        image(tmp_path / f"{number}" / f"{number}.png", colour)
    images = UnlabelledImages(PatchDataset(read_images([tmp_path], ["folder"]), side_px=8))
    with caplog.at_level(logging.WARNING):
        for item in (1, 2, 1):
            assert torch.equal(images[item]["image"], images[3]["image"])
            assert int(images[item]["group"]) == 3
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        str(tmp_path / name) for name in ("1/1.png", "2/2.png")
    ]
    assert images[0]["image"].shape == (3, 8, 8) and int(images[0]["group"]) == 0


def test_what_a_worker_told_is_not_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Workers start anew each epoch."""
    image(tmp_path / "a.png", colour=3)
    image(tmp_path / "b.png")
    images = UnlabelledImages(PatchDataset(read_images([tmp_path])))
    assert len(list(DataLoader(images, 2, num_workers=1))) == 1
    with caplog.at_level(logging.WARNING):
        _ = images[0]
    assert not caplog.records


def test_nothing_but_one_colour_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        image(tmp_path / f"{number}.png", 10 * number)
    with pytest.raises(DatasetError, match=r"1\.png: 64 images from here on are of one colour each"):
        UnlabelledImages(PatchDataset(read_images([tmp_path])))[1]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_whole_groups_are_held_out_up_to_their_share(sizes: list[int], share: float, seed: int) -> None:
    groups = np.repeat([f"g{number}" for number in range(len(sizes))], sizes)
    held_out = hold_out(groups, share, seed)
    assert 0 < held_out.sum() < len(groups)
    assert not set(groups[held_out]) & set(groups[~held_out])
    last = max(sizes)
    assert held_out.mean() >= share or len(set(groups[~held_out])) == 1
    assert held_out.sum() <= share * len(groups) + last


def test_one_group_cannot_be_held_out() -> None:
    with pytest.raises(DatasetError, match="at least 2 are needed"):
        hold_out(np.array(["a", "a"]), 0.5, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data are not here")
def test_real_patches_without_labels() -> None:
    table = read_images([SHARED], ["overlap_component"])
    images: Any = UnlabelledImages(PatchDataset(table, side_px=64))
    assert len(images) == 865 and len(set(table.group.tolist())) > 100
    assert images[0]["image"].shape == (3, 64, 64)
