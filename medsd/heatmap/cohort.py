"""Slides and weights become folders of maps, contours, overlay, report and record; one bad slide costs only itself."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from shapely.errors import GEOSException

from medsd.errors import ConfigError, DatasetError, MedsdError, WeightsError
from medsd.files import atomic_path, make_folder, write_text
from medsd.heatmap.engine import DenseEngine, MapSettings, SlideMaps
from medsd.heatmap.overlay import draw_overlay
from medsd.heatmap.record import RECORD, Recipe, is_complete, read_record, write_record
from medsd.heatmap.regions import Region, find_regions, write_geojson
from medsd.heatmap.report import IndexRow, ReportContent, write_index, write_report
from medsd.heatmap.scale import probability_scale, saliency_scale
from medsd.heatmap.tiff import write_ome_tiff
from medsd.networks.weights import Calibration, ModelCard, load_classifier
from medsd.progress import Progress, no_progress
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide, open_slide, thumbnail
from medsd.slides.tissue import find_tissue

logger = logging.getLogger(__name__)

TOP_SHARE = 0.01
_THUMBNAIL_PX = 1600
_THUMBNAIL = "thumbnail.png"
_TOP_REGIONS = 8
_REGION_PICTURE_PX = 192
# What a damaged file or a full memory can raise deep inside a library.
_COSTS_ONE_SLIDE = (OSError, RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError, GEOSException)
_TUMOUR_COLOUR = (214, 39, 40)
_MAP_FILES = ["saliency.ome.tif", "probability.ome.tif", "overlay.png", "regions.geojson", "report.html"]


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
        reason: why it is empty or failed.
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
) -> list[SlideResult]:
    """Map every slide; leave a folder a slide, `slides.csv` and `index.html` in `output`.

    A slide whose outputs are complete and match file, weights and settings is skipped. A slide that fails is
    reported in its row, and the others are finished.

    Args:
        jobs: the slides.
        weights: a calibrated classifier's safetensors.
        output: the folder to write to.
        block_px: side of the engine's blocks, in pixels at the model's mpp.
        device: where the network runs.
        progress: shows the slides, and the blocks of each, as they are done.

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
    classifier, card, digest = load_classifier(weights, _usable(device))
    calibration = card.calibration
    if calibration is None:
        raise WeightsError(f"{weights}: not calibrated (no threshold and scale); run the stage 'finetune' to its end")
    output = make_folder(output)
    settings = MapSettings(calibration.layer, calibration.attribution, calibration.smoothing, block_px)
    engine = DenseEngine(classifier, card.tile_px, card.mpp, settings=settings)
    mapper = _Mapper(engine, card, calibration, digest, progress)
    results = []
    for job in progress(jobs, len(jobs), "slide"):
        results.append(mapper.finish(job, output))
        write_text(output / "slides.csv", _table(results))  # a killed run keeps its table
    write_index(output / "index.html", [_index_row(result) for result in results], "Slide heatmaps")
    return results


def _usable(device: torch.device | str) -> torch.device | str:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device '{device}': cannot be used here ({reason}); try 'cpu', and see medsd doctor"
        ) from error
    return device


