"""Slides and weights become folders of maps, contours, overlay, report and record; one bad slide costs only itself."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image

from medsd.errors import DatasetError, MedsdError, SlideError, WeightsError
from medsd.files import atomic_path, make_folder, write_text
from medsd.heatmap.engine import Engine, make_engine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.outputs import MAP_FILES, OutputWriter
from medsd.heatmap.record import RECORD, Recipe, is_complete, read_record, write_record
from medsd.heatmap.report import IndexRow, write_index
from medsd.networks.modes import usable_device
from medsd.networks.weights import load_classifier
from medsd.progress import Progress, no_progress
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.slide import open_slide, thumbnail
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue
from medsd.slides.unforeseen import UNFORESEEN, in_one_line

logger = logging.getLogger(__name__)

_THUMBNAIL_PX = 1600
_THUMBNAIL = "thumbnail.png"


@dataclass(frozen=True)
class SlideJob:
    """A slide to map: its file, and its mpp (um per level-0 pixel) where the file's own is missing or wrong."""

    path: Path
    mpp: float | None = None

    @property
    def name(self) -> str:
        """The slide's name, which its outputs are kept by."""
        return self.path.stem


@dataclass(frozen=True)
class SlideResult:
    """What became of a slide.

    Attributes:
        slide: its name.
        status: "ok", "empty" (no tissue) or "failed".
        reason: why it is empty or failed, or what of it could not be judged.
        score: mean of the highest 1 % of the probability map's tissue; None unless ok.
        regions: number of regions at the threshold.
        region_area_mm2: their area.
        seconds: time spent; 0 when nothing had to be done.
    """

    slide: str
    status: str
    reason: str = ""
    score: float | None = None
    regions: int = 0
    region_area_mm2: float = 0.0
    seconds: float = 0.0


def map_slides(
    jobs: Sequence[SlideJob],
    weights: str | Path,
    output: str | Path,
    block_px: int = 2048,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    isolate: bool = True,
    max_unseen: float = 0.05,
) -> list[SlideResult]:
    """Map every slide; leave a folder a slide, `slides.csv` and `index.html` in `output`.

    A slide whose outputs are complete and match file, weights and settings is skipped. A slide that fails is
    reported in its row, and the others are finished.

    Args:
        jobs: the slides.
        weights: a calibrated classifier's safetensors.
        output: the folder to write to.
        block_px: side of the dense engine's blocks, in pixels at the model's mpp.
        device: where the network runs.
        progress: shows the slides, and the blocks or tiles of each, as they are done.
        isolate: read each slide in a child process, so that a decoder that dies or hangs costs that slide alone.
        max_unseen: a slide of which a larger share (0 to 1) cannot be decoded has failed.

    Raises:
        DatasetError: no slides, or two of one name.
        WeightsError: weights that cannot be used, or were never calibrated.
        OutputError: `output` cannot be written to.
        ConfigError: the device does not exist here.
    """
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not jobs:
        reason = f"two slides are named '{twice[0]}'; map them into two folders" if twice else "no slides to map"
        raise DatasetError(reason)
    classifier, card, digest = load_classifier(weights, usable_device(device))
    calibration = card.calibration
    if calibration is None:
        raise WeightsError(f"{weights}: not calibrated (no threshold and scale); run the stage 'finetune' to its end")
    output = make_folder(output)
    settings = MapSettings(calibration.layer, calibration.attribution, calibration.smoothing, block_px)
    engine = make_engine(classifier, card.tile_px, card.mpp, settings=settings, temperature=calibration.temperature)
    target = card.stain_target
    normaliser = None if target is None else StainNormaliser(profile_from_dict(target), output / "stains")
    mapper = _Mapper(engine, OutputWriter(card, calibration, digest), normaliser, progress, isolate, max_unseen)
    results = []
    for job in progress(jobs, len(jobs), "slide"):
        results.append(mapper.finish(job, output))
        write_text(output / "slides.csv", _table(results))  # a killed run keeps its table
    write_index(output / "index.html", [_index_row(result) for result in results], "Slide heatmaps")
    return results


