"""Slides and weights become folders of maps, contours, overlay, report and record."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medsd.cohort.entry import SlideEntry
from medsd.cohort.runner import TABLE, Made, Work, run_cohort
from medsd.errors import DatasetError, SlideError, WeightsError
from medsd.files import atomic_path, sha256_of
from medsd.heatmap.engine import Engine, make_engine
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.heatmap.maps import MapSettings, SlideMaps
from medsd.heatmap.overlay import MappedSlide, draw_overlay
from medsd.heatmap.regions import Region, find_regions, write_regions
from medsd.heatmap.report import SlideResult, write_index, write_report
from medsd.heatmap.tiff import write_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.networks.modes import usable_device
from medsd.networks.weights import Calibration, ModelCard, load_classifier
from medsd.progress import Progress, no_progress
from medsd.record import identity, read_record
from medsd.saliency.neutral import NeutralReference
from medsd.saliency.registry import METHODS
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide, hatched, thumbnail
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue
from medsd.tables import read_table

RECORD = "record.json"
_PERCENTILE = 99.5
_MAP_FILES = ["saliency.ome.tif", "probability.ome.tif", "overlay.png", "regions.geojson", "report.html"]
_STORE = "blocks"
_TOP_SHARE = 0.01
_THUMBNAIL_PX = 1600
_THUMBNAIL = "thumbnail.png"
_TOP_REGIONS = 8
_REGION_PICTURE_PX = 192


def map_slides(
    slides: Sequence[SlideEntry],
    weights: str | Path,
    output: str | Path,
    block_px: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    isolate: bool = True,
    max_unseen: float = 0.05,
    methods: Sequence[str] = (),
) -> list[SlideResult]:
    """Map every slide; leave a folder a slide, `slides.csv` and `index.html` in `output`.

    A slide whose outputs are complete and match file, weights and settings is skipped. A slide that fails is
    reported in its row, and the others are finished. Slides of earlier runs into the folder stay, and are listed.

    Args:
        slides: the slides, whose outputs are kept by their names.
        weights: a calibrated classifier's safetensors.
        output: the folder to write to.
        block_px: see `MapSettings`.
        device: where the network runs; None for the first GPU, or the CPU where there is none.
        progress: shows the slides, and the blocks or tiles of each, as they are done.
        isolate: read each slide in a child process, so that a decoder that dies or hangs costs that slide alone.
        max_unseen: a slide of which a larger share (0 to 1) cannot be decoded has failed.
        methods: of the maps, see `MapSettings`; those of the weights where none are given. The scale of a method that
            was not calibrated ends at the 99.5th percentile of the slide itself, which its record says.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide of that name in `output`.
        WeightsError: weights that cannot be used, or were never calibrated.
        OutputError: `output` cannot be written to.
        ConfigError: the device does not exist here.
    """
    output = Path(output)
    classifier, card, digest = load_classifier(weights, usable_device(device))
    calibration = card.calibration
    if calibration is None:
        raise WeightsError(f"{weights}: not calibrated (no threshold and scale); run the stage 'finetune' to its end")
    names = tuple(methods or calibration.limits)
    settings = MapSettings(names, calibration.layer, calibration.smoothing, calibration.smooth_um, block_px)
    engine = make_engine(
        classifier,
        card.tile_px,
        card.mpp,
        settings=settings,
        temperature=calibration.temperature,
        reference=None if calibration.reference is None else NeutralReference(**calibration.reference),
    )
    target = card.stain_target
    normaliser = None if target is None else StainNormaliser(profile_from_dict(target), output / "stains")
    work = _MapWork(output, engine, card, calibration, digest, normaliser, max_unseen)
    return run_cohort(work, slides, isolate=isolate, progress=progress)


def _file_of(method: str) -> str:
    """The file of a map beside the slide's saliency."""
    return f"{method}.ome.tif"


