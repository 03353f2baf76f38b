"""Slides and an encoder become a file of tile features each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex, tiles_of_slide
from medsd.cohort.kept import FEATURES
from medsd.cohort.runner import ALONE, Sharing, run_cohort
from medsd.cohort.work import Made, Work
from medsd.features.encoder import FeatureEncoder, FeatureRequest, load_feature_encoder
from medsd.features.h5 import check_h5, magnification, write_h5
from medsd.heatmap.findings import scale_misfits
from medsd.heatmap.folder import SlideFolder
from medsd.heatmap.report import KeptReports, ReportedSlide, short_digest
from medsd.networks.modes import usable_device
from medsd.progress import Progress, no_progress
from medsd.slides.reading import ReadTile, opened_times, read_tiles, reading_threads
from medsd.slides.slide import Slide
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import StainNormaliser
from medsd.slides.tissue import find_tissue

# Raised whenever the same weights and request give other features or another file.
_FORMAT = 1


@dataclass(frozen=True)
class FeatureSlide(ReportedSlide):
    """What became of a slide: a row of `slides.csv`.

    Attributes:
        tiles: number of tiles with features.
        unseen_tiles: those that could not be decoded in full and were left out.
        dim: numbers a tile.
        mpp, mpp_source: micrometres per level-0 pixel of the slide, and where the number comes from.
    """

    tiles: int = 0
    unseen_tiles: int = 0
    dim: int | None = None
    mpp: float | None = None
    mpp_source: str = ""


def write_features(
    slides: Sequence[SlideEntry],
    weights: str | Path,
    output: str | Path,
    request: FeatureRequest | None = None,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    sharing: Sharing = ALONE,
    isolate: bool = True,
) -> list[FeatureSlide]:
    """Features of every slide's tiles; leave `<slide>.h5`, see `write_h5`, and `slides.csv` in `output`.

    Tiles are those of `tiles_of_slide`, in its order. What is complete and matches is skipped, what fails costs itself
    alone, see `run_cohort`; a slide that is stopped half way begins anew and leaves nothing.

    Args:
        slides: the slides, whose outputs are kept by their names.
        weights: see `load_feature_encoder`.
        output: the folder to write to.
        request: what the weights do not say; None for what is usual.
        device: where the encoder runs; None for the first GPU, or the CPU where there is none.
        progress: shows the slides, and the tiles of each, as they are done.
        sharing: with other runs in the folder.
        isolate: read each slide in a child process, so that a decoder that dies or hangs costs that slide alone.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide, or of another kind, in `output`.
        WeightsError, NetworkError: weights that cannot be used.
        OutputError: `output` cannot be written to.
        ConfigError: h5py is missing, the device does not exist here, or the request does not fit the weights.
    """
    check_h5()
    output, request = Path(output), request or FeatureRequest()
    encoder = load_feature_encoder(weights, request, usable_device(device))
    target = encoder.stain_target
    normaliser = None if target is None else StainNormaliser(profile_from_dict(target), output / "stains")
    return run_cohort(_FeatureWork(output, encoder, normaliser, request), slides, 1, isolate, progress, sharing)


@dataclass(frozen=True)
class Features(KeptReports[FeatureSlide]):
    """Slides with features; see `Kept`."""

    folder: Path
    row_type = FeatureSlide
    columns = (
        *(
            "slide",
            "status",
            "model",
            "weights",
            "misfit",
            "reason",
            "tiles",
            "unseen_tiles",
            "dim",
            "mpp",
            "mpp_source",
        ),
        *("path", "seconds"),
    )
    record = FEATURES

    def publish(self, rows: Sequence[FeatureSlide], recipes: Mapping[str, Mapping[str, Any]]) -> None:
        """The table says it all."""


@dataclass(frozen=True)
class _FeatureWork(Features, Work[FeatureSlide]):
    """A slide becomes `<name>.h5`; see `Work`."""

    encoder: FeatureEncoder
    normaliser: StainNormaliser | None
    request: FeatureRequest
    outputs = ("../{}.h5",)

    @property
    def grid(self) -> TileGrid:
        side = self.encoder.tile_px
        return TileGrid(side, self.request.stride_px or side, self.encoder.mpp, self.request.min_tissue)

    @property
    def model(self) -> str:
        """What the encoder is, in words."""
        encoder = self.encoder
        return f"{encoder.dim} features of {encoder.name}, tiles of {encoder.tile_px} px at {encoder.mpp:g} µm per px."

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        request, encoder = self.request, self.encoder
        return {
            "format": _FORMAT,
            "weights_sha256": encoder.sha256,
            "encoder": [encoder.name, dict(request.encoder_options), request.encoder is not None],
            "input": [None if scale is None else list(scale) for scale in (request.input_mean, request.input_std)],
            "tiles": [encoder.tile_px, self.grid.stride_px, encoder.mpp, request.min_tissue],
            "max_unseen": request.max_unseen,
        }

    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[FeatureSlide]:
        folder = SlideFolder(self.folder, slide, entry)
        tissue = find_tissue(slide)
        tiles = tiles_of_slide(slide, entry.name, self.grid, tissue)
        normaliser = self.normaliser if tissue.mask.any() else None
        shown = slide if normaliser is None else normaliser.slide(slide, tissue)
        features, seen = self._encoded(shown, tiles, folder.progress(progress))
        unseen = int((~seen).sum())
        folder.check_seen(max(tissue.unseen, unseen / len(tiles) if len(tiles) else 0.0), self.request.max_unseen)
        misfits = scale_misfits(slide, self.encoder.mpp)
        row = replace(
            self.row(entry, "ok", f"{unseen} tiles could not be decoded" if unseen else ""),
            tiles=len(tiles) - unseen,
            unseen_tiles=unseen,
            dim=self.encoder.dim,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            model=self.model,
            weights=short_digest(self.encoder.sha256),
            misfit=" ".join(misfits),
        )
        content = folder.about() | {"model": self.model, "misfits": misfits, "tiles": row.tiles}
        if not row.tiles:
            return Made(replace(row, status="empty", reason="too little tissue for a tile"), (), content)
        coords = np.stack([tiles.x[seen], tiles.y[seen]], axis=1).astype(np.int64)
        attributes = self._attributes(slide, entry)
        write_h5(self.folder / f"{entry.name}.h5", features[seen], coords, *attributes)
        return Made(row, [name.format(entry.name) for name in self.outputs], content)

    def _encoded(
        self, slide: Slide, tiles: TileIndex, progress: Progress
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Features (n, D) of tiles, and which of them (n,) were decoded in full; the others' features mean nothing."""
        features = np.zeros((len(tiles), self.encoder.dim), np.float32)
        seen = np.zeros(len(tiles), np.bool_)
        device = next(self.encoder.network.parameters()).device
        workers = self.request.workers or 1
        threads = reading_threads(self.request.workers, device.type == "cuda")

        def work() -> Iterator[int]:
            with opened_times(slide, workers) as shared:
                read = read_tiles(shared, tiles.x, tiles.y, tiles.tile_px, tiles.mpp, threads)
                while batch := list(islice(read, self.request.batch)):
                    whole = [tile for tile in batch if tile.seen is None or tile.seen.all()]
                    if whole:
                        rows = [tile.row for tile in whole]
                        features[rows], seen[rows] = self._of(whole, device), True
                    yield from (tile.row for tile in batch)

        for _ in progress(work(), len(tiles), "tile"):
            pass
        return features, seen

    def _of(self, tiles: Sequence[ReadTile], device: torch.device) -> npt.NDArray[np.float32]:
        images = torch.from_numpy(np.stack([tile.pixels for tile in tiles])).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = self.encoder.network(images).float().cpu().numpy()
        return found

    def _attributes(self, slide: Slide, entry: SlideEntry) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of features and of places: TRIDENT's, and ours behind them."""
        encoder, place = self.encoder, {"name": entry.name, "savetodir": str(self.folder)}
        of_coords = {
            "patch_size": encoder.tile_px,
            "patch_size_level0": round(encoder.tile_px * encoder.mpp / slide.mpp),
            "level0_magnification": magnification(slide.mpp),
            "target_magnification": magnification(encoder.mpp),
            "overlap": encoder.tile_px - self.grid.stride_px,
            **place,
            "level0_width": slide.dimensions[0],
            "level0_height": slide.dimensions[1],
            "level0_mpp": slide.mpp,
            "target_mpp": encoder.mpp,
        }
        return {**place, "encoder": encoder.name, "weights_sha256": encoder.sha256}, of_coords