@dataclass(frozen=True)
class _Mapper:
    engine: Engine
    writer: OutputWriter
    normaliser: StainNormaliser | None
    progress: Progress
    isolate: bool
    max_unseen: float

    def finish(self, job: SlideJob, output: Path) -> SlideResult:
        """The slide's outputs, made or found complete; a failure becomes a result."""
        recipe = Recipe(self.writer.digest, asdict(self.writer.calibration), job.mpp)
        folder = output / job.name
        try:
            if is_complete(folder, job.path, recipe):
                record = read_record(folder)
                if record.get("unseen_share", 0.0) <= self.max_unseen:
                    return SlideResult(**{**record["result"], "seconds": 0.0})
            return self._make(job, folder, recipe)
        except MedsdError as error:
            logger.error("%s", error)
            return SlideResult(job.name, "failed", str(error))
        except UNFORESEEN as error:
            # Nobody foresaw these; the cohort goes on all the same, and the log keeps where it happened.
            logger.exception("%s", job.path)
            return SlideResult(job.name, "failed", in_one_line(job.path, error))

    def _make(self, job: SlideJob, folder: Path, recipe: Recipe) -> SlideResult:
        started = time.perf_counter()
        with IsolatedSlide(job.path, job.mpp) if self.isolate else open_slide(job.path, job.mpp) as slide:
            _clear(make_folder(folder))
            picture, level0_px = thumbnail(slide, _THUMBNAIL_PX)
            tissue = find_tissue(slide)
            normaliser = self.normaliser if tissue.mask.any() else None
            shown = slide if normaliser is None else normaliser.slide(slide, tissue)
            maps = self.engine.map(shown, tissue, self.progress)
            mapped = time.perf_counter()
            unseen = max(tissue.unseen, maps.unseen)
            if unseen > self.max_unseen:
                raise SlideError(
                    f"{job.path}: {unseen:.1%} of it cannot be decoded, more than {self.max_unseen:.0%}; copy it again "
                    f"from its source"
                )
            if maps.probability.seen.any():
                summary = self.writer.write(folder, slide, maps, picture, level0_px)
                reason = f"{maps.unseen:.1%} of the tissue could not be decoded" if maps.unseen else ""
                result = SlideResult(job.name, "ok", reason, *summary)
                files = MAP_FILES
            else:
                with atomic_path(folder / _THUMBNAIL) as temporary:
                    Image.fromarray(picture).save(temporary)
                result = SlideResult(job.name, "empty", f"no tissue found; see {_THUMBNAIL}")
                files = [_THUMBNAIL]
            content = {
                "methods": [maps.probability.method, maps.saliency.method],
                "pixels_read": maps.pixels_read,
                "unseen_share": round(unseen, 6),
                "map_seconds": round(mapped - started, 2),
            }
            result = SlideResult(**{**vars(result), "seconds": round(time.perf_counter() - started, 2)})
            scale = {
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "dimensions": slide.dimensions,
                "reader": slide.reader,
            }
            if normaliser is not None:
                content["stain"] = asdict(normaliser.fit(slide, tissue))
        write_record(
            folder, job.path, recipe, result.status, files, {"result": vars(result), "scale": scale, **content}
        )
        return result


def _clear(folder: Path) -> None:
    """Outputs of another recipe, and what a killed run left, are not vouched for from here on."""
    for name in (RECORD, _THUMBNAIL, *MAP_FILES):
        (folder / name).unlink(missing_ok=True)
        for leftover in folder.glob(f".*-{name}"):
            leftover.unlink()


def _table(results: Sequence[SlideResult]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SlideResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(result) for result in results)
    return text.getvalue()


def _index_row(result: SlideResult) -> IndexRow:
    done = result.status == "ok"
    return IndexRow(
        slide=result.slide,
        status=result.status,
        reason=result.reason,
        score=result.score,
        region_count=result.regions,
        region_area_mm2=result.region_area_mm2,
        report=f"{result.slide}/report.html" if done else None,
        overlay=f"{result.slide}/overlay.png" if done else None,
    )


def read_results(output: str | Path) -> list[SlideResult]:
    """The rows of `slides.csv` that `map_slides` left in `output`.

    Raises:
        DatasetError: there is none.
    """
    path = Path(output) / "slides.csv"
    if not path.is_file():
        raise DatasetError(f"{path}: missing; run the stage 'heatmap' first")
    with open(path, newline="", encoding="utf-8") as handle:
        return [
            SlideResult(
                slide=row["slide"],
                status=row["status"],
                reason=row["reason"],
                score=float(row["score"]) if row["score"] else None,
                regions=int(row["regions"]),
                region_area_mm2=float(row["region_area_mm2"]),
                seconds=float(row["seconds"]),
            )
            for row in csv.DictReader(handle)
        ]