@dataclass(frozen=True)
class _Mapper:
    engine: DenseEngine
    card: ModelCard
    calibration: Calibration
    digest: str
    progress: Progress

    def finish(self, job: SlideJob, output: Path) -> SlideResult:
        """The slide's outputs, made or found complete; a failure becomes a result."""
        recipe = Recipe(self.digest, asdict(self.calibration), job.mpp)
        folder = output / job.name
        try:
            if is_complete(folder, job.path, recipe):
                return SlideResult(**{**read_record(folder)["result"], "seconds": 0.0})
            return self._make(job, folder, recipe)
        except MedsdError as error:
            logger.error("%s", error)
            return SlideResult(job.name, "failed", str(error))
        except _COSTS_ONE_SLIDE as error:
            # Nobody foresaw these; the cohort goes on all the same, and the log keeps where it happened.
            logger.exception("%s", job.path)
            return SlideResult(job.name, "failed", f"{job.path}: {type(error).__name__}: {str(error).splitlines()[:1]}")

    def _make(self, job: SlideJob, folder: Path, recipe: Recipe) -> SlideResult:
        started = time.perf_counter()
        with open_slide(job.path, job.mpp) as slide:
            _clear(make_folder(folder))
            picture, level0_px = thumbnail(slide, _THUMBNAIL_PX)
            tissue = find_tissue(slide)
            maps = self.engine.map(slide, tissue, self.progress)
            mapped = time.perf_counter()
            if maps.probability.seen.any():
                result = self._write(slide, folder, maps, picture, level0_px)
                files = _MAP_FILES
            else:
                with atomic_path(folder / _THUMBNAIL) as temporary:
                    Image.fromarray(picture).save(temporary)
                result = SlideResult(job.name, "empty", f"no tissue found; see {_THUMBNAIL}")
                files = [_THUMBNAIL]
            content = {
                "methods": [maps.probability.method, maps.saliency.method],
                "pixels_read": maps.pixels_read,
                "map_seconds": round(mapped - started, 2),
            }
            result = SlideResult(**{**vars(result), "seconds": round(time.perf_counter() - started, 2)})
            scale = {
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "dimensions": slide.dimensions,
                "reader": slide.reader,
            }
        write_record(
            folder, job.path, recipe, result.status, files, {"result": vars(result), "scale": scale, **content}
        )
        return result

    def _write(self, slide: Slide, folder: Path, maps: SlideMaps, picture: RGB, level0_px: float) -> SlideResult:
        """Every file of a slide with tissue but its record."""
        probability, saliency = maps.probability, maps.saliency
        threshold = self.calibration.threshold
        scales = probability_scale(), saliency_scale(self.calibration.saliency_limit, saliency.unit)
        # What is smaller than the tile that a probability speaks of cannot be told from noise (our choice).
        smallest_um2 = (self.card.tile_px * self.card.mpp) ** 2
        regions = find_regions(probability, threshold, slide.mpp, slide.dimensions, saliency, smallest_um2)
        score = top_mean(probability.values[probability.seen])
        name = slide.path.stem
        write_ome_tiff(folder / "saliency.ome.tif", saliency)
        write_ome_tiff(folder / "probability.ome.tif", probability)
        write_geojson(folder / "regions.geojson", regions, "Tumour (model)", _TUMOUR_COLOUR, name)
        draw_overlay(
            folder / "overlay.png",
            picture,
            level0_px,
            [(probability, scales[0]), (saliency, scales[1])],
            regions,
            name,
            slide.mpp,
            slide.mpp_source,
            f"Contours: tumour probability above {threshold:.2f} (fixed on {self.calibration.source}).",
        )
        area_mm2 = sum(region.area_um2 for region in regions) / 1e6
        content = ReportContent(
            slide_name=name,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            thumbnail=picture,
            thumbnail_level0_px=level0_px,
            probability=probability,
            probability_scale=scales[0],
            saliency=saliency,
            saliency_scale=scales[1],
            threshold=threshold,
            threshold_source=f"fixed on {self.calibration.source}",
            regions=regions,
            scores={"Slide score": f"{score:.3f} (mean of the highest {TOP_SHARE:.0%} of the probability in tissue)"},
            region_pictures=[_region_picture(slide, region) for region in regions[:_TOP_REGIONS]],
            provenance=self._provenance(slide),
            caveats=self._caveats(slide),
        )
        write_report(folder / "report.html", content)
        return SlideResult(name, "ok", "", score, len(regions), area_mm2)

    def _caveats(self, slide: Slide) -> list[str]:
        caveats = [
            f"The classifier was trained on {self.card.trained_on}; on other material its scores mean little.",
            "Saliency shows what the model reacts to; it is not the probability of tumour and no diagnosis.",
        ]
        if slide.mpp > 1.1 * self.card.mpp:
            caveats.insert(
                0,
                f"The slide ({slide.mpp:g} µm per pixel) is coarser than the classifier expects "
                f"({self.card.mpp:g}): it was enlarged, and detail that the classifier looks for is missing.",
            )
        return caveats

    def _provenance(self, slide: Slide) -> dict[str, str]:
        return {
            "Slide file": f"{slide.path.name}, read by {slide.reader}",
            "Classifier": f"{self.card.encoder}, tiles of {self.card.tile_px} px at {self.card.mpp:g} µm per pixel",
            "Weights SHA-256": self.digest,
            "Colour scale": f"±{self.calibration.saliency_limit:.3g}: 99.5th percentile of |saliency| in "
            f"{self.calibration.source}",
        }


def _clear(folder: Path) -> None:
    """Outputs of another recipe, and what a killed run left, are not vouched for from here on."""
    for name in (RECORD, _THUMBNAIL, *_MAP_FILES):
        (folder / name).unlink(missing_ok=True)
        for leftover in folder.glob(f".*-{name}"):
            leftover.unlink()


def top_mean(probabilities: npt.NDArray[np.float32]) -> float:
    """Slide score: the mean of the highest 1 % of the tissue's probabilities, at least one (our choice).

    The single highest would follow one odd place; the mean of all would lose a small metastasis.
    """
    count = max(1, round(TOP_SHARE * len(probabilities)))
    return float(np.partition(probabilities, -count)[-count:].mean(dtype=np.float64))


def _region_picture(slide: Slide, region: Region) -> RGB:
    """The region with a margin, as a small square picture."""
    left, top, right, bottom = region.polygon.bounds
    side = 1.2 * max(right - left, bottom - top, _REGION_PICTURE_PX)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    return slide.read(x, y, _REGION_PICTURE_PX, _REGION_PICTURE_PX, mpp=slide.mpp * side / _REGION_PICTURE_PX)


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
