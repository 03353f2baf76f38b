"""Slides without labels, for the inference of an exported bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medsd.cohort.dataset import Sample, TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid
from medsd.cohort.manifest import find_slides_at
from medsd.cohort.tiling import Tiling, tile_slides
from medsd.errors import NoTissueError, WeightsError
from medsd.networks.calibrated import calibrated
from medsd.networks.start import read_pickled
from medsd.progress import progress_bar
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import StainNormaliser


class PlacedTile(Sample):
    """A tile without a label (-1) and where it is: "<slide>/<x>_<y>", level-0 pixels of its upper left corner."""

    filename_or_obj: str  # where MONAI's handlers look for an item's name


class PlacedTiles(TileDataset):
    """The tiles of an index with their places, in its order."""

    def __getitem__(self, item: int) -> PlacedTile:
        index = self.index
        place = f"{index.names[index.slide[item]]}/{index.x[item]}_{index.y[item]}"
        return {**super().__getitem__(item), "filename_or_obj": place}


@dataclass(frozen=True)
class FoundSlides:
    """Slides to be mapped.

    Attributes:
        dataset_dir: a slide, a folder searched for slides, or a manifest, see `find_slides_at`.
        work_dir: where tile index and stains are kept.
        grid: how tiles are cut for `tiles`.
        stain_target: numbers of the stain that slides are normalised to; None for none.
        target: name of the class that is mapped; None for the second.
    """

    dataset_dir: str
    work_dir: str
    grid: TileGrid
    stain_target: Mapping[str, Any] | None = None
    target: str | None = None

    def jobs(self) -> list[SlideEntry]:
        """All slides.

        Raises:
            DatasetError: there are none.
        """
        return find_slides_at([self.dataset_dir], leave_out=self.work_dir)

    def tiles(self) -> PlacedTiles:
        """The tiles of all slides' tissue, which is looked for now.

        Raises:
            NoTissueError: there is none, or no slide could be read.
        """
        folder = Path(self.work_dir)
        found = tile_slides(self.jobs(), folder, Tiling(self.grid), progress=progress_bar("tiles"))
        if not len(found.index):
            raise NoTissueError(f"{self.dataset_dir}: no tiles with tissue in any slide; see {folder / 'slides.csv'}")
        target = self.stain_target
        return PlacedTiles(
            found.index,
            normaliser=None if target is None else StainNormaliser(profile_from_dict(target), folder / "stains"),
        )


def filled(network: torch.nn.Module, state: str, device: torch.device) -> torch.nn.Module:
    """A network with the tensors of a state dict (.pt), on the device.

    Raises:
        WeightsError: no such file, no state dict, or that of another network.
    """
    path = Path(state)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights; run in the bundle's folder, or set bundle_root to it")
    try:
        network.load_state_dict(read_pickled(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: weights of another network than network_def ({reason})") from error
    return network.to(device)


@dataclass(frozen=True)
class Calibrated:
    """An item's logits as probabilities, see `medsd.networks.calibrated.calibrated`; for an evaluator's postprocessing.

    Attributes:
        temperature, offset: of the weights' calibration.
    """

    temperature: float = 1.0
    offset: Sequence[float] = ()

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The item with "pred" (K,) logits replaced by probabilities."""
        logits = calibrated(item["pred"][None], self.temperature, self.offset)
        return {**item, "pred": logits.softmax(dim=1)[0]}
