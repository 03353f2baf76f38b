"""Labelled CT volumes: slices and labels stay together, and go back to the volume's own size."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medsd.errors import DatasetError
from medsd.pretrain.volumes import SliceSettings
from medsd.segment.masks import MaskCoding
from medsd.segment.volumes import MaskedSlices, find_volumes, from_square, prepare_labelled, to_square

CODING = MaskCoding(("background", "liver", "aorta"), values=(0, 6, 8))
SETTINGS = SliceSettings(every=1, side_px=32)


def write_volumes(folder: Path, cases: tuple[int, ...] = (1, 2, 5), nifti: bool = False) -> Path:
    """Bright blocks of organs 6, 8 and 3 in noise; x to the left, y to the back; 2 x 2 x 5 mm as NIfTI."""
    (folder / "img").mkdir(parents=True)
    (folder / "label").mkdir()
    for case in cases:
        draws = np.random.default_rng(case)
        labels = np.zeros((20, 16, 6), np.int16)
        labels[2:8, 2:10, 1:4], labels[12:16, 4:8, 2:5], labels[17:, 12:, 0:2] = 6, 8, 3
        values = (draws.integers(-100, -50, labels.shape) + 40 * labels).astype(np.int16)
        for word, array in (("img", values), ("label", labels)):
            path = folder / word / f"{word}{case:04d}"
            if nifti:
                nibabel = pytest.importorskip("nibabel")
                # RAS+ affine: first axis to the right, second to the front.
                flipped = array[::-1, ::-1]
                nibabel.save(nibabel.Nifti1Image(flipped, np.diag([2.0, 2.0, 5.0, 1.0])), f"{path}.nii.gz")
            else:
                np.save(f"{path}.npy", array)
    return folder


@pytest.mark.parametrize("nifti", [False, True])
def test_slices_and_labels_stay_together(tmp_path: Path, nifti: bool) -> None:
    volumes = find_volumes(write_volumes(tmp_path / "ct", nifti=nifti))
    assert [each.name for each in volumes] == ["0001", "0002", "0005"]
    files = prepare_labelled(volumes, tmp_path / "work", SETTINGS, CODING)
    items = MaskedSlices(files)
    assert len(items) == 18 and len(MaskedSlices(files, foreground_only=True)) == 12  # z 1 to 4
    assert items.spacing(0) == ((5.0, 2.0, 2.0) if nifti else (1.0, 1.0, 1.0))
    label = items.label(8)  # the second volume's z 2
    assert label.shape == (16, 20) and label[5, 5] == 1 and label[5, 13] == 2 and label[13, 18] == 0
    sample = items[8]
    grey = sample["image"][0].float()
    inside = [grey[sample["label"][0] == number] for number in range(3)]
    assert inside[1].mean() > inside[0].mean() + 50 and inside[2].mean() > inside[1].mean() + 20
    restored = from_square(sample["label"][0], *label.shape)
    assert (restored.numpy() == label).mean() > 0.97
    before = files[0].stat().st_mtime_ns
    prepare_labelled(volumes, tmp_path / "work", SETTINGS, CODING)
    assert files[0].stat().st_mtime_ns == before


def test_a_square_and_back_is_the_same_where_sizes_are_whole_multiples() -> None:
    numbers = torch.randint(5, (24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for side in (40, 80, 120):
        assert torch.equal(from_square(to_square(numbers, side), 24, 40), numbers)


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-2.0, -2.0, 5.0, 1.0]), np.diag([2.0, 2.0, 4.0, 1.0])])
def test_labels_that_lie_elsewhere_than_their_volume_are_refused(tmp_path: Path, affine: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel")
    volumes = find_volumes(write_volumes(tmp_path / "ct", nifti=True))
    labels = nibabel.load(volumes[0].labels)
    rounded = labels.affine + 0.01  # as of programs that keep it as angles
    nibabel.save(nibabel.Nifti1Image(labels.get_fdata(), rounded), volumes[0].labels)
    nibabel.save(nibabel.Nifti1Image(labels.get_fdata(), affine), volumes[1].labels)
    with pytest.raises(DatasetError, match=r"label0002\.nii\.gz: these labels lie elsewhere .*save them"):
        prepare_labelled(volumes, tmp_path / "work", SETTINGS, CODING)
    assert (tmp_path / "work" / "0001.npy").exists()


def test_half_a_data_set_is_refused(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "ct")
    extra = folder / "label" / "label0009.npy"
    shutil.copy(folder / "label" / "label0001.npy", extra)
    with pytest.raises(DatasetError, match=r"label0009\.npy: no img0009\.nii\.gz below"):
        find_volumes(folder)
    extra.unlink()
    (folder / "label" / "label0002.npy").unlink()
    with pytest.raises(DatasetError, match=r"img0002\.npy: no label0002\.nii\.gz below"):
        find_volumes(folder)
    for content, words in ((np.zeros((20, 16, 5)), r"labels \(20, 16, 5\) of a volume \(20, 16, 6\)"),
                           (np.full((20, 16, 6), 0.5), "no numbers of organs")):  # fmt: skip
        np.save(folder / "label" / "label0002.npy", content)
        with pytest.raises(DatasetError, match=rf"label0002\.npy: .*{words}"):
            prepare_labelled(find_volumes(folder), tmp_path / "work", SETTINGS, CODING)
    with pytest.raises(DatasetError, match="nowhere: no such folder; set dataset_dir"):
        find_volumes(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no volumes named img"):
        find_volumes(tmp_path / "work")
