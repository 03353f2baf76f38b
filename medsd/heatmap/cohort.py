"""Slides and weights become folders of maps, contours, overlay, report and record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import FOLDERS, TABLE
from medsd.cohort.runner import ALONE, Sharing, run_cohort
from medsd.cohort.work import Made, Work
from medsd.errors import DatasetError
from medsd.files import as_json
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.detections import write_tiles
from medsd.heatmap.dicom import REGIONS, Origin, file_of_map, write_dicom
from medsd.heatmap.engine import MixedEngine
from medsd.heatmap.findings import Checks, check_slide, looked_at_mm2, mapped_slide, misfits, model_words
from medsd.heatmap.folder import OVERLAY, RECORD, REPORT, THUMBNAIL, SlideFolder, holds_classes
from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.model import MapModel, MapRequest, load_map_model
from medsd.heatmap.numbers import percent
from medsd.heatmap.overlay import Findings, MappedSlide, draw_overlay
from medsd.heatmap.overlay_tiff import write_overlay_tiff
from medsd.heatmap.regions import write_regions
from medsd.heatmap.report import KeptReports, SlideResult, short_digest, write_index, write_report
from medsd.heatmap.tiff import write_ome_tiff
from medsd.heatmap.zoom import cut_tiles
from medsd.networks.modes import usable_device
from medsd.progress import Progress, no_progress
from medsd.record import read_record
from medsd.saliency.registry import METHODS
from medsd.slides.slide import Slide
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue
from medsd.tables import read_table

_FINDINGS = ["probability.ome.tif", "regions.geojson"]
_SALIENCY = "saliency.ome.tif"
_OVERLAY_TIFF, _TILES = "overlay.tif", "tiles.geojson"
_DROPS = ("drop_brightest", "drop_random", "drop_lowest")
_DEFAULT = MapRequest()


def map_slides(
    slides: Sequence[SlideEntry],
    weights: str | Path,
    output: str | Path,
    request: MapRequest = _DEFAULT,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    isolate: bool = True,
    sharing: Sharing = ALONE,
) -> list[SlideResult]:
    """Map every slide; leave a folder a slide, `slides.csv` and `index.html` in `output`.

    A slide whose outputs are complete and match file, weights and settings is skipped. A slide that fails is
    reported in its row, and the others are finished. Slides of earlier runs into the folder stay, and are listed.

    Args:
        slides: the slides, whose outputs are kept by their names.
        weights: a calibrated classifier's safetensors; or an encoder's, whose label-free maps have no probability and
            no regions beside them.
        output: the folder to write to.
        request: methods, and what the weights do not say.
        device: where the network runs; None for the first GPU, or the CPU where there is none.
        progress: shows the slides, and the blocks or tiles of each, as they are done.
        isolate: read each slide in a child process, so that a decoder that dies or hangs costs that slide alone.
        sharing: with other runs in the folder.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide of that name, or of segmented ones, in
            `output`.
        WeightsError, NetworkError: weights that cannot be used, or were never calibrated, see `load_map_model`.
        OutputError: `output` cannot be written to.
        ConfigError: the device does not exist here, or the request does not fit the weights.
    """
    output = Path(output)
    if holds_classes(output):
        raise DatasetError(f"{output}: holds segmented slides, whose files would be replaced; choose another folder")
    model = load_map_model(weights, request, usable_device(device))
    target = None if model.card is None else model.card.stain_target
    normaliser = None if target is None else StainNormaliser(profile_from_dict(target), output / "stains")
    work = _MapWork(output, model, normaliser, request)
    return run_cohort(work, slides, 1, isolate, progress, sharing)


def _write_findings(folder: Path, name: str, found: Findings, slide: Slide, quantity: str) -> None:
    probability, regions = (folder / file for file in _FINDINGS)
    write_ome_tiff(probability, found.probability)
    target = found.probability.target
    words = f"{target[:1].upper()}{target[1:]} (model)"
    write_regions(regions, found.regions, words, name, quantity, slide.bounds[:2])


def _file_of(method: str) -> str:
    """The file of a map beside the slide's saliency."""
    return f"{method}.ome.tif"