@dataclass(frozen=True)
class _MapWork(Work[SlideResult]):
    """A slide becomes the folder `<name>`; see `Work`."""

    folder: Path
    engine: Engine
    card: ModelCard
    calibration: Calibration
    digest: str
    normaliser: StainNormaliser | None
    max_unseen: float
    row_type = SlideResult
    columns = ("slide", "status", "reason", "score", "regions", "region_area_mm2", "seconds")
    record = f"{{}}/{RECORD}"
    outputs = (_THUMBNAIL, *_MAP_FILES, *map(_file_of, METHODS))

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        return {
            "weights_sha256": self.digest,
            "calibration": asdict(self.calibration),
            "methods": list(self.engine.settings.methods),
            "max_unseen": self.max_unseen,
        }

    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[SlideResult]:
        started = time.perf_counter()
        folder = self.folder / entry.name
        picture, level0_px = thumbnail(slide, _THUMBNAIL_PX)
        tissue = find_tissue(slide)
        normaliser = self.normaliser if tissue.mask.any() else None
        shown = slide if normaliser is None else normaliser.slide(slide, tissue)
        store = self._store(entry, folder)
        maps = self.engine.map(shown, tissue, progress, store)
        map_seconds = round(time.perf_counter() - started, 2)
        unseen = max(tissue.unseen, maps.unseen)
        if unseen > self.max_unseen:
            raise SlideError(
                f"{entry.path}: {unseen:.1%} of it cannot be decoded, more than {self.max_unseen:.0%}; copy it again "
                f"from its source"
            )
        if maps.probability.seen.any():
            mapped = self._mapped(slide, maps, picture, level0_px)
            write_ome_tiff(folder / "probability.ome.tif", maps.probability)
            write_ome_tiff(folder / "saliency.ome.tif", maps.saliency)
            others = {_file_of(name): shown for name, shown in list(maps.explanations.items())[1:]}
            for name, shown_too in others.items():
                write_ome_tiff(folder / name, shown_too)
            quantity = maps.saliency.quantity
            write_regions(folder / "regions.geojson", mapped.regions, "Tumour (model)", mapped.name, quantity)
            draw_overlay(folder / "overlay.png", mapped)
            write_report(folder / "report.html", mapped)
            reason = f"{maps.unseen:.1%} of the tissue could not be decoded" if maps.unseen else ""
            row, files = self.row(entry, "ok", reason), [*_MAP_FILES, *others]
            area_mm2 = mapped.region_area_mm2
            row = replace(row, score=mapped.score, regions=len(mapped.regions), region_area_mm2=area_mm2)
        else:
            with atomic_path(folder / _THUMBNAIL) as temporary:
                Image.fromarray(picture).save(temporary)
            row, files = self.row(entry, "empty", f"no tissue found; see {_THUMBNAIL}"), [_THUMBNAIL]
        content = {
            # Of a folder (a Zarr store) there is none.
            "slide": {"name": entry.path.name, "sha256": sha256_of(entry.path) if entry.path.is_file() else None},
            "scale": {
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "dimensions": slide.dimensions,
                "reader": slide.reader,
            },
            "methods": [shown.method for shown in (maps.probability, *maps.explanations.values())],
            "seam": maps.seam,
            "moved_share": maps.moved,
            "missed_share": maps.missed,
            "pixels_read": maps.pixels_read,
            "unseen_share": round(unseen, 6),
            "map_seconds": map_seconds,
            "stain": None if normaliser is None else asdict(normaliser.fit(slide, tissue)),
            "intended_use": "research use only",
        }
        shutil.rmtree(folder / _STORE, ignore_errors=True)
        return Made(row, files, content)

    def publish(self, rows: Sequence[SlideResult], _recipes: Mapping[str, Mapping[str, Any]]) -> None:
        write_index(self.folder / "index.html", rows, "Slide heatmaps")

    def _mapped(self, slide: Slide, maps: SlideMaps, picture: RGB, level0_px: float) -> MappedSlide:
        """What is shown of a slide with tissue; a pixel of its thumbnail `picture` is `level0_px` wide."""
        if maps.lost is not None:
            scale = level0_px / maps.saliency.level0_px
            rows, columns = (((np.arange(size) + 0.5) * scale).astype(np.int64) for size in picture.shape[:2])
            inside = rows.clip(max=maps.lost.shape[0] - 1), columns.clip(max=maps.lost.shape[1] - 1)
            picture = hatched(picture, maps.lost[np.ix_(*inside)])
        probability, saliency = maps.probability, maps.saliency
        threshold, source = self.calibration.threshold, self.calibration.source
        # What is smaller than the tile that a probability speaks of cannot be told from noise (our choice).
        smallest_um2 = (self.card.tile_px * self.card.mpp) ** 2
        regions = find_regions(probability, threshold, slide.mpp, slide.dimensions, saliency, smallest_um2)
        return MappedSlide(
            name=slide.path.stem,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            thumbnail=picture,
            thumbnail_level0_px=level0_px,
            damaged=maps.lost is not None,
            probability=probability,
            saliency=saliency,
            saliency_limit=self._limit(maps.saliency),
            threshold=threshold,
            threshold_source=f"fixed on {source}",
            regions=regions,
            region_pictures=[_region_picture(slide, region) for region in regions[:_TOP_REGIONS]],
            score=top_mean(probability.values[probability.seen]),
            provenance=self._provenance(slide, maps),
            caveats=self._caveats(slide, maps),
        )

    def _caveats(self, slide: Slide, maps: SlideMaps) -> list[str]:
        caveats = []
        if maps.unseen:
            caveats.append(
                f"The slide file is damaged: {maps.unseen:.1%} of the tissue (grey stripes) could not be decoded "
                f"and was not judged."
            )
        if slide.mpp > 1.1 * self.card.mpp:
            caveats.append(
                f"The slide ({slide.mpp:g} µm per pixel) is coarser than the classifier expects "
                f"({self.card.mpp:g}): it was enlarged, and detail that the classifier looks for is missing."
            )
        trained = f"The classifier was trained on {self.card.trained_on}; on other material its scores mean little."
        return [*caveats, trained, f"{maps.saliency.meaning} It is no diagnosis."]

    def _store(self, entry: SlideEntry, folder: Path) -> Path:
        """Where the slide's blocks are kept until it is done: those of another file or recipe go."""
        made_from = json.dumps([identity(entry.path), entry.mpp, self.recipe(entry)], sort_keys=True)
        store = folder / _STORE / sha256(made_from.encode()).hexdigest()[:16]
        for other in (folder / _STORE).glob("*"):
            if other != store:
                shutil.rmtree(other, ignore_errors=True)
        return store

    def _limit(self, saliency: ValueMap) -> float:
        """End of the colour scale: the weights', or for a method that they do not know the slide's own."""
        known = self.calibration.limits.get(self.engine.settings.methods[0])
        return known or float(np.percentile(np.abs(saliency.values[saliency.seen]), _PERCENTILE)) or 1.0

    def _provenance(self, slide: Slide, maps: SlideMaps) -> dict[str, str]:
        name = self.engine.settings.methods[0]
        limit = self._limit(maps.saliency)
        source = (
            self.calibration.source
            if name in self.calibration.limits
            else "this slide; compare no colours between slides"
        )
        scale = f"±{limit:.3g}: 99.5th percentile of |saliency| in {source}"
        if name == MASK:
            scale = "0 to 1, all masks closed to all open"
        sums = {}
        if name == ADDITIVE and maps.moved is not None:
            before = "before it was smoothed, " if self.engine.settings.smooth_um else ""
            sums = {"Adds up": f"to the log-odds of every tile, {before}by a correction of {maps.moved:.1%}"}
        seam = {} if maps.seam is None else {"Seams": f"{maps.seam:.2f} (jump across block borders over beside them)"}
        return {
            **sums,
            **seam,
            "Slide file": f"{slide.path.name}, read by {slide.reader}",
            "Classifier": f"{self.card.encoder}, tiles of {self.card.tile_px} px at {self.card.mpp:g} µm per pixel",
            "Weights SHA-256": self.digest,
            "Colour scale": scale,
        }


