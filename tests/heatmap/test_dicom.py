"""Maps as DICOM, read back by highdicom and pydicom alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import shapely

from medsd.errors import ConfigError, SlideError
from medsd.heatmap.dicom import Origin, region_mask, write_dicom
from medsd.heatmap.model import MapRequest
from medsd.heatmap.overlay import Findings, MappedSlide, shown_explanation
from medsd.heatmap.regions import find_regions
from medsd.heatmap.value_map import ValueMap
from medsd.slides.slide import open_slide

MADE = Origin("test_resnet", "ab" * 32, "cd" * 32)


def mapped_of(slide: Any, seed: int = 0) -> MappedSlide:
    """Random maps: evidence of squares of 4 level-0 px, probability of 8."""
    rng = np.random.default_rng(seed)

    def drawn(side: int, quantity: str) -> ValueMap:
        width, height = (-(-length // side) for length in slide.dimensions)
        values = rng.normal(size=(height, width)).astype(np.float32)
        values = values if quantity == "saliency" else 1 / (1 + np.exp(-2 * values))
        values[rng.random(values.shape) < 0.2] = np.nan
        return ValueMap(values, side, side * slide.mpp, quantity, "tumour", "drawn", "log-odds", "Means little.")

    probability, evidence = drawn(8, "probability"), drawn(4, "saliency")
    regions = find_regions(probability, 0.6, slide.mpp, slide.dimensions)
    return MappedSlide(
        name=slide.path.stem,
        model="Classifier",
        misfits=[],
        dimensions=slide.dimensions,
        mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        thumbnail=np.zeros((8, 8, 3), np.uint8),
        thumbnail_level0_px=1.0,
        damaged=False,
        explanations=[shown_explanation("deeplift", evidence, 2.0, "")],
        findings=Findings(probability, 0.6, "fixed on some", regions, [], 0.5, ("Below.",)),
        provenance={},
        caveats=[],
    )


def matrix(path: Path) -> np.ndarray:
    """The total pixel matrix, put together from the frames by what the file says of their places, 0 elsewhere."""
    found = pydicom.dcmread(path)
    rows, columns = found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns
    whole = np.zeros((rows + found.Rows, columns + found.Columns), np.float32)
    frames = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    for frame, groups in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        place = groups.PlanePositionSlideSequence[0]
        top, left = place.RowPositionInTotalImagePixelMatrix - 1, place.ColumnPositionInTotalImagePixelMatrix - 1
        whole[top : top + found.Rows, left : left + found.Columns] = frame
    return whole[:rows, :columns]


@pytest.fixture(scope="module")
def of_tiff(tmp_path_factory: pytest.TempPathFactory, coding: Any) -> tuple[Path, MappedSlide]:
    folder = tmp_path_factory.mktemp("dicom")
    path = coding.write_coded(folder / "Name^of a\\slide.tif", 1210, 1100, 2).path
    with open_slide(path) as slide:
        mapped = mapped_of(slide)
        assert write_dicom(folder, slide, mapped, MADE) == ["probability.dcm", "saliency.dcm", "regions.dcm"]
    return folder, mapped


def test_values_come_back(of_tiff: tuple[Path, MappedSlide]) -> None:
    folder, mapped = of_tiff
    for shown, name in zip(mapped.maps, ("probability", "saliency"), strict=True):
        expected = shown.value_map.values
        np.testing.assert_array_equal(matrix(folder / f"{name}.dcm"), expected)
        read = highdicom.imread(folder / f"{name}.dcm")
        whole = read.get_total_pixel_matrix(apply_real_world_transform=True, dtype=np.float64)
        np.testing.assert_allclose(np.squeeze(whole), expected, atol=1e-6)
        assert read.SOPClassUID.name == "Parametric Map Storage"
        assert "Research use only" in read.ImageComments and "drawn" in read.ImageComments
        spacing = read.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        np.testing.assert_allclose(spacing, shown.value_map.mpp / 1000, rtol=1e-6)


def test_regions_come_back(of_tiff: tuple[Path, MappedSlide]) -> None:
    folder, mapped = of_tiff
    assert mapped.findings is not None
    found = highdicom.seg.segread(folder / "regions.dcm")
    grid = mapped.explanations[0].value_map
    mask = np.squeeze(found.get_total_pixel_matrix(combine_segments=False))
    expected = region_mask(mapped.findings.regions, grid)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(matrix(folder / "regions.dcm"), expected)
    # Independent: all regions as one shape.
    area = shapely.union_all([region.polygon for region in mapped.findings.regions])
    rows, columns = np.indices(expected.shape) + 0.5
    np.testing.assert_array_equal(expected, shapely.intersects_xy(area, columns * 4, rows * 4))
    (segment,) = found.SegmentSequence
    assert segment.SegmentLabel == "tumour (model)" and segment.SegmentAlgorithmType == "AUTOMATIC"
    parameters = segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert "threshold=0.6" in parameters and f"weights={MADE.weights_sha256}" in parameters


def test_nothing_personal_is_made_up(of_tiff: tuple[Path, MappedSlide]) -> None:
    found = pydicom.dcmread(of_tiff[0] / "saliency.dcm")
    personal = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyID")
    assert not any(found[name].value for name in personal)
    assert found.ContainerIdentifier == "Name^of a/slide"


def test_the_same_maps_are_the_same_instances(of_tiff: tuple[Path, MappedSlide], tmp_path: Path) -> None:
    folder, mapped = of_tiff
    with open_slide(folder / "Name^of a\\slide.tif") as slide:
        write_dicom(tmp_path / "again", slide, mapped, MADE)
        write_dicom(tmp_path / "other", slide, mapped_of(slide, seed=1), MADE)
    for name in ("probability.dcm", "saliency.dcm", "regions.dcm"):
        first, again, other = (
            pydicom.dcmread(place / name, stop_before_pixels=True)
            for place in (folder, tmp_path / "again", tmp_path / "other")
        )
        differs = {element.keyword for element in first if element != again.get(element.tag)}
        assert all(name.endswith(("Date", "Time", "EquipmentSequence")) for name in differs), differs
        assert first.SOPInstanceUID != other.SOPInstanceUID and first.SeriesInstanceUID == other.SeriesInstanceUID


def test_a_dicom_slide_is_referred_to(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "wsi" / "sm_image.dcm"
    source = pydicom.dcmread(path, stop_before_pixels=True)
    with open_slide(path) as slide:
        mapped = mapped_of(slide)
        files = write_dicom(tmp_path, slide, mapped, MADE)
    to_slide = highdicom.spatial.PixelToReferenceTransformer.for_image(source, for_total_pixel_matrix=True)
    for name in files:
        found = pydicom.dcmread(tmp_path / name)
        for same in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "ContainerIdentifier"):
            assert found[same].value == source[same].value, same
        assert found.SpecimenDescriptionSequence == source.SpecimenDescriptionSequence
        (series,) = found.ReferencedSeriesSequence
        (instance,) = series.ReferencedInstanceSequence
        assert instance.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert series.SeriesInstanceUID == source.SeriesInstanceUID != found.SeriesInstanceUID
        # The middle of map pixel (2, 3) is where the slide's level 0 has it.
        to_map = highdicom.spatial.PixelToReferenceTransformer.for_image(found, for_total_pixel_matrix=True)
        side = 8 if name == "probability.dcm" else 4
        corner = np.array([[3, 2], [0, 0]])
        own = to_slide.affine @ [*((corner[0] + 0.5) * side - 0.5), 0, 1]  # a pixel's middle is a whole number there
        np.testing.assert_allclose(to_map(corner)[0], own[:3], atol=1e-6)
    np.testing.assert_array_equal(matrix(tmp_path / "saliency.dcm"), mapped.explanations[0].value_map.values)


def test_what_a_series_lacks_is_told(shared_data: Path, tmp_path: Path) -> None:
    source = pydicom.dcmread(shared_data / "wsi" / "sm_image.dcm")
    path = tmp_path / "slide.dcm"
    source.save_as(path)
    with open_slide(path) as slide:
        mapped = mapped_of(slide)
        del source.FrameOfReferenceUID
        source.save_as(path)
        with pytest.raises(SlideError, match=r"slide\.dcm: its DICOM header lacks FrameOfReferenceUID.*--dicom"):
            write_dicom(tmp_path, slide, mapped, MADE)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'medsd\[dicom\]'"):
        MapRequest(also=["dicom"])