@dataclass(frozen=True)
class Maps(KeptReports[SlideResult]):
    """Mapped slides; see `Kept`."""

    folder: Path
    row_type = SlideResult
    columns = (
        *(
            "slide",
            "status",
            "model",
            "weights",
            "misfit",
            "reason",
            "target",
            "score",
            "verdict",
            "regions",
            "region_area_mm2",
        ),
        *(*_DROPS, "path", "seconds"),
    )
    record = FOLDERS

    def row_of(self, record: Mapping[str, Any]) -> SlideResult:
        row = super().row_of(record)
        # In those of before, 0 regions were none that anybody had looked for.
        return replace(row, regions=None, region_area_mm2=None) if row.score is None else row

    def publish(self, rows: Sequence[SlideResult], _recipes: Mapping[str, Mapping[str, Any]]) -> None:
        write_index(self.folder / "index.html", rows, "Slide heatmaps")


@dataclass(frozen=True)
class _MapWork(Maps, Work[SlideResult]):
    """A slide becomes the folder `<name>`; see `Work`."""

    model: MapModel
    normaliser: StainNormaliser | None
    request: MapRequest
    outputs = (
        *(THUMBNAIL, _SALIENCY, OVERLAY, _OVERLAY_TIFF, _TILES, REPORT, *_FINDINGS, *map(_file_of, METHODS)),
        *(REGIONS, *map(file_of_map, ("saliency", "probability", *METHODS))),
    )

    @property
    def target(self) -> str:
        """The class that is mapped; empty of an encoder alone."""
        return "" if self.model.card is None else self.model.card.classes[self.model.engine.target]

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        calibration, engine = self.model.calibration, self.model.engine
        recipe = {
            "weights_sha256": self.model.sha256,
            "methods": list(engine.settings.methods),
            "max_unseen": self.request.max_unseen,
            "faithful_tiles": self.request.faithful_tiles,
        }
        if self.target and len(self.model.engine.classifier.classes) > 2:
            recipe["target"] = self.target
        if isinstance(engine, MixedEngine) and engine.tiles_alone:
            recipe["probability"] = "dense"  # which was once that of tiles
        of_places = engine.of_places if isinstance(engine, MixedEngine) else engine
        if isinstance(of_places, DenseEngine):
            recipe["origin_px"] = of_places.origin_px  # which was once the middle of what cells can see
            if of_places.share:
                recipe["probability_between_cells"] = of_places.share  # which was once that of the nearest
        if self.request.also:
            recipe["also"] = sorted(set(self.request.also))
        if calibration is None:  # what was not of the weights
            return recipe | {"layer": engine.settings.layer, "network_mpp": engine.mpp}
        return recipe | {"calibration": asdict(calibration)}

    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[SlideResult]:
        started, folder = time.perf_counter(), SlideFolder(self.folder / entry.name, slide, entry)
        tissue = find_tissue(slide)
        normaliser = self.normaliser if tissue.mask.any() else None
        shown = slide if normaliser is None else normaliser.slide(slide, tissue)
        maps = self.model.engine.map(shown, tissue, folder.progress(progress), folder.store(self.recipe(entry)))
        map_seconds = round(time.perf_counter() - started, 2)
        unseen = max(tissue.unseen, maps.unseen)
        folder.check_seen(unseen, self.request.max_unseen)
        checks = check_slide(self.model, entry, shown, maps.saliency, self.request.faithful_tiles)
        words, apart = model_words(self.model), misfits(slide, self.model, checks)
        if maps.probability.seen.any():
            row, files = self._write(folder, maps, checks)
        else:
            folder.write_thumbnail()
            found = "no map pixel is half tissue" if tissue.mask.any() else "no tissue found"
            row, files = self.row(entry, "empty", f"{found}; see {THUMBNAIL}"), [THUMBNAIL]
        probability = [] if self.model.card is None else [maps.probability]
        content = folder.about() | {
            "model": words,
            "target": self.target,
            "misfits": apart,
            "methods": [shown.method for shown in (*probability, *maps.explanations.values())],
            "faithfulness": None if checks.faithful is None else as_json(checks.faithful),
            "appearance": None if checks.appearance is None else asdict(checks.appearance),
            "seam": maps.seam,
            "moved_share": maps.moved,
            "missed_share": maps.missed,
            "pixels_read": maps.pixels_read,
            "unseen_share": round(unseen, 6),
            "looked_at_mm2": round(looked_at_mm2(maps), 4),
            "map_seconds": map_seconds,
            "stain": None if normaliser is None else asdict(normaliser.fit(slide, tissue)),
        }
        folder.clear_store()
        return Made(
            replace(row, model=words, weights=short_digest(self.model.sha256), misfit=" ".join(apart)), files, content
        )

    def _write(self, folder: SlideFolder, maps: SlideMaps, checks: Checks) -> tuple[SlideResult, list[str]]:
        """The outputs of a slide with tissue; its row and its files."""
        path, slide = folder.path, folder.slide
        mapped = mapped_slide(folder.entry.name, slide, maps, self.model, *folder.picture, checks)
        reason = f"{percent(maps.unseen, 1)} of the tissue could not be decoded" if maps.unseen else ""
        row, files = self.row(folder.entry, "ok", reason), [_SALIENCY, OVERLAY, REPORT]
        write_ome_tiff(path / _SALIENCY, maps.saliency)
        for name, other in list(maps.explanations.items())[1:]:
            write_ome_tiff(path / _file_of(name), other)
            files.append(_file_of(name))
        if (found := mapped.findings) is not None:
            files += _FINDINGS
            _write_findings(path, mapped.name, found, slide, maps.saliency.quantity)
            area_mm2 = found.region_area_mm2
            row = replace(row, score=found.score, regions=len(found.regions), region_area_mm2=area_mm2)
            row = replace(row, verdict=found.verdict[0], cut_off=found.cut_off, target=self.target)
        if (faithful := checks.faithful) is not None:
            bright, random, low = (drop.value for drop in (faithful.brightest, faithful.random, faithful.lowest))
            row = replace(row, drop_brightest=bright, drop_random=random, drop_lowest=low)
        draw_overlay(path / OVERLAY, mapped)
        files += self._write_also(folder, mapped)
        write_report(path / REPORT, mapped, partial(cut_tiles, slide, mapped))
        return row, files

    def _write_also(self, folder: SlideFolder, mapped: MappedSlide) -> list[str]:
        """What was asked for beside the usual outputs; its files."""
        wanted, engine, slide, files = self.request.also, self.model.engine, folder.slide, []
        if _OVERLAY_TIFF in wanted:
            write_overlay_tiff(folder.path / _OVERLAY_TIFF, slide, mapped)
            files.append(_OVERLAY_TIFF)
        if _TILES in wanted:
            write_tiles(folder.path / _TILES, mapped, engine.tile_px * engine.mpp / slide.mpp, slide.bounds[:2])
            files.append(_TILES)
        if "dicom" in wanted:
            origin = Origin(self.model.name, self.model.sha256, folder.sha256)
            files += write_dicom(folder.path, slide, mapped, origin)
        return files


def read_results(output: str | Path) -> list[SlideResult]:
    """The rows of `slides.csv` that `map_slides` left in `output`; of all slides in there.

    Raises:
        DatasetError: there is none.
    """
    path = Path(output) / TABLE
    if not path.is_file():
        raise DatasetError(f"{path}: missing; run the stage 'heatmap' first")
    rows: list[dict[str, Any]] = read_table(path).to_dict("records")
    numbers = {"seconds": float, "score": float, "regions": int, "region_area_mm2": float}
    numbers |= dict.fromkeys(_DROPS, float)
    for row in rows:
        # Tables of before lack columns.
        row.update({name: kind(row[name]) if row.get(name) else None for name, kind in numbers.items()})
    return [SlideResult(**row) for row in rows]


def read_slide_record(folder: str | Path) -> dict[str, Any]:
    """The record of a slide whose outputs are in `folder`.

    Raises:
        DatasetError: they are not there, or not whole.
    """
    record = read_record(Path(folder) / RECORD)
    if record is None:
        raise DatasetError(f"{folder}: no finished maps; run the stage 'heatmap' again")
    return record
