"""Slides and a segmentation network become folders of class maps, contours, areas, overlay, report and record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.checks import check_number
from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import FOLDERS
from medsd.cohort.learnt import learnt_words
from medsd.cohort.runner import ALONE, Sharing, run_cohort
from medsd.cohort.work import Made, Work
from medsd.errors import ConfigError, DatasetError
from medsd.heatmap.dicom import REGIONS, Origin, check_dicom, write_class_dicom
from medsd.heatmap.findings import scale_misfits, slide_file
from medsd.heatmap.folder import OVERLAY, REPORT, THUMBNAIL, SlideFolder, holds_classes
from medsd.heatmap.numbers import percent
from medsd.heatmap.overlay import MappedSlide, ShownMap, draw_overlay
from medsd.heatmap.report import MAX_MAP_SIDE_PX, KeptReports, ReportedSlide, short_digest, write_index, write_report
from medsd.heatmap.scale import share_scale
from medsd.heatmap.value_map import ValueMap
from medsd.heatmap.zoom import cut_tiles
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import usable_device
from medsd.progress import Progress, no_progress
from medsd.segment.contours import class_regions, class_shares, write_class_regions
from medsd.segment.label_tiff import write_labels, write_probabilities
from medsd.segment.stitch import OVERLAP_HINT, SlideLabels, SlideSegmenter
from medsd.segment.weights import SegmentationCard, load_segmentation
from medsd.slides.mpp import check_mpp
from medsd.slides.slide import Slide
from medsd.slides.tissue import find_tissue

LABELS, PROBABILITIES, CONTOURS = "labels.ome.tif", "probabilities.ome.tif", "regions.geojson"
# highdicom takes an array whole.
_MOST_DICOM_PX = 2**26


@dataclass(frozen=True)
class SegmentRequest:
    """What is asked of a segmentation beside what the weights say.

    Attributes:
        mpp: micrometres per pixel that the network takes, where its weights do not say it.
        overlap: of neighbouring tiles, see `SlideSegmenter`.
        probabilities: leave `probabilities.ome.tif`, too.
        dicom: leave `regions.dcm`, too.
        max_unseen: a slide of which a larger share (0 to 1) cannot be decoded has failed.
        workers: see `SlideSegmenter`.

    Raises:
        ConfigError: a value out of its range, or DICOM without highdicom.
    """

    mpp: float | None = None
    overlap: float = 0.5
    probabilities: bool = False
    dicom: bool = False
    max_unseen: float = 0.05
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.mpp is not None:
            check_mpp("network_mpp", self.mpp)
        check_number("max_unseen", self.max_unseen, "[0, 1]")
        check_number("overlap", self.overlap, "[0, 0.5]", hint=OVERLAP_HINT)
        if self.dicom:
            check_dicom()


@dataclass(frozen=True)
class SegmentedSlide(ReportedSlide):
    """What became of a slide that was segmented.

    Attributes:
        areas_mm2: of each class, the background's (tissue of no other class) first; empty unless ok.
        regions: number of outlines; None unless ok.
    """

    areas_mm2: Mapping[str, float] = field(default_factory=dict)
    regions: int | None = None


@freed_memory_kept()
def segment_slides(
    slides: Sequence[SlideEntry],
    weights: str | Path,
    output: str | Path,
    request: SegmentRequest | None = None,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    sharing: Sharing = ALONE,
    isolate: bool = True,
) -> list[SegmentedSlide]:
    """Segment every slide; leave a folder a slide, `slides.csv` with areas and `index.html` in `output`.

    What is complete and matches is skipped, what fails costs itself alone, see `run_cohort`; a slide that is stopped
    half way goes on where it was.

    Args:
        slides: the slides, whose outputs are kept by their names.
        weights: what `bundles/segmentation.json` leaves, `segmentation.safetensors`.
        output: the folder to write to.
        request: what the weights do not say; None for what is usual.
        device: where the network runs; None for the first GPU, or the CPU where there is none.
        progress: shows the slides, and the tiles of each, as they are done.
        sharing: with other runs in the folder.
        isolate: read each slide in a child process, so that a decoder that dies or hangs costs that slide alone.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide, or of another kind, in `output`.
        WeightsError: weights that cannot be used, such as a classifier's.
        OutputError: `output` cannot be written to.
        ConfigError: the device does not exist here, or the network's scale is not known, or known and given.
    """
    request, output = request or SegmentRequest(), Path(output)
    network, card, digest = load_segmentation(weights, usable_device(device))
    if card.mpp is None and request.mpp is None:
        raise ConfigError(
            f"network_mpp: {weights} was trained on images and does not say its scale; give its um per px"
        )
    if card.mpp is not None and request.mpp is not None:
        raise ConfigError(f"network_mpp={request.mpp:g}: {weights} says it itself ({card.mpp:g}); leave it out")
    if holds_classes(output) is False:
        raise DatasetError(f"{output}: holds maps of slides, whose files would be replaced; choose another folder")
    mpp = card.mpp or request.mpp
    assert mpp is not None
    rest = request.overlap, request.probabilities
    segmenter = SlideSegmenter(network, card.side_px, mpp, *rest, workers=request.workers)
    return run_cohort(_SegmentWork(output, segmenter, card, digest, request), slides, 1, isolate, progress, sharing)


@dataclass(frozen=True)
class Segmented(KeptReports[SegmentedSlide]):
    """Segmented slides; see `Kept`."""

    folder: Path
    row_type = SegmentedSlide
    columns = ("slide", "status", "model", "weights", "misfit", "reason", "regions")
    record = FOLDERS

    def row_of(self, record: Mapping[str, Any]) -> SegmentedSlide:
        row = super().row_of(record)
        return row if row.status == "ok" else replace(row, regions=None)  # 0 in those of before

    def cells(self, row: SegmentedSlide) -> Mapping[str, Any]:
        return asdict(row) | {f"{name}_mm2": area for name, area in row.areas_mm2.items()}

    def header(self, rows: Sequence[SegmentedSlide]) -> Sequence[str]:
        names = dict.fromkeys(name for row in rows for name in row.areas_mm2)
        return (*self.columns, *(f"{name}_mm2" for name in names), "path", "seconds")

    def publish(self, rows: Sequence[SegmentedSlide], _recipes: Mapping[str, Mapping[str, Any]]) -> None:
        areas = {row.slide: row.areas_mm2 for row in rows}
        write_index(self.folder / "index.html", rows, "Segmented slides", areas)


@dataclass(frozen=True)
class _SegmentWork(Segmented, Work[SegmentedSlide]):
    """A slide becomes the folder `<name>`; see `Work`."""

    segmenter: SlideSegmenter
    card: SegmentationCard
    digest: str
    request: SegmentRequest
    outputs = (THUMBNAIL, LABELS, PROBABILITIES, CONTOURS, REGIONS, OVERLAY, REPORT)

    @property
    def model(self) -> str:
        """What the network is, in words: what every output says first."""
        classes = ", ".join(self.card.classes)
        scored = "".join(f"; {name.replace('_', ' ')} {value:.2f} of 1" for name, value in self.card.validation.items())
        return (
            f"Segmentation network ({classes}) trained on {self.card.trained_on}, at {self.segmenter.mpp:g} µm per px"
            f"{scored}."
        )

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        asked = asdict(self.request)
        del asked["workers"]
        return {"weights_sha256": self.digest, "network_mpp": self.segmenter.mpp, "asked": asked}

    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[SegmentedSlide]:
        started, folder = time.perf_counter(), SlideFolder(self.folder / entry.name, slide, entry)
        tissue, store = find_tissue(slide), folder.store(self.recipe(entry))
        labels = self.segmenter.segment(slide, tissue, store, folder.progress(progress))
        seconds = round(time.perf_counter() - started, 2)
        unseen = max(tissue.unseen, labels.unseen)
        folder.check_seen(unseen, self.request.max_unseen)
        learnt = learnt_words(entry, self.card.learnt_from)
        misfits = scale_misfits(slide, self.segmenter.mpp) + [learnt] * bool(learnt)
        if any(labels.pixels):
            row, files = self._write(folder, labels, misfits)
        else:
            folder.write_thumbnail()
            row, files = self.row(entry, "empty", f"no tissue found; see {THUMBNAIL}"), [THUMBNAIL]
        content = folder.about() | {
            "model": self.model,
            "classes": self.card.classes,
            "misfits": misfits,
            "method": labels.method,
            "tiles": labels.tiles,
            "unseen_share": round(unseen, 6),
            "segment_seconds": seconds,
        }
        folder.clear_store()
        return Made(
            replace(row, model=self.model, weights=short_digest(self.digest), misfit=" ".join(misfits)), files, content
        )

    def _write(
        self, folder: SlideFolder, labels: SlideLabels, misfits: Sequence[str]
    ) -> tuple[SegmentedSlide, list[str]]:
        """The outputs of a slide with tissue; its row and its files."""
        path, slide = folder.path, folder.slide
        reason = f"{percent(labels.unseen, 1)} of the tissue could not be decoded" if labels.unseen else ""
        row, files = self.row(folder.entry, "ok", reason), [LABELS, CONTOURS, OVERLAY, REPORT]
        regions = class_regions(labels, slide.mpp, slide.dimensions)
        areas = {name: round(area, 6) for name, area in labels.areas_mm2.items()}
        write_labels(path / LABELS, labels)
        write_class_regions(path / CONTOURS, regions, labels.classes, folder.entry.name, slide.bounds[:2])
        if self.request.probabilities:
            write_probabilities(path / PROBABILITIES, labels)
            files.append(PROBABILITIES)
        if self.request.dicom:
            self._write_dicom(path / REGIONS, slide, labels, folder.sha256)
            files.append(REGIONS)
        shown = self._shown(folder, labels, misfits)
        draw_overlay(path / OVERLAY, shown)
        write_report(path / REPORT, shown, partial(cut_tiles, slide, shown))
        return replace(row, regions=len(regions), areas_mm2=areas), files

    def _write_dicom(self, path: Path, slide: Slide, labels: SlideLabels, identity: str) -> None:
        height, width = labels.numbers.shape
        step = 1
        while (height // step) * (width // step) > _MOST_DICOM_PX:
            step *= 2
        numbers = np.asarray(labels.numbers[step // 2 :: step, step // 2 :: step])
        origin = Origin(f"{self.card.encoder} {self.card.decoder}", self.digest, identity)
        others = np.maximum(numbers, 1) - 1
        write_class_dicom(path, slide, others, labels.classes[1:], labels.level0_px * step, origin)

    def _shown(self, folder: SlideFolder, labels: SlideLabels, misfits: Sequence[str]) -> MappedSlide:
        """What overlay and report show: the share of each class in map pixels, as fine as a page takes them."""
        slide, (picture, level0_px) = folder.slide, folder.picture
        cell = 1
        while max(labels.numbers.shape) > cell * MAX_MAP_SIDE_PX:
            cell *= 2
        shown = []
        for number, name in enumerate(labels.classes[1:], start=1):
            values = class_shares(labels, number, cell)
            meaning = f"The share of a map pixel that the network takes for {name}, from 0 to 1."
            grid = labels.level0_px * cell, labels.mpp * cell
            value_map = ValueMap(values, *grid, "share", name, labels.method, "", meaning)
            area = f"{labels.areas_mm2[name]:.2f} mm² of the slide"
            shown.append(ShownMap(f"class{number}", name, value_map, share_scale(number), area))
        caveats = [f"The network was trained on {self.card.trained_on}; on other material its outlines mean little."]
        if labels.unseen:
            caveats.append(
                f"The slide file is damaged: {percent(labels.unseen, 1)} of the tissue could not be decoded."
            )
        words = {labels.classes[0]: f"{labels.classes[0]} (tissue of no other class)"}
        areas = {f"Area of {words.get(name, name)}": f"{area:.4f} mm²" for name, area in labels.areas_mm2.items()}
        network = f"{self.card.encoder} with {self.card.decoder}, {labels.method}"
        return MappedSlide(
            name=folder.entry.name,
            model=self.model,
            misfits=misfits,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            thumbnail=picture,
            thumbnail_level0_px=level0_px,
            damaged=labels.unseen > 0,
            explanations=shown,
            findings=None,
            provenance=areas | slide_file(slide) | {"Network": network, "Weights SHA-256": self.digest},
            caveats=caveats,
        )
