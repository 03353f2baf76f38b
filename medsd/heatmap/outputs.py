"""The files that one slide with tissue leaves behind, all but its record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.overlay import MappedSlide, draw_overlay, explanation_warning
from medsd.heatmap.regions import Region, find_regions, write_regions
from medsd.heatmap.report import write_report
from medsd.heatmap.tiff import write_ome_tiff
from medsd.networks.weights import Calibration, ModelCard
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide, hatched

MAP_FILES = ["saliency.ome.tif", "probability.ome.tif", "overlay.png", "regions.geojson", "report.html"]
TOP_SHARE = 0.01
_TOP_REGIONS = 8
_REGION_PICTURE_PX = 192


@dataclass(frozen=True)
class OutputWriter:
    """Writes the outputs of one classifier's maps.

    Attributes:
        card: of the classifier.
        calibration: its threshold and scale.
        digest: SHA-256 of its weights.
    """

    card: ModelCard
    calibration: Calibration
    digest: str

    def write(self, folder: Path, slide: Slide, maps: SlideMaps, picture: RGB, level0_px: float) -> MappedSlide:
        """Write `MAP_FILES` into `folder`; what they show.

        Args:
            folder: the slide's own.
            slide: the slide, open.
            maps: its maps, with tissue.
            picture: the slide as a thumbnail, one pixel `level0_px` level-0 pixels wide.
        """
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
        mapped = MappedSlide(
            name=slide.path.stem,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            thumbnail=picture,
            thumbnail_level0_px=level0_px,
            damaged=maps.lost is not None,
            probability=probability,
            saliency=saliency,
            saliency_limit=self.calibration.saliency_limit,
            threshold=threshold,
            threshold_source=f"fixed on {source}",
            regions=regions,
            region_pictures=[_region_picture(slide, region) for region in regions[:_TOP_REGIONS]],
            score=top_mean(probability.values[probability.seen]),
            provenance=self._provenance(slide),
            caveats=self._caveats(slide, maps),
        )
        write_ome_tiff(folder / "saliency.ome.tif", saliency)
        write_ome_tiff(folder / "probability.ome.tif", probability)
        write_regions(folder / "regions.geojson", regions, "Tumour (model)", mapped.name, saliency.quantity)
        draw_overlay(folder / "overlay.png", mapped)
        write_report(folder / "report.html", mapped)
        return mapped

    def _caveats(self, slide: Slide, maps: SlideMaps) -> list[str]:
        caveats = [
            f"The classifier was trained on {self.card.trained_on}; on other material its scores mean little.",
            f"{explanation_warning(maps.saliency)} It is no diagnosis.",
        ]
        if slide.mpp > 1.1 * self.card.mpp:
            caveats.insert(
                0,
                f"The slide ({slide.mpp:g} µm per pixel) is coarser than the classifier expects "
                f"({self.card.mpp:g}): it was enlarged, and detail that the classifier looks for is missing.",
            )
        if maps.unseen:
            caveats.insert(
                0,
                f"The slide file is damaged: {maps.unseen:.1%} of the tissue (grey stripes) could not be decoded "
                f"and was not judged.",
            )
        return caveats

    def _provenance(self, slide: Slide) -> dict[str, str]:
        limit = self.calibration.saliency_limit
        scale = f"±{limit:.3g}: 99.5th percentile of |saliency| in {self.calibration.source}"
        if self.calibration.attribution == "mask":
            scale = "0 to 1, all masks closed to all open"
        return {
            "Slide file": f"{slide.path.name}, read by {slide.reader}",
            "Classifier": f"{self.card.encoder}, tiles of {self.card.tile_px} px at {self.card.mpp:g} µm per pixel",
            "Weights SHA-256": self.digest,
            "Colour scale": scale,
        }


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
    size = _REGION_PICTURE_PX, _REGION_PICTURE_PX
    pixels, seen = slide.read_seen(x, y, *size, mpp=slide.mpp * side / _REGION_PICTURE_PX)
    return pixels if seen is None else hatched(pixels, ~seen)
