"""Phantom slides: Camelyon-like lymph nodes in haematoxylin-eosin, drawn from a seed (our choice throughout).

Tumour differs from normal tissue in the size, number and chromatin of its nuclei but not in mean colour: the picture
blurred over 20 um follows one random colour field that knows nothing of the tumour.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from shapely.geometry import MultiPolygon, Polygon
from tqdm import tqdm

from medsd.annotations import Annotations, rasterise
from medsd.checks import check_choice, check_number
from medsd.errors import DatasetError
from medsd.files import make_folder, read_json, write_json, write_text
from medsd.phantom.files import write_outlines, write_pyramid
from medsd.phantom.layers import cell_share, draw_cytoplasm, draw_nuclei, punch_fat, render, target_density
from medsd.phantom.shapes import (
    ByteArray,
    Grid,
    IntArray,
    draw_anatomy,
    draw_lesions,
    draw_node,
    smooth_noise,
)
from medsd.phantom.texture import draw_stain, dust, ink_strokes, match_stain
from medsd.record import differences

Shortcut = Literal["none", "tint", "ink"]

# Raised whenever the same specification draws other pixels, so that kept data sets are never mixed.
_FORMAT = 1
_DRAWN_AT_ONCE = 2
_RECORD, _REFERENCE = "phantom.json", "testing/reference.csv"


@dataclass(frozen=True)
class PhantomSpec:
    """Everything that a phantom slide follows from.

    Attributes:
        seed: 0 or more; the same specification gives the same pixels.
        tumour: whether there are metastases.
        size_px: side of the square slide at level 0 (512 to 16,384); drawing takes about 20 bytes a pixel.
        mpp: micrometres per level-0 pixel (0.2 to 2).
        difficulty: 0, tumour nuclei plainly larger and paler, to 1, the same as those of lymphocytes.
        pyramid_factor: 2 or 4, from one level to the next.
        shortcut: a cue over the whole slide: a yellow stain tint, or felt-pen strokes.

    Raises:
        ConfigError: a value is out of its range.
    """

    seed: int
    tumour: bool
    size_px: int = 4096
    mpp: float = 0.5
    difficulty: float = 0.3
    pyramid_factor: int = 2
    shortcut: Shortcut = "none"

    def __post_init__(self) -> None:
        check_number("seed", self.seed, "[0, inf)", whole=True)
        check_number("size_px", self.size_px, "[512, 16384]", whole=True)
        check_number("mpp", self.mpp, "[0.2, 2]")
        check_number("difficulty", self.difficulty, "[0, 1]")
        check_choice("pyramid_factor", str(self.pyramid_factor), ("2", "4"))
        check_choice("shortcut", self.shortcut, get_args(Shortcut))


@dataclass(frozen=True)
class Phantom:
    """A drawn slide.

    Attributes:
        image: uint8 RGB (size, size, 3), level 0.
        mask: uint8 (size, size), 1 where the pixel's centre lies in tumour, else 0.
        polygons: the tumour's outlines, int64 (n, 2) corners (x, y) in level-0 pixels, not closed.
    """

    image: ByteArray
    mask: ByteArray
    polygons: tuple[IntArray, ...]


def draw_phantom(spec: PhantomSpec) -> Phantom:
    """The slide that `spec` describes, level 0, in memory.

    Example:
        >>> slide = draw_phantom(PhantomSpec(seed=1, tumour=True, size_px=512, mpp=2.0))
        >>> slide.image.shape, bool(slide.mask.any())
        ((512, 512, 3), True)
    """
    # A generator for each part: with and without tumour, anatomy, colour and light are the same.
    shapes, colours, lesions, cells, light = np.random.default_rng(spec.seed).spawn(5)
    grid = Grid(spec.size_px, spec.mpp)
    node = draw_node(shapes, spec.size_px)
    capsule_um = 24 * grid.anatomy
    anatomy = draw_anatomy(shapes, grid, node, capsule_um)
    stain = draw_stain(colours, spec.shortcut == "tint")
    target = target_density(colours, grid, anatomy, stain)
    polygons = draw_lesions(lesions, node, spec.size_px, 1.2 * capsule_um / spec.mpp) if spec.tumour else ()
    tumour = Annotations(MultiPolygon([Polygon(polygon) for polygon in polygons]))
    mask = rasterise(tumour, spec.size_px, spec.size_px, 1.0).astype(np.uint8)

    nuclei = draw_nuclei(cells, spec.difficulty, grid, anatomy, mask)
    cytoplasm = draw_cytoplasm(cells, spec.difficulty, grid, anatomy, cell_share(mask, grid))
    punch_fat(anatomy, nuclei, cytoplasm)
    factor_h, factor_e, added = match_stain(grid, stain, (nuclei, cytoplasm), target)
    added += np.float32(0.012) * smooth_noise(light, grid.cells, grid.cells / 6)
    if spec.shortcut == "ink":
        added += ink_strokes(light, grid)
    image = render(light, grid, stain, (nuclei, cytoplasm), (factor_h, factor_e, added))
    dust(light, image, spec.mpp)
    return Phantom(image, mask, polygons)


def write_phantom(
    spec: PhantomSpec,
    slide_path: str | Path,
    annotation_path: str | Path | None = None,
    mask_path: str | Path | None = None,
) -> None:
    """Draw `spec` and write it: a pyramidal TIFF (JPEG), the ASAP XML, the 0/1 mask with the same levels (deflate).

    Raises:
        OutputError: a file cannot be written.
    """
    phantom = draw_phantom(spec)
    if annotation_path is not None:
        write_outlines(annotation_path, phantom.polygons)
    if mask_path is not None:
        write_pyramid(mask_path, phantom.mask, spec.mpp, spec.pyramid_factor)
    # Last: a slide that is there has its annotation and mask.
    write_pyramid(slide_path, phantom.image, spec.mpp, spec.pyramid_factor)


def write_phantom_dataset(
    folder: str | Path,
    slides: int = 6,
    seed: int = 0,
    size_px: int = 4096,
    mpp: float = 0.5,
    difficulty: float = 0.3,
    shortcut: Shortcut = "none",
    progress: bool = False,
) -> Path:
    """Make a data set of phantom slides in the folders and names of CAMELYON16, once; later calls find it and return.

    A fifth of the slides twice over (at least two) are for testing, half of them with tumour, as are the others.
    With a `shortcut` the cue is on the tumour slides in training and on the normal ones in testing.
    Slides whose files are missing are drawn again, alone. Pyramids are 2x and 4x in turn.

    Args:
        folder: is created; must be empty or hold the data set of these same parameters.
        slides: 4 to 999, training and testing together.
        seed: 0 or more.
        size_px, mpp, difficulty, shortcut: as in `PhantomSpec`.
        progress: show a bar on a terminal.

    Returns:
        `folder`.

    Raises:
        ConfigError: a parameter is out of its range.
        DatasetError: the folder holds something else.
        OutputError: a file cannot be written.
    """
    check_number("slides", slides, "[4, 999]", whole=True, hint="both classes are in training and in testing")
    plan = _plan(PhantomSpec(seed, False, size_px, mpp, difficulty, 2, shortcut), slides)
    parameters = {"slides": slides, "seed": seed, "size_px": size_px, "mpp": mpp, "difficulty": difficulty}
    record = {"format": _FORMAT, "parameters": {**parameters, "shortcut": shortcut}}
    folder = Path(folder)
    files = {slide: _files_of(slide, spec) for slide, spec in plan.items()}
    _check_folder(folder, record, {_RECORD, _REFERENCE, *(name for names in files.values() for name in names)})
    make_folder(folder)
    if not (folder / _RECORD).is_file():
        write_json(folder / _RECORD, record)
    if not (folder / _REFERENCE).is_file():
        tests = {Path(slide).stem: spec.tumour for slide, spec in plan.items() if slide.startswith("testing/")}
        rows = [f"{name},{'tumor' if tumour else 'normal'}" for name, tumour in tests.items()]
        write_text(folder / _REFERENCE, "\n".join(["slide,label", *rows]) + "\n")
    missing = [slide for slide, names in files.items() if not all((folder / name).is_file() for name in names)]

    def write(slide: str) -> None:
        write_phantom(plan[slide], *(folder / name for name in files[slide]))

    # NumPy works without the interpreter's lock; more than two at once would want more memory.
    with ThreadPoolExecutor(_DRAWN_AT_ONCE) as pool:
        drawn = pool.map(write, missing)
        for _ in tqdm(drawn, "phantom slides", len(missing), unit="slide", disable=None if progress else True):
            pass
    return folder


def _plan(base: PhantomSpec, slides: int) -> dict[str, PhantomSpec]:
    """The slides of a data set by path; within a class and a part, pyramids of both factors take turns."""
    tests = 2 * max(1, round(0.2 * slides))
    tumours = -(-(slides - tests) // 2)
    plan = {}
    for index in range(slides - tests):
        tumour = index < tumours
        number = index + 1 if tumour else index + 1 - tumours
        name = f"training/{'tumor/tumor' if tumour else 'normal/normal'}_{number:03d}.tif"
        plan[name] = _variant(base, (0, index), tumour, number + tumour, cued=tumour)
    for index in range(tests):
        tumour = index % 2 == 0
        plan[f"testing/images/test_{index + 1:03d}.tif"] = _variant(
            base, (1, index), tumour, index // 2 + tumour, cued=not tumour
        )
    return plan


def _variant(base: PhantomSpec, place: tuple[int, int], tumour: bool, turn: int, cued: bool) -> PhantomSpec:
    seed = int(np.random.SeedSequence([base.seed, *place]).generate_state(1)[0])
    shortcut = base.shortcut if cued else "none"
    return replace(base, seed=seed, tumour=tumour, pyramid_factor=4 if turn % 2 else 2, shortcut=shortcut)


def _files_of(slide: str, spec: PhantomSpec) -> list[str]:
    """A slide's files in the data set: itself, and with tumour its annotation and mask."""
    part, stem = slide.split("/")[0], Path(slide).stem
    return [slide, f"{part}/lesion_annotations/{stem}.xml", f"masks/{stem}_mask.tif"] if spec.tumour else [slide]


def _check_folder(folder: Path, record: dict[str, Any], known: set[str]) -> None:
    """Raises DatasetError unless `folder` is absent, empty, or a (perhaps unfinished) data set of `record`."""
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder}: is a file, not a folder; name another folder for the phantom slides")
    # Hidden files are the system's, or what a killed process left of a slide.
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    if not found:
        return
    remedy = "use another folder or delete this one"
    if _RECORD not in found:
        raise DatasetError(f"{folder}: holds files that are no phantom data set ({min(found)}); {remedy}")
    try:
        kept = read_json(folder / _RECORD)
        changed = differences(kept["parameters"], record["parameters"]) or differences(kept, record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{folder / _RECORD}: says nothing of phantom slides; {remedy}") from error
    if changed:
        raise DatasetError(f"{folder}: holds phantom slides of another {', '.join(changed)} (see {_RECORD}); {remedy}")
    if found - known:
        raise DatasetError(f"{folder}: holds a file of no phantom data set ({min(found - known)}); {remedy}")
