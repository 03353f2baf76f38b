"""Plain pictures of every kind that PIL writes, and what is no picture that can be trusted."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile, ImageOps

from medsd.errors import MissingMppError, SlideError
from medsd.slides.readers import picture as picture_module
from medsd.slides.readers.picture import Picture
from medsd.slides.slide import open_slide

WIDTH, HEIGHT = 61, 43


@pytest.fixture(scope="module")
def colours(coding: Any) -> Image.Image:
    return Image.fromarray(coding.coded_pixels(WIDTH, HEIGHT))


def whole(path: Path) -> np.ndarray:
    reader = Picture(path)
    return reader.read(0, 0, 0, *reader.sizes[0])


KINDS = [
    ("1", "png"),
    ("L", "png"),
    ("P", "png"),
    ("RGB", "png"),
    ("1", "tif"),
    ("L", "tif"),
    ("P", "tif"),
    ("RGB", "tif"),
    ("CMYK", "tif"),
    ("L", "jpg"),
    ("RGB", "jpg"),
    ("CMYK", "jpg"),
]


@pytest.mark.parametrize(("mode", "suffix"), KINDS)
def test_pixels_are_those_that_pil_shows(tmp_path: Path, colours: Image.Image, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    colours.convert(mode).save(path)
    assert np.array_equal(whole(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"subsampling": 0}, {"optimize": True}])
def test_jpegs_of_every_coding(tmp_path: Path, colours: Image.Image, options: dict[str, Any]) -> None:
    colours.save(tmp_path / "a.jpg", **options)
    assert np.array_equal(whole(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_strips(tmp_path: Path, colours: Image.Image, compression: str | None) -> None:
    path = tmp_path / "a.tif"
    colours.save(path, compression=compression)
    assert np.array_equal(whole(path), np.asarray(Image.open(path).convert("RGB")))


def test_a_picture_of_several_bands(tmp_path: Path, coding: Any) -> None:
    pixels = coding.coded_pixels(30, 2 * 512 + 7)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    assert np.array_equal(whole(tmp_path / "tall.png"), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_on_white(tmp_path: Path, colours: Image.Image, mode: str) -> None:
    image = colours.convert(mode)
    alpha = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint8)
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    shown = np.asarray(colours.convert(mode).convert("RGB")).astype(float)
    part = alpha[..., None] / 255
    assert np.abs(whole(tmp_path / "a.png") - (shown * part + 255 * (1 - part))).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), 0 if mode != "RGB" else (1, 2, 3))
    image.save(tmp_path / "a.png", transparency=0 if mode != "RGB" else (1, 2, 3))
    assert (whole(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path: Path, colours: Image.Image, turn: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"turned.{suffix}"
    colours.save(path, exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert Picture(path).sizes == ((upright.shape[1], upright.shape[0]),)
    assert np.array_equal(whole(path), upright)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"])
def test_a_damaged_exif_block_turns_nothing(tmp_path: Path, colours: Image.Image, exif: bytes) -> None:
    colours.save(tmp_path / "a.jpg", exif=exif)
    assert Picture(tmp_path / "a.jpg").sizes == ((WIDTH, HEIGHT),)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_the_scale_is_the_callers(tmp_path: Path, colours: Image.Image, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    colours.save(path, dpi=(50_800, 50_800))  # would be 0.5 um
    with pytest.raises(MissingMppError, match=rf"picture\.{suffix}: scale unknown.*mpp="):
        open_slide(path)
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.reader, slide.mpp, slide.mpp_source) == ("pillow", 0.25, "given by the caller")
        assert slide.dimensions == (WIDTH, HEIGHT) and len(slide.levels) == 1
        assert slide.read(-1, -1, 3, 3).shape == (3, 3, 3)


def test_it_is_decoded_once_and_dropped(tmp_path: Path, colours: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    colours.save(tmp_path / "a.png")
    reader, decoded = Picture(tmp_path / "a.png"), []
    inner = reader._decode
    monkeypatch.setattr(reader, "_decode", lambda: decoded.append(1) or inner())
    for _ in range(3):
        reader.read(0, 0, 0, 5, 5)
    assert len(decoded) == 1
    reader.close()
    assert reader._pixels is None
    reader.read(0, 0, 0, 5, 5)
    assert len(decoded) == 2


def png_of_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(13_400, 13_400), (200_000, 1000), (2**31 - 1, 2**31 - 1)])
def test_too_large_is_refused_before_memory_is_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "huge.png").write_bytes(png_of_size(*size))
    tracemalloc.start()
    with pytest.raises(SlideError, match=r"huge\.png.*convert it to a tiled pyramidal TIFF"):
        Picture(tmp_path / "huge.png")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_what_pil_warns_of_is_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "large.tif", np.full((150, 100), 77, np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(tmp_path / "large.tif"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert (whole(tmp_path / "large.tif") == 77).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.7, 0.98])
def test_a_truncated_file_is_never_pixels(tmp_path: Path, coding: Any, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(coding.coded_pixels(200, 150)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SlideError, match=rf"cut\.{suffix}") as caught:
        whole(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("seed", range(8))
def test_changed_bytes_are_found(tmp_path: Path, coding: Any, suffix: str, seed: int) -> None:
    path = tmp_path / f"hurt.{suffix}"
    Image.fromarray(coding.coded_pixels(200, 150)).save(path)
    right, data = whole(path), bytearray(path.read_bytes())
    for spot in np.random.default_rng(seed).integers(700, len(data) - 20, 30):
        data[spot] ^= 0xFF
    path.write_bytes(data)
    if suffix == "png":  # checksums
        with pytest.raises(SlideError, match=r"hurt\.png"):
            whole(path)
        return
    try:
        pixels = whole(path)
    except SlideError as error:
        assert "hurt.jpg" in str(error)
    else:  # JPEG has none: codes that stay valid are other pixels, but not the grey of a decoder that gave up
        assert pixels.shape == right.shape and (pixels[-8:] != 128).any()


@pytest.mark.parametrize("spot", [0.3, 0.5, 0.9])
def test_one_changed_byte_of_a_stored_png_is_found(tmp_path: Path, coding: Any, spot: float) -> None:
    path = tmp_path / "hurt.png"
    Image.fromarray(coding.coded_pixels(200, 150)).save(path, compress_level=0)
    data = bytearray(path.read_bytes())
    data[int(len(data) * spot)] ^= 1  # another pixel, and nothing else but the checksum says so
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"hurt\.png"):
        whole(path)


def test_a_damaged_picture_is_tried_once(tmp_path: Path, colours: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut.png"
    colours.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    reader, tried = Picture(path), []
    inner = reader._decode
    monkeypatch.setattr(reader, "_decode", lambda: tried.append(1) or inner())
    for _ in range(3):
        pixels, seen = reader.read_seen(0, 1, 2, 5, 4)
        assert seen is not None and not seen.any() and (pixels == 255).all()
    assert len(tried) == 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_switch_that_hides_damage_is_seen(
    tmp_path: Path, colours: Image.Image, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    colours.save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(SlideError, match="LOAD_TRUNCATED_IMAGES"):
        whole(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(("dtype", "shape"), [("u2", (9, 8)), ("u2", (9, 8, 3)), ("f4", (9, 8)), ("i4", (9, 8))])
def test_more_than_8_bits_are_refused(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", np.ones(shape, dtype))
    with pytest.raises(SlideError, match=r"deep\.tif: not 8 bits a colour; save it as 8-bit RGB"):
        Picture(tmp_path / "deep.tif")


def test_16_bit_png_is_refused(tmp_path: Path) -> None:
    data = png_of_size(4, 4)
    header = data[12:29].replace(struct.pack(">BB", 8, 2), struct.pack(">BB", 16, 2))
    (tmp_path / "deep.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    assert Image.open(tmp_path / "deep.png").mode == "RGB"  # PIL drops the lower bits
    with pytest.raises(SlideError, match=r"deep\.png: not 8 bits a colour"):
        Picture(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_several_pages_are_refused(tmp_path: Path, colours: Image.Image, suffix: str) -> None:
    path = tmp_path / f"pages.{suffix}"
    colours.save(path, save_all=True, append_images=[ImageOps.flip(colours)])
    with pytest.raises(SlideError, match=rf"pages\.{suffix}: has several pages; save the one"):
        Picture(path)


def test_of_a_jpeg_with_more_pictures_the_first_is_read(tmp_path: Path, colours: Image.Image) -> None:
    path = tmp_path / "camera.jpg"
    colours.save(path, format="MPO", save_all=True, append_images=[ImageOps.flip(colours)])
    assert np.array_equal(whole(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("name", ["GIF", "BMP", "WEBP", "PPM", "ICO", "PSD"])
def test_other_formats_of_pil_never_see_the_bytes(tmp_path: Path, colours: Image.Image, name: str) -> None:
    path = tmp_path / "picture.png"  # the name does not help
    if name == "PSD":
        path.write_bytes(b"8BPS" + bytes(100))
    else:
        colours.save(path, format=name)
    assert not picture_module.is_picture(path.read_bytes())
    with pytest.raises(SlideError, match=r"picture\.png"):
        open_slide(path, mpp=0.5)


def test_a_file_that_became_another(tmp_path: Path, colours: Image.Image) -> None:
    path = tmp_path / "a.png"
    colours.save(path)
    reader = Picture(path)
    colours.resize((30, 20)).save(path)
    with pytest.raises(SlideError, match=r"a\.png"):
        reader.read(0, 0, 0, 5, 5)
