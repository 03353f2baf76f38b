"""Phantom slides: Camelyon-like lymph nodes in haematoxylin-eosin, drawn from a seed (our choice throughout).

Tumour differs from normal tissue in the size, number and chromatin of its nuclei but not in mean colour: the picture
blurred over 20 um follows one random colour field that knows nothing of the tumour.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from medsd.errors import ConfigError, DatasetError
from medsd.files import make_folder, write_json, write_text
from medsd.phantom.files import write_outlines, write_pyramid
from medsd.phantom.layers import cell_share, draw_cytoplasm, draw_nuclei, punch_fat, render, target_density
from medsd.phantom.shapes import (
    ByteArray,
    Grid,
    IntArray,
    draw_anatomy,
    draw_lesions,
    draw_node,
    rasterise,
    smooth_noise,
)
from medsd.phantom.texture import draw_stain, dust, ink_strokes, match_stain

Shortcut = Literal["none", "tint", "ink"]

FIDUCIAL_COLOUR = (0, 160, 60)
FIDUCIAL_DIAMETER_PX = 64
# Raised whenever the same specification draws other pixels, so that kept data sets are never mixed.
_FORMAT = 1
_RECORD = "phantom.json"


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
        fiducials: centres (x, y) in level-0 pixels of green discs of 64 px (0, 160, 60), drawn last.

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
    fiducials: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        checks = [
            ("seed", self.seed >= 0, "0 or more"),
            ("size_px", 512 <= self.size_px <= 16384, "512 to 16384"),
            ("mpp", 0.2 <= self.mpp <= 2, "0.2 to 2"),
            ("difficulty", 0 <= self.difficulty <= 1, "0 to 1"),
            ("pyramid_factor", self.pyramid_factor in (2, 4), "2 or 4"),
            ("shortcut", self.shortcut in get_args(Shortcut), "none, tint or ink"),
        ]
        for name, good, allowed in checks:
            if not good:
                raise ConfigError(f"phantom {name}={getattr(self, name)!r}: allowed is {allowed}")


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
    """The slide that `spec` describes, level 0, in memory."""
    # A generator for each part: with and without tumour, anatomy, colour and light are the same.
    shapes, colours, lesions, cells, light = np.random.default_rng(spec.seed).spawn(5)
    grid = Grid(spec.size_px, spec.mpp)
    node = draw_node(shapes, spec.size_px)
    capsule_um = 24 * grid.anatomy
    anatomy = draw_anatomy(shapes, grid, node, capsule_um)
    stain = draw_stain(colours, spec.shortcut == "tint")
    target = target_density(colours, grid, anatomy, stain)
    polygons = draw_lesions(lesions, node, spec.size_px, 1.2 * capsule_um / spec.mpp) if spec.tumour else ()
    mask = rasterise(polygons, spec.size_px)

    nuclei = draw_nuclei(cells, spec.difficulty, grid, anatomy, mask)
    cytoplasm = draw_cytoplasm(cells, spec.difficulty, grid, anatomy, cell_share(mask, grid))
    punch_fat(anatomy, nuclei, cytoplasm)
    factor_h, factor_e, added = match_stain(grid, stain, (nuclei, cytoplasm), target)
    added += np.float32(0.012) * smooth_noise(light, grid.cells, grid.cells / 6)
    if spec.shortcut == "ink":
        added += ink_strokes(light, grid)
    image = render(light, grid, stain, (nuclei, cytoplasm), (factor_h, factor_e, added))
    dust(light, image, spec.mpp)
    _draw_fiducials(image, spec.fiducials)
    return Phantom(image, mask, polygons)


def _draw_fiducials(image: ByteArray, centres: tuple[tuple[int, int], ...]) -> None:
    half = FIDUCIAL_DIAMETER_PX // 2
    for x, y in centres:
        left, top = max(0, x - half), max(0, y - half)
        view = image[top : max(0, y + half), left : max(0, x + half)]
        rows, columns = np.ogrid[top : top + view.shape[0], left : left + view.shape[1]]
        view[(columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= half**2] = FIDUCIAL_COLOUR


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


@dataclass(frozen=True)
class _Entry:
    """A slide of a data set and where its files go, relative to the folder."""

    spec: PhantomSpec
    slide: str
    annotation: str | None
    mask: str | None

    @property
    def files(self) -> list[str]:
        return [name for name in (self.slide, self.annotation, self.mask) if name is not None]


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
    if not 4 <= slides <= 999:
        raise ConfigError(f"phantom slides={slides}: allowed is 4 to 999 (both classes in training and in testing)")
    base = PhantomSpec(seed, False, size_px, mpp, difficulty, 2, shortcut)
    entries = _plan(base, slides)
    parameters = {"slides": slides, "seed": seed, "size_px": size_px, "mpp": mpp, "difficulty": difficulty}
    record = {"format": _FORMAT, "parameters": {**parameters, "shortcut": shortcut}}
    folder = Path(folder)
    known = {_RECORD, "testing/reference.csv", *(name for entry in entries for name in entry.files)}
    _check_folder(folder, record, known)
    make_folder(folder)
    if not (folder / _RECORD).is_file():
        write_json(folder / _RECORD, record)
    if not (folder / "testing/reference.csv").is_file():
        tests = [entry for entry in entries if entry.slide.startswith("testing/")]
        rows = [f"{Path(entry.slide).stem},{'tumor' if entry.spec.tumour else 'normal'}" for entry in tests]
        write_text(folder / "testing/reference.csv", "\n".join(["slide,label", *rows]) + "\n")
    missing = [entry for entry in entries if not all((folder / name).is_file() for name in entry.files)]
    for entry in tqdm(missing, desc="phantom slides", unit="slide", disable=None if progress else True):
        annotation = folder / entry.annotation if entry.annotation else None
        write_phantom(entry.spec, folder / entry.slide, annotation, folder / entry.mask if entry.mask else None)
    return folder


def _plan(base: PhantomSpec, slides: int) -> list[_Entry]:
    """The slides of a data set; within a class and a part, pyramids of both factors take turns."""
    tests = 2 * max(1, round(0.2 * slides))
    tumours = -(-(slides - tests) // 2)
    cue = base.shortcut
    plan = []
    for index in range(slides - tests):
        tumour = index < tumours
        number = index + 1 if tumour else index + 1 - tumours
        name = f"training/{'tumor/tumor' if tumour else 'normal/normal'}_{number:03d}.tif"
        spec = _variant(base, (0, index), tumour, (number + tumour) % 2, cue if tumour else "none")
        plan.append(_entry(spec, name))
    for index in range(tests):
        tumour = index % 2 == 0
        turn = (index // 2 + tumour) % 2
        spec = _variant(base, (1, index), tumour, turn, "none" if tumour else cue)
        plan.append(_entry(spec, f"testing/images/test_{index + 1:03d}.tif"))
    return plan


def _variant(base: PhantomSpec, place: tuple[int, int], tumour: bool, turn: int, cue: Shortcut) -> PhantomSpec:
    seed = int(np.random.SeedSequence([base.seed, *place]).generate_state(1)[0])
    return PhantomSpec(seed, tumour, base.size_px, base.mpp, base.difficulty, 4 if turn else 2, cue)


def _entry(spec: PhantomSpec, slide: str) -> _Entry:
    if not spec.tumour:
        return _Entry(spec, slide, None, None)
    part, stem = slide.split("/")[0], Path(slide).stem
    return _Entry(spec, slide, f"{part}/lesion_annotations/{stem}.xml", f"masks/{stem}_mask.tif")


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
        kept = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{folder / _RECORD}: is not JSON; {remedy}") from error
    if kept != record:
        raise DatasetError(f"{folder}: holds phantom slides of other parameters (see {_RECORD}); {remedy}")
    if found - known:
        raise DatasetError(f"{folder}: holds a file of no phantom data set ({min(found - known)}); {remedy}")
