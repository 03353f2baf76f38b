"""Pictures from disk: the pixels that other libraries read, or one line that names the file and the fix."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from medsd.errors import DatasetError, MedsdError, SlideError
from medsd.explain.images import find_images, image_names, read_image, read_png_mask

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def png_header(width: int, height: int, colour: int = 2, bits: int = 8) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "misnamed.jpg"])
def test_pixels_are_kept(tmp_path, name):
    path = tmp_path / name
    kind = {"misnamed.jpg": "PNG", "a.tif": "TIFF"}.get(name)
    Image.fromarray(PIXELS).save(path, format=kind, lossless=True)
    np.testing.assert_array_equal(read_image(path), PIXELS)


def test_a_jpeg_is_what_pillow_reads(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        # Two decoders may round apart.
        assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - np.asarray(image)).max() <= 2


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparency_is_on_white(tmp_path, suffix):
    rgba = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    rgba[:24, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / f"a{suffix}", lossless=True)
    read = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read[:24], PIXELS[:24])
    assert (read[24:] == 255).all()


def test_a_palette_is_its_colours(tmp_path):
    image = Image.fromarray(PIXELS).quantize(16)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_cmyk_is_near_its_colours(tmp_path):
    flat = np.full((32, 32, 3), (200, 100, 150), np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - flat).max() <= 3


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.png"
    match kind:
        case "missing":
            return path
        case "text":
            path.write_text("hello")
        case "empty":
            path.touch()
        case "truncated":
            Image.fromarray(PIXELS).save(path)
            path.write_bytes(path.read_bytes()[:-900])
        case "truncated_webp":
            Image.fromarray(PIXELS).save(path, format="WEBP", lossless=True)
            path.write_bytes(path.read_bytes()[:-900])
        case "animated_webp":
            frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
            frames[0].save(path, format="WEBP", save_all=True, append_images=frames[1:])
        case "truncated_jpeg":
            Image.fromarray(PIXELS).save(path, format="JPEG", quality=95)
            path.write_bytes(path.read_bytes()[:-900])
        case "sixteen_bits":
            path.write_bytes(png_header(64, 64, bits=16))
        case "sixteen_bits_tiff":
            tifffile.imwrite(path, PIXELS.astype(np.uint16) * 257, photometric="rgb")
        case "bomb":
            path.write_bytes(png_header(60_000, 60_000))
        case "slide":
            path.write_bytes(png_header(5_000, 5_000))
        case "small":
            Image.fromarray(PIXELS[:16]).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("text", "not a picture of a known format (PNG, JPEG, WebP, TIFF); copy it again, or save it as PNG"),
        ("empty", "copy it again"),
        ("truncated", "copy it again"),
        ("truncated_webp", "copy it again"),
        ("animated_webp", "several pictures"),
        ("truncated_jpeg", "copy it again"),
        ("sixteen_bits", "8-bit"),
        ("sixteen_bits_tiff", "8-bit"),
        ("bomb", "too many"),
        ("slide", "medsd heatmap"),
        ("small", "from 32 px"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, kind, words):
    path = damaged(tmp_path, kind)
    with pytest.raises(MedsdError) as refused:
        read_image(path, smallest_px=32)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


def test_folders_are_searched_and_results_left_out(tmp_path):
    for name in ("b.png", "a.tif", "deep/c.JPG", ".hidden.png", "notes.txt", "out/sheet.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / "b.png", tmp_path / "none.png"], [tmp_path / "out"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.tif", "b.png", "deep/c.JPG", "none.png"]
    assert len(find_images([tmp_path / "out"], [tmp_path])) == 1  # results beside or above the images hide none
    with pytest.raises(DatasetError, match="holds the images, so no results or masks"):
        find_images([tmp_path / "out"], [tmp_path / "out"])
    with pytest.raises(DatasetError, match=r"no images; give files or folders of \.png"):
        find_images([])


def test_names_are_those_of_the_files_unless_shared():
    assert image_names([Path("a/x.png"), Path("b/x.png"), Path("b/y.png")]) == ["a/x.png", "b/x.png", "y.png"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_mask_is_what_is_not_zero(tmp_path, mode):
    inside = np.zeros((48, 64), bool)
    inside[10:20, 30:50] = True
    if mode == "I;16":
        image = Image.fromarray(inside.astype(np.uint16) * 256)  # its lower byte is 0
    elif mode == "P":
        image = Image.fromarray(inside.astype(np.uint8), "P")
        image.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is background, whatever its colour
    else:
        image = Image.fromarray(inside.astype(np.uint8)).point(lambda value: value * 255).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_png_mask(tmp_path / "m.png", 48, 64), inside)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "m.png"
    for image, words in (
        (Image.new("L", (64, 40)), "64 x 40 px, its image 64 x 48"),
        (Image.new("RGB", (64, 48)), "colour"),
    ):
        image.save(path)
        with pytest.raises(DatasetError, match=words):
            read_png_mask(path, 48, 64)
    path.write_bytes(path.read_bytes()[:-30])
    path.write_text("hello")
    with pytest.raises(DatasetError, match="cannot be read as a PNG mask"):
        read_png_mask(path, 48, 64)
    Image.new("L", (64, 48), 7).save(path)
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(DatasetError, match="cannot be read as a PNG mask"):
        read_png_mask(path, 48, 64)


def test_real_patches_are_their_names(shared_data):
    """The name of a patch is the SHA-1 of its pixels."""
    import hashlib

    for path in sorted((shared_data / "pcam_patches" / "images").iterdir())[:5]:
        assert hashlib.sha1(read_image(path).tobytes()).hexdigest() == path.stem


def test_files_beside_the_results_are_refused(tmp_path):
    """A sheet would be written over a picture of its name."""
    Image.fromarray(PIXELS).save(tmp_path / "sheet.png")
    with pytest.raises(DatasetError, match="holds the images, so no results or masks; choose another folder"):
        find_images([tmp_path / "sheet.png"], [tmp_path])


def test_hidden_folders_are_passed_over(tmp_path):
    for folder in (".cache", "seen"):
        (tmp_path / folder).mkdir()
        Image.fromarray(PIXELS).save(tmp_path / folder / "a.png")
    assert find_images([tmp_path]) == [tmp_path / "seen" / "a.png"]


def test_names_that_are_no_utf8_are_written_as_escapes():
    assert image_names([Path("lat\udcfc.png"), Path("b.png")]) == ["lat\\udcfc.png", "b.png"]


def test_links_that_lead_to_themselves_and_pipes_cost_only_themselves(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert [path.name for path in find_images([tmp_path])] == ["a.png", "loop.png", "pipe.png"]
    for name, words in (("loop.png", "no such file"), ("pipe.png", "is a pipe or device, not a slide")):
        with pytest.raises(SlideError, match=rf"{name}: {words}"):
            read_image(tmp_path / name)
