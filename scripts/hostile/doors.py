"""The files that medsd takes from outside: an undamaged one of each kind, how medsd reads it, and who else does."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pydicom
import tifffile
import zarr
from hostile.mutations import BYTES, Mutation, safetensors_header, text, tiff_entry
from openslide import OpenSlide, OpenSlideError
from PIL import Image
from shapely import wkb
from shapely.geometry import Polygon

from medsd.annotations import read_annotations
from medsd.annotations.asap import write_asap_xml
from medsd.annotations.geojson import write_geojson
from medsd.annotations.shapes import Outline, annotations_of
from medsd.audit import audit
from medsd.cohort.index import TileIndex
from medsd.cohort.manifest import read_manifest
from medsd.cohort.patches import read_patch_table
from medsd.errors import OutputError
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.phantom.files import write_pyramid
from medsd.phantom.slides import PhantomSpec, draw_phantom
from medsd.record import read_record, write_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.slide import Slide, open_slide, read_blocks, thumbnail
from medsd.slides.stain.profile import profile_from_file
from medsd.tables import write_table

_SIDE_PX, _MPP = 512, 0.5
_MOST_PX = 3072
_OVERVIEW_PX, _PLACE_PX = 256, 32
_REAL = (
    *("CMU-1-Small-Region.svs", "test3-DAPI-2-(387).ndpi", "sm_image_numbers.dcm", "boxes.tiff"),
    *("derived/cmu1-region-pyramid-jpeg.tif", "derived/cmu1-region-pyramid.ome.tif"),
)
# Another decoder of the same bytes may round colours otherwise, and does what it likes beside a damaged place.
_APART, _SHARE = 8, 0.01


@dataclass(frozen=True)
class Door:
    """A kind of file, and the way that it comes in.

    Attributes:
        name: in the table.
        path: an undamaged file, or folder of files of which one is damaged.
        read: what medsd makes of it, comparable with `==` or a slide's (pixels, seen).
        mutations: ways to damage it.
        elsewhere: whether others read the damaged file (path, what medsd made of it, what it made of the undamaged one)
            as medsd does; an exception says no.
        product: how the commands read it where they do not call `read` in their own process.
    """

    name: str
    path: Path
    read: Callable[[Path], Any]
    mutations: tuple[Mutation, ...]
    elsewhere: Callable[[Path, Any, Any], bool] = lambda path, found, truth: False
    product: Callable[[Path], Any] | None = None


def make_doors(folder: Path, data: Path | None) -> list[Door]:
    """Every door, with its undamaged file written into `folder` or, of vendors' formats, found in `data`."""
    phantom = draw_phantom(PhantomSpec(seed=1, tumour=True, size_px=_SIDE_PX))
    return [*_slides(folder, phantom.image, data), *_annotations(folder), *_tables(folder), *_others(folder)]


def _slides(folder: Path, image: npt.NDArray[np.uint8], data: Path | None) -> Iterator[Door]:
    write_pyramid(folder / "jpeg.tif", image, _MPP, 2)
    levels = (image, image[::2, ::2], image[::4, ::4])
    for name in ("deflate", "lzw", "none"):
        with tifffile.TiffWriter(folder / f"{name}.tif") as writer:
            for number, level in enumerate(levels):
                kind = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": name}
                scale = (1e4 / _MPP / 2**number,) * 2
                writer.write(level, subfiletype=int(number > 0), resolution=scale, resolutionunit="CENTIMETER", **kind)
    with tifffile.TiffWriter(folder / "slide.ome.tif", ome=True) as writer:
        size = {f"PhysicalSize{axis}": _MPP for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        kind = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
        writer.write(image, subifds=2, metadata={"axes": "YXS", **size}, **kind)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, metadata=None, **kind)
    for name in ("jpeg.tif", "deflate.tif", "lzw.tif", "none.tif", "slide.ome.tif"):
        yield _slide(f"slide, own {name}", folder / name)
    Image.fromarray(image).save(folder / "picture.png")
    yield _slide("slide, PNG", folder / "picture.png")
    yield _slide("slide, OME-NGFF", _ngff(folder / "slide.zarr", levels))
    for name in _REAL:
        if data is not None and (path := data / "wsi" / name).is_file():
            yield _slide(f"slide, {path.name}", Path(shutil.copyfile(path, folder / path.name)))


def _ngff(folder: Path, levels: tuple[npt.NDArray[np.uint8], ...]) -> Path:
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    datasets = []
    for number, level in enumerate(levels):
        array = group.create_array(str(number), shape=level.shape, chunks=(128, 128, 3), dtype="uint8")
        array[:] = level
        scale = [_MPP * 2**number, _MPP * 2**number, 1.0]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    axes.append({"name": "c", "type": "channel"})
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return folder


def _slide(name: str, path: Path) -> Door:
    kinds = (*BYTES, text) if path.is_dir() else BYTES
    tiff = path.suffix in (".tif", ".tiff", ".svs")
    return Door(
        name, path, _read_here, (*kinds, tiff_entry, tiff_entry) if tiff else kinds, _shown_elsewhere, _read_in_child
    )