def top_mean(probabilities: npt.NDArray[np.float32]) -> float:
    """Slide score: the mean of the highest 1 % of the tissue's probabilities, at least one (our choice).

    The single highest would follow one odd place; the mean of all would lose a small metastasis.
    """
    count = max(1, round(_TOP_SHARE * len(probabilities)))
    return float(np.partition(probabilities, -count)[-count:].mean(dtype=np.float64))


def _region_picture(slide: Slide, region: Region) -> RGB:
    """The region with a margin, as a small square picture."""
    left, top, right, bottom = region.polygon.bounds
    side = 1.2 * max(right - left, bottom - top, _REGION_PICTURE_PX)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    size = _REGION_PICTURE_PX, _REGION_PICTURE_PX
    pixels, seen = slide.read_seen(x, y, *size, mpp=slide.mpp * side / _REGION_PICTURE_PX)
    return pixels if seen is None else hatched(pixels, ~seen)


def read_results(output: str | Path) -> list[SlideResult]:
    """The rows of `slides.csv` that `map_slides` left in `output`; of all slides in there, without their paths.

    Raises:
        DatasetError: there is none.
    """
    path = Path(output) / TABLE
    if not path.is_file():
        raise DatasetError(f"{path}: missing; run the stage 'heatmap' first")
    rows: list[dict[str, Any]] = read_table(path).to_dict("records")
    numbers = {"seconds": float, "score": float, "regions": int, "region_area_mm2": float}
    for row in rows:
        row.update({name: kind(row[name]) if row[name] else None for name, kind in numbers.items()})
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
