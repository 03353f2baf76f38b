"""Do maps lie where the tissue is? A part of a slide and the same turned by half a turn are mapped, and compared.

A map that lies off to one side lies off to the other on the turned part: half of what the two are apart is how far off
it is. Classifiers that learnt from turned tiles answer alike but for that.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import shift

from medsd.cohort.entry import named_slides
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.tiff import read_ome_tiff
from medsd.phantom.files import write_pyramid
from medsd.slides.slide import open_slide

Floats = npt.NDArray[np.float64]
# Of a map pixel: how finely, and how far, the place is looked for; what is left out at borders.
_STEP, _FARTHEST, _BORDER = 0.05, 1.0, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--at", type=int, nargs=2, default=(0, 0), help="Level-0 x and y of the part.")
    parser.add_argument("--side", type=int, default=2048, help="Side of the part in level-0 pixels.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_slide(arguments.slide) as slide:
        pixels, mpp = slide.read(*arguments.at, arguments.side, arguments.side, mpp=slide.mpp), slide.mpp
        paths = [Path(folder, f"{name}.tif") for name in ("upright", "turned")]
        for path, part in zip(paths, (pixels, pixels[::-1, ::-1]), strict=True):
            write_pyramid(path, np.ascontiguousarray(part), mpp, 2)
        map_slides(named_slides(paths), arguments.weights, Path(folder, "maps"))
        for name in ("probability", "saliency"):
            upright, turned = (read_ome_tiff(Path(folder, "maps", path.stem, f"{name}.ome.tif")) for path in paths)
            off = offset(_filled(upright.values), _filled(turned.values)[::-1, ::-1]) * upright.mpp
            print(f"{name:<12}lies {off[0]:+.1f} um in x and {off[1]:+.1f} um in y from where the tissue is")


def _filled(values: npt.NDArray[np.float32]) -> Floats:
    """With the mean where nothing is seen."""
    return np.where(np.isfinite(values), values, np.nanmean(values)).astype(np.float64)


def offset(upright: Floats, back: Floats) -> Floats:
    """How far (x, y) in map pixels the one lies off, by the shift with which both are most alike."""
    steps = np.arange(-_FARTHEST, _FARTHEST + _STEP / 2, _STEP)
    inner = (slice(_BORDER, -_BORDER),) * 2

    def likeness(x: float, y: float) -> float:
        pair = [shift(part, (side * y, side * x), order=1, mode="nearest") for part, side in ((upright, -1), (back, 1))]
        return float(np.corrcoef(*(part[inner].ravel() for part in pair))[0, 1])

    return np.array(max(((x, y) for x in steps for y in steps), key=lambda place: likeness(*place)))


if __name__ == "__main__":
    main()