def _read_here(path: Path) -> Any:
    with open_slide(path, mpp=_MPP) as slide:
        return _picture(slide)


def _read_in_child(path: Path) -> Any:
    with IsolatedSlide(path, mpp=_MPP) as slide:
        return _picture(slide)


def _picture(slide: Slide) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Level 0, no more of it than any undamaged one has, and which of it was seen; the whole is looked at from afar."""
    thumbnail(slide, _OVERVIEW_PX)
    width, height = (min(side, _MOST_PX) for side in slide.dimensions)
    pixels, seen = read_blocks(slide, width, height, slide.mpp)
    return pixels, np.ones(pixels.shape[:2], np.bool_) if seen is None else seen


def _shown_elsewhere(path: Path, found: Any, truth: Any) -> bool:
    """Whether OpenSlide, or where it does not open the file another decoder, shows the pixels that have changed.

    Place by place and only where something changed, for one damaged tile keeps others from being shown.
    """
    pixels, seen = found
    changed = seen.copy()
    if pixels.shape == truth[0].shape:
        changed &= (pixels != truth[0]).any(axis=2)
    confirmed, show = 0, _another_reader(path)
    for top in range(0, pixels.shape[0], _PLACE_PX):
        for left in range(0, pixels.shape[1], _PLACE_PX):
            place = np.s_[top : top + _PLACE_PX, left : left + _PLACE_PX]
            if changed[place].any():
                height, width = changed[place].shape
                other = show(left, top, width, height)
                if other is not None and other.shape == (height, width, 3):
                    alike = np.abs(pixels[place].astype(np.int16) - other).max(axis=2) <= _APART
                    confirmed += int((alike & changed[place]).sum())
    return confirmed >= (1 - _SHARE) * changed.sum()


def _another_reader(path: Path) -> Callable[[int, int, int, int], npt.NDArray[Any] | None]:
    """What shows a rectangle (left, top, width, height) of level 0, or None where it cannot."""
    try:
        OpenSlide(path).close()
    except OpenSlideError:
        known = next((shown for read in (_by_format, _by_pillow) if (shown := _or_none(read, path)) is not None), None)
        return lambda x, y, width, height: None if known is None else known[y : y + height, x : x + width]

    def show(left: int, top: int, width: int, height: int) -> npt.NDArray[Any] | None:
        with suppress(OpenSlideError), OpenSlide(path) as slide:  # anew, for it refuses all after an error
            shown = Image.new("RGBA", (width, height), "white")
            shown.alpha_composite(slide.read_region((left, top), 0, (width, height)))
            return np.asarray(shown)[..., :3]
        return None

    return show


def _or_none(read: Callable[[Path], npt.NDArray[Any]], path: Path) -> npt.NDArray[Any] | None:
    try:
        pixels = np.atleast_3d(read(path))
    except Exception:  # noqa: BLE001 - whatever a decoder says of a damaged file, it does not show it
        return None
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _by_pillow(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def _by_format(path: Path) -> npt.NDArray[np.uint8]:
    if path.is_dir():
        return np.asarray(zarr.open_group(path, mode="r")["0"])
    if path.suffix == ".dcm":
        return np.asarray(pydicom.dcmread(path).pixel_array)
    return _tile_by_tile(path)


def _tile_by_tile(path: Path) -> npt.NDArray[np.int16]:
    """A TIFF's first page as tifffile decodes it, -1 where it cannot."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        known = np.full((page.imagelength, page.imagewidth, 3), -1, np.int16)
        for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            file.filehandle.seek(offset)
            with suppress(Exception):
                tile, place, _ = page.decode(file.filehandle.read(count), number, jpegtables=page.jpegtables)
                top, left = place[2], place[3]
                shown = np.asarray(tile)[0, : page.imagelength - top, : page.imagewidth - left]
                known[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    return known


def _annotations(folder: Path) -> Iterator[Door]:
    corners = [(20.5, 30), (260, 40), (300, 200), (140, 320), (30, 220)]
    outlines = [
        Outline(f"Annotation {number}", group, False, Polygon([(x + 60 * number, y) for x, y in corners]))
        for number, group in enumerate(("_0", "_1", "_0"))
    ]
    drawn = annotations_of(outlines)
    write_asap_xml(folder / "outlines.xml", drawn)
    write_geojson(folder / "outlines.geojson", drawn)
    write_pyramid(folder / "mask.tif", np.pad(np.ones((200, 256), np.uint8), ((40, 272), (100, 156))), _MPP, 2)
    yield Door("annotation, ASAP XML", folder / "outlines.xml", _areas, (*BYTES, *[text] * 6), _xml)
    yield Door("annotation, GeoJSON", folder / "outlines.geojson", _areas, (*BYTES, *[text] * 6), _json)
    yield Door("annotation, mask", folder / "mask.tif", _areas, (*BYTES, tiff_entry), _mask)


def _areas(path: Path) -> Any:
    found = read_annotations(path, (_SIDE_PX, _SIDE_PX))
    assert found.tumour.is_valid and np.isfinite(found.tumour.area)
    return wkb.dumps(found.tumour), wkb.dumps(found.excluded)


# Of text there is no second reading, but only whether it is text of its kind at all; else these raise.


def _xml(path: Path, _found: Any, _truth: Any) -> bool:
    ElementTree.fromstring(path.read_bytes())  # noqa: S314 - the pure parser is the judge here
    return True


def _json(path: Path, _found: Any, _truth: Any) -> bool:
    json.loads(path.read_text("utf-8-sig"))
    return True


def _csv(path: Path, _found: Any, _truth: Any) -> bool:
    with open(path, encoding="utf-8-sig", newline="") as table:
        list(csv.reader(table, strict=True))
    return True


def _mask(path: Path, _found: Any, _truth: Any) -> bool:
    return bool(np.asarray(tifffile.imread(path, key=0)).max() <= 1)


def _tables(folder: Path) -> Iterator[Door]:
    cohort = folder / "cohort"
    for part in ("cohort/patches", "cohort/slides"):
        (folder / part).mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (32, 32), (200, 20 * number, 150)).save(cohort / "patches" / f"p{number}.png")
        (cohort / "slides" / f"s{number}.tif").write_bytes(b"II*\0")
    rows = [{"id": f"p{number}", "label": number % 2, "patient": f"a{number // 2}"} for number in range(6)]
    write_table(cohort / "patches" / "labels.csv", rows)
    slides = [
        {"slide": f"slides/s{n}.tif", "label": ("normal", "tumour")[n % 2], "mpp": 0.25, "patient": f"a{n}"}
        for n in range(6)
    ]
    write_table(cohort / "slides.csv", slides)
    kinds = (*BYTES, *[text] * 6)
    yield Door("table, slides.csv", cohort / "slides.csv", lambda path: repr(read_manifest(path, cohort)), kinds, _csv)
    yield Door("table, patches", cohort / "patches" / "labels.csv", _patches, kinds, _csv)
    columns = [np.arange(9, dtype=kind) for kind in (np.int32, np.int32, np.float32)]
    index = TileIndex(
        *(("s",), ("s.tif",), (0.5,), np.zeros(9, np.int32), columns[0], columns[1], np.zeros(9, np.int8)),
        tissue=columns[2] / 9,
        tile_px=64,
        mpp=1.0,
    )
    index.save(folder / "tiles.npz")
    yield Door("table, tile index", folder / "tiles.npz", _tiles, BYTES)


