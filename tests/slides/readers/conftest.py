"""Files of the formats that OpenSlide does not know, written by other libraries than those that read them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import glymur
import imagecodecs
import lxml.etree
import numpy as np
import pytest
import tifffile

OMERO_RGB = {"channels": [{"color": colour, "label": colour} for colour in ("FF0000", "00FF00", "0000FF")]}


def write_ngff(
    folder: Path,
    levels: list[np.ndarray],
    order: str = "yxc",
    mpp: float | None = 0.5,
    unit: str | None = "micrometer",
    compressor: dict[str, Any] | None = None,
    filters: list[dict[str, Any]] | None = None,
    omero: dict[str, Any] | None = None,
    chunk: int = 64,
) -> Path:
    """An OME-NGFF 0.4 folder (zarr 2), each chunk a file written here, stored plain or coded by imagecodecs."""
    folder.mkdir(parents=True)
    axes = [{"name": axis, "type": {"c": "channel", "t": "time"}.get(axis, "space")} for axis in order]
    for axis in axes:
        if axis["type"] == "space" and unit is not None:
            axis["unit"] = unit
    datasets = []
    for number, level in enumerate(levels):
        place = {"y": 0, "x": 1, "c": 2}
        kept = [axis for axis in order if axis in place]
        data = level.transpose([place[axis] for axis in kept])
        data = data.reshape([dict(zip(kept, data.shape, strict=True)).get(axis, 1) for axis in order])
        chunks = [chunk if axis in "yx" else level.shape[2] if axis == "c" else 1 for axis in order]
        _write_array(folder / str(number), data, chunks, compressor, filters)
        scale = [1.0 if mpp is None or axis not in "yx" else mpp * 2**number for axis in order]
        transforms = [] if mpp is None else [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    attributes: dict[str, Any] = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets}]}
    if omero is not None:
        attributes["omero"] = omero
    (folder / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (folder / ".zattrs").write_text(json.dumps(attributes))
    return folder


def _write_array(
    folder: Path, data: np.ndarray, chunks: list[int], compressor: dict[str, Any] | None, filters: Any
) -> None:
    folder.mkdir()
    about = {
        "zarr_format": 2,
        "shape": data.shape,
        "chunks": chunks,
        "dtype": data.dtype.str,
        "compressor": compressor,
        "fill_value": 0,
        "filters": filters,
        "order": "C",
        "dimension_separator": "/",
    }
    (folder / ".zarray").write_text(json.dumps(about))
    for index in np.ndindex(*[-(-length // chunk) for length, chunk in zip(data.shape, chunks, strict=True)]):
        starts = [number * chunk for number, chunk in zip(index, chunks, strict=True)]
        part = data[tuple(slice(start, start + chunk) for start, chunk in zip(starts, chunks, strict=True))]
        padded = np.zeros(chunks, data.dtype)
        padded[tuple(map(slice, part.shape))] = part
        path = folder.joinpath(*map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = padded.tobytes()
        path.write_bytes(getattr(imagecodecs, f"{compressor['id']}_encode")(raw) if compressor else raw)


def write_jp2(path: Path, pixels: np.ndarray, description: str | None = None, **coding: Any) -> Path:
    """A lossless JP2 with three resolutions in tiles, and the XML that Aperio and Omnyx add."""
    if glymur.version.openjpeg_version == "0.0.0":
        pytest.skip("JPEG 2000 needs the system library OpenJPEG (apt install libopenjp2-7)")
    coding = {"numres": 3, "cratios": [1], "tilesize": (128, 128), **coding}
    file = glymur.Jp2k(path, data=pixels, **coding)
    if description is not None:
        root = lxml.etree.Element("image")
        lxml.etree.SubElement(root, "description").text = description
        file.append(glymur.jp2box.XMLBox(xml=lxml.etree.ElementTree(root)))
    return path


def write_planes(
    path: Path, levels: list[np.ndarray], mpp: float = 0.5, channels: dict[str, Any] | None = None, **coding: Any
) -> Path:
    """An OME-TIFF pyramid in SubIFDs whose colours are a page each; `channels` is what its OME-XML says of them."""
    coding = {"tile": (64, 64), "photometric": "minisblack", "compression": "deflate", **coding}
    size = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    size |= {} if channels is None else {"Channel": channels}
    with tifffile.TiffWriter(path, ome=True) as writer:
        planes = [np.moveaxis(level, -1, 0) for level in levels]
        writer.write(planes[0], subifds=len(levels) - 1, metadata={"axes": "CYX", **size}, **coding)
        for level in planes[1:]:
            writer.write(level, subfiletype=1, metadata=None, **coding)
    return path


@pytest.fixture(scope="session")
def formats() -> SimpleNamespace:
    """The functions of this file that write slides."""
    return SimpleNamespace(ngff=write_ngff, jp2=write_jp2, planes=write_planes, omero_rgb=OMERO_RGB)
