"""A slide's maps as DICOM: Parametric Maps of their values, a Segmentation of the regions. Needs `medsd[dicom]`.

PS3.3 A.75 and A.51, written by highdicom (Bridge et al. 2022, doi 10.1007/s10278-022-00683-y). Where the slide is DICOM
they belong to its study, name its instance as their source and lie in its frame of reference, with what it says of
patient and specimen. Of other slides nothing of the kind is known, and nothing is made up: those fields are empty, and
the source is an instance that the slide would be if it were DICOM, its UIDs made from its SHA-256.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

import medsd
from medsd import RESEARCH_USE_ONLY
from medsd.errors import ConfigError, SlideError
from medsd.files import atomic_path, printable
from medsd.heatmap.overlay import Findings, MappedSlide, ShownMap
from medsd.heatmap.regions import Region
from medsd.heatmap.value_map import ValueMap
from medsd.slides.parts import dicom_series, files_of
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.slide import Slide

REGIONS = "regions.dcm"
_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "medsd.dicom")
_TILE_PX = 256
_MAPS_SERIES, _REGIONS_SERIES = 9001, 9002
# Empty where nobody knows them, but there (type 2).
_UNKNOWN = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def check_dicom() -> None:
    """Raises ConfigError: highdicom is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise ConfigError("DICOM: highdicom is missing; install it with: pip install 'medsd[dicom]'")


def file_of_map(name: str) -> str:
    """The file of the map called "probability", "saliency", or by its method beside the slide's saliency."""
    return f"{name}.dcm"


@dataclass(frozen=True)
class Origin:
    """What made the maps.

    Attributes:
        name: of the network.
        weights_sha256: of its weights.
        slide_sha256: of the slide's file or files.
    """

    name: str
    weights_sha256: str
    slide_sha256: str


def write_dicom(folder: str | Path, slide: Slide, mapped: MappedSlide, made: Origin) -> list[str]:
    """Write a Parametric Map a map and, with regions known, `regions.dcm`; each atomically, tiled, not compressed.

    Values are float32 as in the OME-TIFFs, NaN where nothing is seen. The Segmentation is binary, on the grid of the
    slide's saliency: its map pixels whose centre lies in a region; tiles without any are left out. UIDs follow from the
    content: the same maps are the same instances. Map pixel (j, i) lies as in `ValueMap`, in DICOM's terms the first at
    half a map pixel right and down of the slide's corner.

    Returns:
        the names of the files.

    Raises:
        ConfigError: highdicom is not installed.
        SlideError: the slide's own DICOM files do not say what a reference to them needs.
        OutputError: a file cannot be written.
    """
    check_dicom()
    writer = _Writer(_source(slide, made.slide_sha256), made)
    first, files = mapped.explanations[0].key, []
    for number, shown in enumerate(mapped.maps, start=1):
        files.append(file_of_map("saliency" if shown.key == first else shown.key))
        with atomic_path(Path(folder) / files[-1]) as temporary:
            writer.parametric_map(shown, number).save_as(temporary)
    if mapped.findings is not None:
        files.append(REGIONS)
        grid = mapped.explanations[0].value_map
        with atomic_path(Path(folder) / REGIONS) as temporary:
            writer.regions(mapped.findings, grid).save_as(temporary)
    return files


def write_class_dicom(
    path: str | Path, slide: Slide, numbers: npt.NDArray[np.uint8], names: Sequence[str], level0_px: float, made: Origin
) -> None:
    """Write a binary Segmentation with a segment a class, atomically; see `write_dicom`.

    Args:
        path: the file.
        slide: the slide.
        numbers: (height, width), 0 for none and then the place in `names`; held in memory.
        names: of the classes.
        level0_px: side of a pixel.
        made: what made them.

    Raises:
        ConfigError: highdicom is not installed.
        SlideError: see `write_dicom`.
        OutputError: the file cannot be written.
    """
    check_dicom()
    writer = _Writer(_source(slide, made.slide_sha256), made)
    words = f"Segmented by {made.name}: {', '.join(names)}."
    with atomic_path(path) as temporary:
        found = writer.segmentation(numbers, names, level0_px, {"weights": made.weights_sha256}, words)
        found.save_as(temporary)


def region_mask(regions: Sequence[Region], grid: ValueMap) -> npt.NDArray[np.bool_]:
    """(height, width) bool on the grid of a map: the map pixels whose centre lies in a region."""
    mask = np.zeros(grid.values.shape, np.bool_)
    for region in regions:
        left, top, right, bottom = (int(bound / grid.level0_px) for bound in region.polygon.bounds)
        part = mask[top : bottom + 1, left : right + 1]
        rows, columns = np.indices(part.shape)
        shapely.prepare(region.polygon)
        x, y = ((index + start + 0.5) * grid.level0_px for index, start in ((columns, left), (rows, top)))
        part |= shapely.intersects_xy(region.polygon, x, y)
    return mask


