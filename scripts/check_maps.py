#!/usr/bin/env python
"""Do the maps of a folder say what their legend says? Read from the written files alone.

python scripts/check_maps.py runs/camelyon/heatmaps

A row a slide: where the tile around a probability pixel has |log-odds| from 1 to 12, how often the saliency's sum over
that tile has its sign, and what it misses it by at most; how many tiles are surer than that, and left out; and how many
saliency pixels lie above 0 where the probability is above 0.9, and where it is below 0.1. For maps that add up, of two
classes, dense.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medsd.errors import MedsdError
from medsd.heatmap.tiff import read_ome_tiff

# Probabilities nearer to 0 or 1 have no log-odds in float32.
_LARGEST = 12.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="What `medsd heatmap` or the bundle's stage heatmap has written.")
    parser.add_argument("--tile-um", type=float, default=64.0, help="Side of the classifier's tiles in um.")
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.folder.glob("*/saliency.ome.tif"))
    if not folders:
        sys.exit(f"{arguments.folder}: no maps in there; name the folder of a heatmap run")
    print("| slide | tiles | surer, left out | sign right | largest miss | above 0 where p > 0.9 | where p < 0.1 |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        try:
            print(row(folder, arguments.tile_um))
        except MedsdError as error:
            sys.exit(str(error))


def row(folder: Path, tile_um: float) -> str:
    """The slide's row."""
    probability, saliency = (read_ome_tiff(folder / f"{name}.ome.tif") for name in ("probability", "saliency"))
    side = round(probability.level0_px / saliency.level0_px)
    height, width = probability.values.shape
    fine = np.full((height * side, width * side), np.nan)
    rows, columns = (min(sizes) for sizes in zip(saliency.values.shape, fine.shape, strict=True))
    fine[:rows, :columns] = saliency.values[:rows, :columns]
    squares = fine.reshape(height, side, width, side).sum(axis=(1, 3))
    window = round(tile_um / probability.mpp)
    # A window of even size has no middle: the probability is that of its four placements' mean.
    taps = np.ones(window + 1 - window % 2)
    if window % 2 == 0:
        taps[0] = taps[-1] = 0.5
    sums = ndimage.correlate(squares, np.outer(taps, taps), mode="constant", cval=np.nan)
    values = probability.values.astype(np.float64)
    with np.errstate(divide="ignore"):
        log_odds = np.log(values / (1 - values))
    seen = np.isfinite(sums)
    told = seen & (np.abs(log_odds) > 1) & (np.abs(log_odds) < _LARGEST)
    surer = seen & (np.abs(log_odds) >= _LARGEST)
    sign = share(np.sign(sums[told]) == np.sign(log_odds[told]))
    miss = np.abs(sums[told] - log_odds[told]).max(initial=0.0)
    near = np.kron(values, np.ones((side, side)))
    shares = [share(fine[np.isfinite(fine) & place] > 0) for place in (near > 0.9, near < 0.1)]
    return f"| {folder.name} | {told.sum()} | {surer.sum()} | {sign} | {miss:.2g} | {shares[0]} | {shares[1]} |"


def share(of: npt.NDArray[np.bool_]) -> str:
    """Of what is true; a dash of nothing."""
    return f"{of.mean():.1%}" if of.size else "-"


if __name__ == "__main__":
    main()
