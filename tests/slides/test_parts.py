"""Which files a slide is made of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import Dataset

from medsd.slides.parts import dicom_series, files_of, slide_identity, slide_sha256


def of_one_file(folder: Path, _data: Path) -> tuple[Path, Path]:
    (folder / "slide.svs").write_text("pixels")
    return folder / "slide.svs", folder / "slide.svs"


def of_ngff(folder: Path, _data: Path) -> tuple[Path, Path]:
    (folder / "slide.zarr/0/4").mkdir(parents=True)
    (folder / "slide.zarr/0/4/7").write_text("chunk")
    return folder / "slide.zarr", folder / "slide.zarr/0/4/7"


def of_mirax(folder: Path, _data: Path) -> tuple[Path, Path]:
    (folder / "slide").mkdir()
    (folder / "slide/Data0001.dat").write_text("tiles")
    (folder / "slide.mrxs").write_text("picture")
    return folder / "slide.mrxs", folder / "slide/Data0001.dat"


def of_hamamatsu(folder: Path, _data: Path) -> tuple[Path, Path]:
    (folder / "one.jpg").write_text("tiles")
    (folder / "slide.vms").write_text("[Virtual Microscope Specimen]\r\nImageFile=one.jpg\r\nMapFile=../x.jpg\r\n")
    return folder / "slide.vms", folder / "one.jpg"


def of_dicom(folder: Path, data: Path) -> tuple[Path, Path]:
    for name in ("boxes_0.dcm", "boxes_1.dcm", "sm_image.dcm"):
        shutil.copyfile(data / "wsi" / name, folder / name)
    assert files_of(folder / "sm_image.dcm") == [folder / "sm_image.dcm"]
    return folder / "boxes_0.dcm", folder / "boxes_1.dcm"


@pytest.mark.parametrize("of", [of_one_file, of_ngff, of_mirax, of_hamamatsu, of_dicom])
def test_a_change_of_any_file_is_one_of_the_slide(
    of: Callable[[Path, Path], tuple[Path, Path]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    slide, part = of(tmp_path, request.getfixturevalue("shared_data") if of is of_dicom else tmp_path)
    before, digest = slide_identity(slide), slide_sha256(slide)
    (tmp_path / "other.svs").touch()
    assert slide_identity(slide) == before == json.loads(json.dumps(before)) and len(json.dumps(before)) < 400
    os.utime(part, ns=(1, 1))
    assert slide_identity(slide) != before and slide_sha256(slide) == digest
    if of is not of_dicom:
        part.write_text(part.read_text().upper())
        assert slide_sha256(slide) != digest


def test_headers_that_are_none_and_pipes_are_of_no_series(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 64)
    (tmp_path / "b.dcm").symlink_to("b.dcm")
    os.mkfifo(tmp_path / "c.dcm")  # opening one for reading waits for a writer
    assert [dicom_series(tmp_path / f"{name}.dcm") for name in "abcd"] == [""] * 4


def test_a_series_is_known_whatever_the_length_of_its_headers(tmp_path: Path) -> None:
    """Places of frames are a sequence of undefined length, which cannot be read where it is cut."""
    files = [tmp_path / "label.dcm", tmp_path / "volume.dcm"]
    for path in files:
        found, frames = Dataset(), Dataset()
        frames.ICCProfile = b"\0" * 2**21
        found.SeriesInstanceUID, found.PerFrameFunctionalGroupsSequence = "1.2.3", [frames]
        found["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
        found.preamble = b"\0" * 128
        found.save_as(path, implicit_vr=False, little_endian=True)
    assert dicom_series(files[1]) == "1.2.3" and files_of(files[1]) == files[::-1]