@dataclass(frozen=True)
class _Writer:
    """Makes objects of one source."""

    source: Dataset
    made: Origin

    def parametric_map(self, shown: ShownMap, number: int) -> Any:
        from highdicom import VOILUTTransformation
        from highdicom.pm import ParametricMap, RealWorldValueMapping
        from pydicom.sr.codedict import codes

        value_map, scale = shown.value_map, shown.scale
        values = np.ascontiguousarray(value_map.values, np.float32)
        about = printable(shown.heading)
        seen = values[np.isfinite(values)]
        limits = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
        mapping = RealWorldValueMapping(
            lut_label=_fit(printable(shown.key), 16),
            lut_explanation=_fit(f"{about}, {value_map.unit or 'from 0 to 1'}", 64),
            unit=codes.UCUM.NoUnits,
            value_range=limits,
        )
        words = f"{about} {value_map.method} {value_map.level0_px!r}"
        window = VOILUTTransformation((scale.vmin + scale.vmax) / 2, scale.vmax - scale.vmin)
        found = ParametricMap(
            pixel_array=values,
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[window],
            content_label="MAP",
            **self._common("maps", _MAPS_SERIES, number, values, words),
            **self._place(value_map.level0_px),
        )
        return self._finished(found, f"{about}: {value_map.method}. {value_map.meaning} {RESEARCH_USE_ONLY}")

    def regions(self, findings: Findings, grid: ValueMap) -> Any:
        target, mask = printable(findings.probability.target), region_mask(findings.regions, grid)
        parameters = {"threshold": f"{findings.threshold:.9g}", "weights": self.made.weights_sha256}
        words = f"Regions: {target} probability above {findings.threshold:.3g} ({findings.threshold_source})."
        return self.segmentation(mask, [target], grid.level0_px, parameters, words)

    def segmentation(
        self,
        numbers: npt.NDArray[Any],
        names: Sequence[str],
        level0_px: float,
        parameters: Mapping[str, str],
        words: str,
    ) -> Any:
        """Of numbers (height, width), 0 for none and then the place in `names`."""
        from highdicom.seg import Segmentation

        found = Segmentation(
            pixel_array=numbers.astype(np.uint8),
            segmentation_type="BINARY",
            segment_descriptions=[self._segment(number, name, parameters) for number, name in enumerate(names, 1)],
            omit_empty_frames=bool(numbers.any()),
            content_label="REGIONS",
            **self._common("regions", _REGIONS_SERIES, 1, numbers, f"{' '.join(names)} {dict(parameters)}"),
            **self._place(level0_px),
        )
        return self._finished(found, f"{printable(words)} {RESEARCH_USE_ONLY}")

    def _segment(self, number: int, name: str, parameters: Mapping[str, str]) -> Any:
        from highdicom import AlgorithmIdentificationSequence
        from highdicom.seg import SegmentDescription
        from pydicom.sr.codedict import codes

        abnormal = codes.SCT.MorphologicallyAbnormalStructure
        return SegmentDescription(
            segment_number=number,
            segment_label=_fit(f"{printable(name)} (model)", 64),
            segmented_property_category=abnormal,
            segmented_property_type=codes.SCT.Neoplasm if name.casefold() in ("tumour", "tumor") else abnormal,
            algorithm_type="AUTOMATIC",
            algorithm_identification=AlgorithmIdentificationSequence(
                name=_fit(printable(self.made.name), 64),
                family=codes.DCM.ArtificialIntelligence,
                version=medsd.__version__,
                parameters=dict(parameters),
            ),
        )

    def _common(self, series: str, series_number: int, number: int, values: npt.NDArray[Any], words: str) -> Any:
        source, weights = self.source.SOPInstanceUID, self.made.weights_sha256
        digest = sha256(f"{words} {values.shape}".encode() + values.tobytes()).hexdigest()
        return {
            "source_images": [self.source],
            "series_instance_uid": _uid(f"{series} {source} {weights}"),
            "series_number": series_number,
            "sop_instance_uid": _uid(f"{series} {source} {weights} {digest}"),
            "instance_number": number,
            "manufacturer": "medsd",
            "manufacturer_model_name": "medsd heatmap",
            "software_versions": medsd.__version__,
            "device_serial_number": weights[:16],
            "content_description": _fit(RESEARCH_USE_ONLY, 64),
            "dimension_organization_type": "TILED_SPARSE",
            "tile_pixel_array": True,
            "tile_size": (_TILE_PX, _TILE_PX),
        }

    def _place(self, level0_px: float) -> dict[str, Any]:
        """Where a map lies: the slide's corner, not its first pixel's middle, is the map's."""
        from highdicom import PixelMeasuresSequence, PlanePositionSequence

        measures = self.source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        down, across = (float(spacing) for spacing in measures.PixelSpacing)
        origin = self.source.TotalPixelMatrixOriginSequence[0]
        x, y, z = (float(origin.get(f"{axis}OffsetInSlideCoordinateSystem", 0.0) or 0.0) for axis in "XYZ")
        along = np.array([float(cosine) for cosine in self.source.ImageOrientationSlide])
        half = (level0_px - 1) / 2
        first = np.array([x, y, z]) + half * (across * along[:3] + down * along[3:])
        spacing, thickness = [down * level0_px, across * level0_px], float(measures.get("SliceThickness", 0.0) or 0.0)
        return {
            "pixel_measures": PixelMeasuresSequence(pixel_spacing=spacing, slice_thickness=thickness),
            "plane_positions": [PlanePositionSequence("SLIDE", first.tolist(), pixel_matrix_position=(1, 1))],
        }

    def _finished(self, found: Any, words: str) -> Any:
        """With a deterministic organisation of frames, and words for people."""
        organisation = _uid(f"frames {found.SOPInstanceUID}")
        for item in (*found.DimensionOrganizationSequence, *found.DimensionIndexSequence):
            item.DimensionOrganizationUID = organisation
        found.ImageComments = words[:10_240]
        found.SeriesDescription = _fit(f"medsd: {found.ContentLabel.lower()}. {RESEARCH_USE_ONLY}", 64)
        return found


