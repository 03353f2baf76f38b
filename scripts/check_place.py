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
MAPS = ("probability", "saliency")
# Of a map pixel: how finely, and how far, the place is looked for; what is left out at borders.
_STEP, _FARTHEST, _BORDER = 0.05, 1.0, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("slides", type=Path, nargs="+", help="Of several: the mean, and its standard error.")
    parser.add_argument("--at", type=int, nargs=2, default=(0, 0), help="Level-0 x and y of the part.")
    parser.add_argument("--side", type=int, default=2048, help="Side of the part in level-0 pixels, at most.")
    arguments = parser.parse_args()
    found = [offsets(path, arguments.weights, arguments.at, arguments.side) for path in arguments.slides]
    for name in MAPS:
        off = np.array([each[name] for each in found])
        errors = off.std(axis=0, ddof=1) / len(off) ** 0.5 if len(off) > 1 else None
        x, y = (
            f"{value:+.1f}" if errors is None else f"{value:+.1f} ± {errors[axis]:.1f}"
            for axis, value in enumerate(off.mean(axis=0))
        )
        print(f"{name:<12}lies {x} um in x and {y} um in y from where the tissue is")


def offsets(path: Path, weights: Path, at: tuple[int, int], side: int) -> dict[str, Floats]:
    """How far (x, y) in um each map of a part of a slide lies off."""
    with tempfile.TemporaryDirectory() as folder, open_slide(path) as slide:
        sizes = tuple(min(side, length - start) for length, start in zip(slide.dimensions, at, strict=True))
        pixels, mpp = slide.read(*at, *sizes, mpp=slide.mpp), slide.mpp
        paths = [Path(folder, f"{name}.tif") for name in ("upright", "turned")]
        for place, part in zip(paths, (pixels, pixels[::-1, ::-1]), strict=True):
            write_pyramid(place, np.ascontiguousarray(part), mpp, 2)
        map_slides(named_slides(paths), weights, Path(folder, "maps"))
        found = {}
        for name in MAPS:
            upright, turned = (read_ome_tiff(Path(folder, "maps", part.stem, f"{name}.ome.tif")) for part in paths)
            # Map pixels may reach beyond the part, and then beyond its other end once turned back.
            beyond = np.array(upright.values.shape[::-1]) - np.array(sizes) / upright.level0_px
            apart = offset(_filled(upright.values), _filled(turned.values)[::-1, ::-1])
            found[name] = (apart + beyond / 2) * upright.mpp
    return found


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
