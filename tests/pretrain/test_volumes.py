"""CT volumes become grey slices: window, orientation, every third slice, records."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from medsd.errors import ConfigError, DatasetError
from medsd.pretrain.images import UnlabelledImages
from medsd.pretrain.volumes import SliceDataset, SliceSettings, prepare_volumes, slices_of

SMALL = SliceSettings(side_px=16)


def volume(path: Path, shape: tuple[int, int, int] = (16, 16, 10)) -> np.ndarray:
    """Hounsfield units from -1,000 to 1,000 at random, x to the left, y to the back, z upwards."""
    values = np.random.default_rng(len(path.stem)).integers(-1000, 1000, shape).astype(np.int16)
    np.save(path, values)
    return values


def test_slices_are_the_windowed_planes_in_rows_and_columns(tmp_path: Path) -> None:
    values = volume(tmp_path / "a.npy").astype(float)
    slices = slices_of(tmp_path / "a.npy", SMALL)
    assert slices.shape == (4, 16, 16) and slices.dtype == np.uint8
    for number, z in enumerate((0, 3, 6, 9)):
        x, y = 5, 11
        grey = min(max((values[x, y, z] + 125) / 400, 0), 1) * 255
        assert slices[number, y, x] == round(grey)
    assert len(slices_of(tmp_path / "a.npy", SliceSettings(every=1, side_px=16))) == 10


def test_other_sizes_are_padded_with_the_lower_end_and_resampled(tmp_path: Path) -> None:
    values = np.full((32, 16, 1), 275.0)
    values[0, 8] = 270  # not of one colour
    np.save(tmp_path / "a.npy", values)
    rows = slices_of(tmp_path / "a.npy", SliceSettings(side_px=16))[0, :, 8]  # resampling mixes rows 3, 4, 11 and 12
    assert rows[:3].tolist() == rows[13:].tolist() == [0] * 3 and rows[5:11].tolist() == [255] * 6


def test_slices_without_anything_are_left_out(tmp_path: Path) -> None:
    values = volume(tmp_path / "a.npy")
    values[:, :, 3] = -1000
    np.save(tmp_path / "a.npy", values)
    assert len(slices_of(tmp_path / "a.npy", SMALL)) == 3
    np.save(tmp_path / "b.npy", np.full((8, 8, 8), -1000))
    with pytest.raises(DatasetError, match=r"b\.npy: no slice has anything between -125 and 275 HU; is it CT\?"):
        slices_of(tmp_path / "b.npy", SMALL)


@pytest.mark.parametrize("content", [np.zeros((4, 4)), np.full((4, 4, 4), np.nan)])
def test_what_is_no_volume_is_named(tmp_path: Path, content: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DatasetError, match=r"a\.npy: ") as caught:
        slices_of(tmp_path / "a.npy", SMALL)
    assert "\n" not in str(caught.value)


def test_a_bad_volume_costs_itself_and_done_ones_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [tmp_path / f"{name}.npy" for name in ("one", "second")]
    for path in paths:
        volume(path)
    (tmp_path / "bad.npy").write_bytes(b"no volume")
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        made = prepare_volumes([paths[0], tmp_path / "bad.npy", paths[1]], out, SMALL)
    assert made == [out / "one.npy", out / "second.npy"]
    (warning,) = [record.getMessage() for record in caplog.records if "bad.npy" in record.getMessage()]
    assert warning.endswith("left out") and "\n" not in warning
    before = made[0].stat().st_mtime_ns
    prepare_volumes(paths, out, SMALL)
    assert made[0].stat().st_mtime_ns == before
    digest = SliceDataset(made).fingerprint()
    os.utime(paths[0], (1, 1))  # as a copy has another time
    prepare_volumes(paths, out, SMALL)
    assert SliceDataset(made).fingerprint() == digest and made[0].stat().st_mtime_ns > before
    before = made[0].stat().st_mtime_ns
    prepare_volumes(paths, out, SliceSettings(every=2, side_px=16))
    assert made[0].stat().st_mtime_ns > before and SliceDataset(made).fingerprint() != digest
    with pytest.raises(DatasetError, match="no volume could be read"):
        prepare_volumes([tmp_path / "bad.npy"], tmp_path / "other", SMALL)


def test_volumes_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "one.npy", tmp_path / "other" / "one.npy"]
    for path in paths:
        volume(path)
    with pytest.raises(DatasetError, match=r"other/one\.npy: .*one\.npy has the name one, too; rename one, or move"):
        prepare_volumes(paths, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_volume_is_a_group_and_its_slices_are_grey(tmp_path: Path) -> None:
    for name in ("one", "second"):
        volume(tmp_path / f"{name}.npy")
    images = UnlabelledImages(SliceDataset(prepare_volumes(sorted(tmp_path.glob("*.npy")), tmp_path / "out", SMALL)))
    assert len(images) == 8 and images.groups.tolist() == ["one"] * 4 + ["second"] * 4
    sample = images[5]
    assert int(sample["group"]) == 1 and sample["image"].shape == (3, 16, 16)
    assert (sample["image"][0] == sample["image"][2]).all()
    np.testing.assert_array_equal(sample["image"][0], slices_of(tmp_path / "second.npy", SMALL)[1])
    assert images.place(5).endswith("second.npy: slice 1")
    with pytest.raises(DatasetError, match="run the stage 'prepare' again"):
        SliceDataset([tmp_path / "none.npy"])


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("window", window) for window in ((275, -125), (1,), 5, ("a", "b"), "12")), ("every", 0), ("side_px", 4)],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        SliceSettings(**{name: value})  # type: ignore[arg-type]


def test_a_nifti_is_turned_to_left_and_back(tmp_path: Path) -> None:
    import nibabel

    values = volume(tmp_path / "a.npy")
    for name, flipped, affine in (
        ("ras", values[::-1, ::-1], np.diag([1.0, 1, 1, 1])),
        ("lps", values, np.diag([-1.0, -1, 1, 1])),
    ):
        nibabel.save(nibabel.Nifti1Image(flipped, affine), tmp_path / f"{name}.nii.gz")
        found = slices_of(tmp_path / f"{name}.nii.gz", SMALL)
        np.testing.assert_array_equal(found, slices_of(tmp_path / "a.npy", SMALL), err_msg=name)


def test_several_volumes_in_a_file_are_refused(tmp_path: Path) -> None:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 8, 2), 50, np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DatasetError, match=r"a\.nii\.gz: 2 volumes in one file"):
        slices_of(tmp_path / "a.nii.gz", SMALL)
    (tmp_path / "b.nii.gz").write_bytes(b"no volume")
    with pytest.raises(DatasetError, match=r"b\.nii\.gz: cannot be read as a volume \([^.]*b\.nii\.gz\.?\); copy"):
        slices_of(tmp_path / "b.nii.gz", SMALL)


def test_names_with_dots_are_names(tmp_path: Path) -> None:
    """Those of DICOM series are nothing else."""
    paths = [tmp_path / f"1.2.840.{number}.npy" for number in (1, 2)]
    for path in paths:
        volume(path)
    assert [path.name for path in prepare_volumes(paths, tmp_path / "out", SMALL)] == [path.name for path in paths]


def test_without_nibabel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsd.pretrain.volumes.find_spec", lambda _name: None)
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.nii\.gz: reading NIfTI needs nibabel; .* extra 'ct'"):
        slices_of(tmp_path / "a.nii.gz", SMALL)