def _patches(path: Path) -> Any:
    # It is found by its name; the damaged one lies in its place while it is read.
    table = read_patch_table(path.parent, "patient")
    return [table.label.tolist(), table.group.tolist(), [patch.name for patch in table.paths]]


def _tiles(path: Path) -> Any:
    found = TileIndex.load(path)
    return repr([np.asarray(value).tolist() for value in vars(found).values()])


def _others(folder: Path) -> Iterator[Door]:
    classifier = TileClassifier("resnet10t")
    card = ModelCard("resnet10t", classifier.classes, 64, _MPP, "nothing")
    save_classifier(folder / "weights.safetensors", classifier, card)
    kinds = (*BYTES, *[safetensors_header] * 6)
    yield Door("weights", folder / "weights.safetensors", _weights, kinds)
    (folder / "made.bin").write_bytes(b"made")
    write_record(folder / "record.json", {"tile_px": 64, "mpp": _MPP}, ["made.bin"], status="ok", tiles=9)
    yield Door("record of a run", folder / "record.json", _record, (*BYTES, *[text] * 6), _json)
    target = {"method": "reinhard", "mean": [65.0, 20.0, -10.0], "std": [15.0, 9.0, 6.0]}
    (folder / "stain.json").write_text(json.dumps({"stain_target": target}, indent=1))
    yield Door("stain target", folder / "stain.json", _stain, (*BYTES, *[text] * 6), _json)
    bundle = Path(__file__).parents[2] / "bundles" / "camelyon.json"
    (folder / "bundle.json").write_bytes(bundle.read_bytes())
    yield Door("configuration, audited", folder / "bundle.json", _audit, (*BYTES, *[text] * 6), lambda *_: True)


def _weights(path: Path) -> Any:
    classifier, card, sha256 = load_classifier(path)
    return [sha256, repr(card), {name: tensor.numpy().tobytes() for name, tensor in classifier.state_dict().items()}]


def _record(path: Path) -> Any:
    found = read_record(path, {"tile_px": 64, "mpp": _MPP})
    if found is None:
        raise OutputError(f"{path}: not believed, so its outputs are made again")
    return found["status"], found["tiles"]


def _stain(path: Path) -> Any:
    return repr(profile_from_file(path))


def _audit(path: Path) -> Any:
    return [(finding.key, finding.text, finding.unknown) for finding in audit([path])]
