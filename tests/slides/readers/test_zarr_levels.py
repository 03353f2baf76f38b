"""OME-NGFF folders: what they may hold, where their scale is, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from medsd.errors import MissingMppError, SlideError
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.zarr_levels import NgffSlide
from medsd.slides.slide import open_slide


@pytest.fixture(scope="module")
def levels(coding: Any) -> list[np.ndarray]:
    pixels = coding.coded_pixels(211, 147)
    return [pixels, coding.halved(pixels, 2), coding.halved(pixels, 4)]


@pytest.mark.parametrize("order", ["yxc", "cyx", "xyc", "czyx", "tczyx"])
@pytest.mark.parametrize("compressor", [None, {"id": "zlib", "level": 1}])
def test_axes_in_any_order(
    tmp_path: Path, formats: Any, levels: list[np.ndarray], order: str, compressor: dict[str, Any] | None
) -> None:
    path = formats.ngff(tmp_path / "a.zarr", levels, order, compressor=compressor, omero=formats.omero_rgb)
    with open_slide(path) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("zarr", 0.5, "NGFF scale")
        for number, level in enumerate(levels):
            got = slide.read(0, 0, *level.shape[1::-1], mpp=0.5 * 2**number)
            assert np.array_equal(got, level)


def test_grey_is_grey(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    path = formats.ngff(tmp_path / "grey.zarr", [levels[0][..., :1]], "cyx")
    assert np.array_equal(NgffSlide(path).read(0, 2, 3, 99, 88), np.repeat(levels[0][3:91, 2:101, :1], 3, axis=2))


def test_version_5_is_read(tmp_path: Path, levels: list[np.ndarray]) -> None:
    path = tmp_path / "five.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array("s0", data=levels[0], chunks=(32, 32, 3), shards=(64, 64, 3))
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "yx"] + [{"name": "c", "type": "channel"}]
    scale = [{"type": "scale", "scale": [250.0, 250.0, 1.0]}]
    image = {"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": scale}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
        assert np.array_equal(slide.read(0, 0, 211, 147), levels[0])


def test_levels_are_those_that_the_image_names(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    path = formats.ngff(tmp_path / "a.zarr", levels)
    attributes = json.loads((path / ".zattrs").read_text())
    del attributes["multiscales"][0]["datasets"][1]
    (path / ".zattrs").write_text(json.dumps(attributes))
    assert NgffSlide(path).sizes == ((211, 147), (52, 36))


@pytest.mark.parametrize(
    ("unit", "mpp", "found"),
    [("micrometer", 0.25, 0.25), ("nanometer", 250.0, 0.25), ("millimeter", 0.0005, 0.5), ("angstrom", 5000.0, 0.5)],
)
def test_units_of_the_scale(
    tmp_path: Path, formats: Any, levels: list[np.ndarray], unit: str, mpp: float, found: float
) -> None:
    with open_slide(formats.ngff(tmp_path / "a.zarr", levels, mpp=mpp, unit=unit)) as slide:
        assert slide.mpp == pytest.approx(found)


@pytest.mark.parametrize(("unit", "mpp"), [(None, 0.5), ("pixel", 0.5), ("micrometer", None), ("micrometer", 1000.0)])
def test_a_scale_that_says_nothing(
    tmp_path: Path, formats: Any, levels: list[np.ndarray], unit: str | None, mpp: float | None
) -> None:
    path = formats.ngff(tmp_path / "a.zarr", levels, mpp=mpp, unit=unit)
    with pytest.raises(MissingMppError, match=r"a\.zarr: scale unknown"):
        open_slide(path)


def test_the_scale_of_the_image_multiplies_that_of_its_levels(
    tmp_path: Path, formats: Any, levels: list[np.ndarray]
) -> None:
    path = formats.ngff(tmp_path / "a.zarr", levels, mpp=1.0)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [0.4, 0.4, 1]}]
    (path / ".zattrs").write_text(json.dumps(attributes))
    assert open_slide(path).mpp == pytest.approx(0.4)


def test_a_codec_that_unpickles_is_never_run(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    path = formats.ngff(tmp_path / "evil.zarr", levels[:1], filters=[{"id": "pickle"}])
    with pytest.raises(SlideError, match=r"evil\.zarr.*pickle"):
        open_reader(path)


def test_other_codecs_than_those_for_bytes_are_refused(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    scaled = {"id": "fixedscaleoffset", "scale": 1, "offset": 0, "dtype": "|u1", "astype": "|u1"}
    path = formats.ngff(tmp_path / "odd.zarr", levels[:1], filters=[scaled])
    with pytest.raises(SlideError, match=r"odd\.zarr: compression 'fixedscaleoffset' is not decoded here; write it"):
        open_reader(path)


def change(path: Path, key: str, value: Any) -> None:
    about = json.loads((path / "0" / ".zarray").read_text())
    (path / "0" / ".zarray").write_text(json.dumps(about | {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "<u2", "3 channels of uint16"),
        ("dtype", "|O", r"broken\.zarr"),
        ("chunks", [2**20, 2**20, 3], "chunks"),
        ("compressor", {"id": "unheard-of"}, r"broken\.zarr"),
        ("shape", "wide", r"broken\.zarr"),
        ("shape", [147, 211], r"broken\.zarr"),
    ],
)
def test_arrays_that_are_no_picture(
    tmp_path: Path, formats: Any, levels: list[np.ndarray], key: str, value: Any, words: str
) -> None:
    path = formats.ngff(tmp_path / "broken.zarr", levels[:1])
    change(path, key, value)
    with pytest.raises(SlideError, match=words) as caught:
        open_reader(path)
    assert "broken.zarr" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: a["multiscales"][0]["datasets"].clear(), "has no levels"),
        (lambda a: a["multiscales"][0]["datasets"][0].update(path="9"), "damaged"),
        (lambda a: a["multiscales"][0]["datasets"][0].update(path="../../b"), "damaged"),
        (lambda a: a["multiscales"][0].update(axes=["y", "x", "c"]), "no image of OME-NGFF"),
        (lambda a: a["multiscales"][0]["axes"].pop(), "axes 'yx' of an array of 3"),
        (lambda a: a["multiscales"][0]["axes"][0].update(name="q"), "axes 'qxc'"),
        (lambda a: a["multiscales"][0]["axes"][0].pop("name"), "damaged"),
        (lambda a: a.update(multiscales="many"), "damaged"),
        (lambda a: a.pop("multiscales"), "no image of OME-NGFF 0.4 or 0.5; write it as OME-NGFF 0.4"),
        (lambda a: a.update(omero={"channels": [{"color": c} for c in ("0000FF", "00FF00", "FF0000")]}), "colours"),
        (
            lambda a: a["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].update(scale=["x", {}, 1]),
            "damaged",
        ),
    ],
)
def test_metadata_that_is_not_right(
    tmp_path: Path, formats: Any, levels: list[np.ndarray], edit: Any, words: str
) -> None:
    path = formats.ngff(tmp_path / "odd.zarr", levels)
    attributes = json.loads((path / ".zattrs").read_text())
    edit(attributes)
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(SlideError, match=words) as caught:
        open_reader(path)
    assert "odd.zarr" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01"])
def test_json_that_is_none(tmp_path: Path, formats: Any, levels: list[np.ndarray], text: str) -> None:
    for number, name in enumerate((".zattrs", ".zgroup", "0/.zarray")):
        path = formats.ngff(tmp_path / f"{number}.zarr", levels)
        (path / name).write_text(text)
        with pytest.raises(SlideError, match=rf"{number}\.zarr"):
            open_reader(path)


def test_more_planes_than_one_are_refused(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    path = formats.ngff(tmp_path / "deep.zarr", levels[:1], "zyxc")
    change(path, "shape", [5, 147, 211, 3])
    with pytest.raises(SlideError, match=r"deep\.zarr.*5 planes along z"):
        open_reader(path)


def test_a_collection_names_its_image(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    root = tmp_path / "many.zarr"
    formats.ngff(root / "0", levels)
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    (root / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    with pytest.raises(SlideError, match=r"many\.zarr.*name an image in it, such as .*many\.zarr/0"):
        open_reader(root)
    assert open_reader(root / "0").sizes[0] == (211, 147)


@pytest.mark.parametrize("codec", ["zlib", "blosc"])  # of blosc, the decoder does not know where a chunk ends
def test_a_damaged_chunk_is_fenced_in(tmp_path: Path, formats: Any, coding: Any, codec: str) -> None:
    pixels = coding.coded_pixels(512, 384)
    path = formats.ngff(tmp_path / "hurt.zarr", [pixels], chunk=128, compressor={"id": codec})
    chunk = path / "0" / "1" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[: 25_000 if codec == "blosc" else 500])
    reader = NgffSlide(path)
    with pytest.raises(SlideError, match=r"hurt\.zarr: cannot be decoded at level 0.*copy it again"):
        reader.read(0, 0, 0, 512, 384)
    got, seen = reader.read_seen(0, 0, 0, 512, 384)
    expected = np.ones((384, 512), np.bool_)
    expected[128:256, 256:384] = False
    assert seen is not None and not seen[~expected].any() and seen.mean() > 0.8
    assert np.array_equal(got[seen], pixels[seen]) and (got[~seen] == 255).all()


def test_an_absent_chunk_has_the_fill_value(tmp_path: Path, formats: Any, levels: list[np.ndarray]) -> None:
    path = formats.ngff(tmp_path / "a.zarr", levels[:1])
    (path / "0" / "0" / "1" / "0").unlink()
    change(path, "fill_value", 255)
    assert (NgffSlide(path).read(0, 64, 0, 64, 64) == 255).all()


def test_a_chunk_that_was_lost_is_told_and_one_left_out_is_not(
    tmp_path: Path, formats: Any, levels: list[np.ndarray]
) -> None:
    blank = [level.copy() for level in levels[:2]]
    for number, level in enumerate(blank):
        level[: 64 >> number, 64 >> number : 128 >> number] = 0
    for name, shown in (("lost", levels), ("blank", blank)):
        path = formats.ngff(tmp_path / f"{name}.zarr", shown[:2])
        (path / "0" / "0" / "1" / "0").unlink()
        pixels, seen = NgffSlide(path).read_seen(0, 64, 0, 64, 64)
        assert (seen is not None and not seen.any()) == (name == "lost")
        assert (pixels == (255 if name == "lost" else 0)).all()