def _source(slide: Slide, slide_sha256: str) -> Dataset:
    """The instance that a slide's level 0 is, without pixels; of other formats, the one that it would be."""
    if not dicom_series(slide.path):
        return _described(slide, slide_sha256)
    for path in files_of(slide.path):
        try:
            found = dcmread(path, stop_before_pixels=True)
            size = found.get("TotalPixelMatrixColumns"), found.get("TotalPixelMatrixRows")
            if found.get("SOPClassUID") == _SLIDE_CLASS and "VOLUME" in found.ImageType and size == slide.dimensions:
                _check(found, slide.path)
                return found
        except (InvalidDicomError, AttributeError, *DAMAGED) as error:
            raise SlideError(f"{path}: its DICOM header cannot be read ({error}); leave out --dicom") from error
    raise SlideError(f"{slide.path}: no instance of its series has the slide's size; leave out --dicom")


def _check(found: Dataset, path: Path) -> None:
    for name in _UNKNOWN:
        if name not in found:
            setattr(found, name, None)
    needed = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "NumberOfFrames", "ImageOrientationSlide")
    for name in (*needed, "TotalPixelMatrixOriginSequence", "SharedFunctionalGroupsSequence"):
        if name not in found:
            raise SlideError(f"{path}: its DICOM header lacks {name}, which maps refer to; leave out --dicom")


def _described(slide: Slide, slide_sha256: str) -> Dataset:
    """What a slide's level 0 would be as DICOM: x to the right and y down from its corner, in millimetres."""
    found, spacing = Dataset(), slide.mpp / 1000
    found.SpecificCharacterSet = "ISO_IR 192"
    found.SOPClassUID = _SLIDE_CLASS
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(found, name, _uid(f"{name} {slide_sha256}"))
    for name in _UNKNOWN:
        setattr(found, name, None)
    found.PositionReferenceIndicator = "SLIDE_CORNER"
    found.ContainerIdentifier = _fit(printable(slide.path.stem), 64)
    specimen = Dataset()
    specimen.SpecimenIdentifier = found.ContainerIdentifier
    specimen.SpecimenUID = _uid(f"SpecimenUID {slide_sha256}")
    specimen.IssuerOfTheSpecimenIdentifierSequence, specimen.SpecimenPreparationSequence = [], []
    found.SpecimenDescriptionSequence = [specimen]
    found.IssuerOfTheContainerIdentifierSequence, found.ContainerTypeCodeSequence = [], []
    found.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    found.Rows = found.Columns = _TILE_PX
    found.TotalPixelMatrixColumns, found.TotalPixelMatrixRows = slide.dimensions
    across, down = (-(-side // _TILE_PX) for side in slide.dimensions)
    found.NumberOfFrames, found.DimensionOrganizationType = across * down, "TILED_FULL"
    found.ImageOrientationSlide = [1, 0, 0, 0, 1, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = _decimal(spacing / 2)
    found.TotalPixelMatrixOriginSequence = [origin]
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [_decimal(spacing)] * 2, 0
    shared.PixelMeasuresSequence = [measures]
    found.SharedFunctionalGroupsSequence = [shared]
    return found


def _uid(text: str) -> str:
    """PS3.5 B.2: a UUID, here made from a text."""
    return f"2.25.{uuid.uuid5(_UUID_NAMESPACE, text).int}"


def _fit(text: str, length: int) -> str:
    """As much of a text as an element takes, on one line and without the backslash that parts values."""
    return " ".join(text.replace("\\", "/").split())[:length].strip() or "-"


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters."""
    return f"{value:.10g}"
