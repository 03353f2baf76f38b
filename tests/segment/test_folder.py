"""Folders of images and masks: what is read, and every kind of bad input told with its file before a training."""

from __future__ import annotations

import logging
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsd.errors import ConfigError, DatasetError
from medsd.segment.folder import MaskedImages, check_masks, read_mask_table
from medsd.segment.items import deal_parts, fraction_of
from medsd.segment.masks import MaskCoding, read_mask

TWO = MaskCoding(("background", "gland"))


def write_pairs(
    folder: Path, values: tuple[int, ...] = (0, 1), rows: int = 6, header: str = "file,mask,patient"
) -> Path:
    """Images whose red channel is their mask times 50, of two a patient."""
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header]
    for number in range(rows):
        mask = draws.choice(np.array(values, np.uint8), (34, 40))
        Image.fromarray(np.stack([mask * 50 % 251, mask * 0, mask * 0], axis=2)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}m.png")
        lines.append(f"{number}.png,{number}m.png,p{number // 2}" + ",".join([""] * (header.count(",") - 1)))
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def items(folder: Path, coding: MaskCoding = TWO, side_px: int = 32, **given: Any) -> MaskedImages:
    return MaskedImages(read_mask_table(folder, **given), coding, side_px)


@pytest.mark.parametrize(
    ("values", "coding"),
    [
        ((0, 1), TWO),
        ((0, 255), TWO),
        ((0, 1, 2), MaskCoding(("background", "a", "b"))),
        ((7, 0, 3), MaskCoding(("background", "a", "b"), values=(7, 0, 3))),
        ((0, 1, 2, 200), MaskCoding(("background", "nucleus"), "instances")),
    ],
)
def test_pairs_are_cropped_alike_and_values_become_classes(
    tmp_path: Path, values: tuple[int, ...], coding: MaskCoding
) -> None:
    found = items(write_pairs(tmp_path, values), coding)
    sample = found[3]
    number_of = {value: (value != 0 if coding.kind == "instances" else place) for place, value in enumerate(values)}
    for value, number in number_of.items():
        assert (sample["label"][0][sample["image"][0] == value * 50 % 256 % 251] == number).all(), value
    assert sample["image"].shape == (3, 32, 32) and len(np.unique(sample["label"])) == len(coding.classes)
    counts = check_masks(found, "training")
    assert counts.sum() == 6 * 32 * 32 and (counts > 0).all()
    assert found.groups.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"] and len(set(found.units)) == 6


TURNED = Image.Exif()
TURNED[274] = 3


def save(path: Path, mode: str, **how: Any) -> None:
    mask = Image.fromarray(np.random.default_rng(1).integers(0, 2, (34, 40), dtype=np.uint8))
    mask.convert(mode).save(path, **how)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: Image.new("L", (40, 30)).save(f / "2m.png"), r"2m\.png: 40 x 30 px, its image 40 x 34"),
        (lambda f: Image.new("L", (40, 34), 2).save(f / "2m.png"), r"2m\.png: value 2 is no class \(0 background, 1 g"),
        (lambda f: Image.new("L", (40, 34), 255).save(f / "2m.png"), None),
        (lambda f: save(f / "2m.png", "P"), r"2m\.png: a mask with a palette"),
        (lambda f: save(f / "2m.png", "RGB"), r"2m\.png: a mask in colour \(RGB\)"),
        (lambda f: save(f / "2m.png", "L", format="JPEG"), r"2m\.png: a mask as JPEG, whose values blur"),
        (lambda f: save(f / "2m.png", "L", format="TIFF", save_all=True, append_images=[Image.new("L", (40, 34))]),
         r"2m\.png: has several pages; save the one that is the mask"),
        (lambda f: save(f / "2.png", "RGB", exif=TURNED), r"2m\.png: a mask of Orientation 1, its image of 3"),
        (lambda f: (f / "2m.png").write_bytes(b"no picture"), r"2m\.png: cannot be read as a mask"),
        (lambda f: (f / "2.png").write_bytes((f / "2.png").read_bytes()[:60]), r"2\.png: cannot be read as an image"),
        (lambda f: Image.new("RGB", (20, 34)).save(f / "2.png") or Image.new("L", (20, 34)).save(f / "2m.png"),
         r"2\.png: 20 x 34 px is smaller than side_px=32; lower it"),
    ],
)  # fmt: skip
def test_a_bad_mask_stops_before_the_training(tmp_path: Path, spoil: Any, words: str | None) -> None:
    found = items(write_pairs(tmp_path))
    spoil(tmp_path)
    if words is None:
        check_masks(found, "training")
        return
    with pytest.raises(DatasetError, match=words) as told:
        check_masks(found, "training")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("gone.png,0m.png,p9", r"row 8: no file .*gone\.png in the folder \(column 'file'\)"),
        ("extra.png,gone.png,p9", r"row 8: no file .*gone\.png in the folder \(column 'mask'\)"),
        ("extra.png,../outside.png,p9", r"row 8: no file"),
        ("0.png,extra.png,p9", r"row 8: 0\.png is also in row 2; keep one"),
        ("extra.png,extra2.png,", r"row 8: patient is empty"),
        ("extra.png,,p9", r"index\.csv: row 8: the column 'mask' is empty; name a file"),
        (",extra.png,p9", r"index\.csv: row 8: the column 'file' is empty; name a file"),
        ("extra.png,extra.png,p9", r"index\.csv: row 8: extra\.png is its own mask; name another in column 'mask'"),
    ],
)
def test_a_bad_row_is_told_with_its_column(tmp_path: Path, row: str, words: str) -> None:
    folder = write_pairs(tmp_path / "in")
    for path in (tmp_path / "outside.png", folder / "extra.png", folder / "extra2.png"):
        path.write_bytes(b"")
    with open(folder / "index.csv", "a") as table:
        table.write(row + "\n")
    with pytest.raises(DatasetError, match=words):
        read_mask_table(folder)


def test_images_are_called_by_their_places_in_the_folder(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "in" / "masks", rows=2)
    text = (folder / "index.csv").read_text().replace("\n0.png", f"\n{folder}/0.png").replace("\n1.png", "\n./1.png")
    (folder / "index.csv").write_text(text)
    found = items(folder)
    assert found.units.tolist() == ["0.png", "1.png"] and found.place(1) == str(folder / "1.png")
    for again in ("../masks/1.png", "deep/../1.png", f"{folder}/1.png"):
        (folder / "index.csv").write_text(f"{text}{again},extra.png,p9\n")
        with pytest.raises(DatasetError, match=r"row 4: 1\.png is also in row 3; keep one"):
            read_mask_table(folder)
    (folder / "index.csv").write_text(text + "deep\\2.png,extra.png,p9\n")
    with pytest.raises(DatasetError, match=r"row 4: no file .* \(column 'file'\); write folders with '/'"):
        read_mask_table(folder)


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_pairs(tmp_path)
    Image.new("RGB", (9, 9)).save(folder / "more.png")
    Image.new("L", (40, 34)).save(folder / "2m.png")
    with caplog.at_level(logging.INFO, "medsd.segment"):
        check_masks(items(folder), "training")
    text = caplog.text
    assert "1 pictures in the folder are in no row" in text
    assert "training: 1 of 6 masks are empty and are taken as background, the first: " in text and "2.png" in text
    for number in range(6):
        Image.new("L", (40, 34)).save(folder / f"{number}m.png")
    with pytest.raises(DatasetError, match="training: all 6 masks are empty"):
        check_masks(items(folder), "training")
    with pytest.raises(DatasetError, match=r"nowhere: no such folder; set dataset_dir"):
        read_mask_table(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no column 'slide'"):
        read_mask_table(folder, "slide")


def test_images_larger_than_the_square_are_told_with_the_share_that_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pairs(tmp_path, rows=4)
    for name in ("2.png", "3.png", "2m.png", "3m.png"):
        Image.new("RGB" if "m" not in name else "L", (32, 32)).save(folder / name)
    check_masks(items(folder), "training")
    assert "training: 2 of 4 images are larger than side_px=32, the first: " in caplog.text
    used = 100 * 32 * 32 / (34 * 40)
    assert f"0.png; only the square in their middle, {used:.1f} % of their pixels, is learnt from" in caplog.text
    caplog.clear()
    table = items(folder).table
    check_masks(MaskedImages(table.rows(table.patient == "p0"), TWO, 16), "testing")
    assert f"testing: 2 of 2 images are larger than side_px=16, the first: {folder / '0.png'}; only" in caplog.text
    for name in ("0.png", "1.png", "0m.png", "1m.png"):
        Image.new("RGB" if "m" not in name else "L", (32, 32), 1).save(folder / name)
    caplog.clear()
    check_masks(items(folder), "training")
    assert "larger than" not in caplog.text


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16])
def test_the_numbers_of_a_tiff_are_those_that_are_stored(tmp_path: Path, photometric: Any, kind: Any) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, (34, 40)).astype(kind)
    tifffile.imwrite(tmp_path / "m.tif", numbers, photometric=photometric)
    shown_negative = kind is bool and photometric == "miniswhite"  # a fax, not a negative
    assert np.array_equal(read_mask(tmp_path / "m.tif", TWO, 34, 40), ~numbers if shown_negative else numbers)


def test_white_is_the_class_in_a_fax(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, (34, 40), dtype=np.uint8)
    Image.fromarray(numbers.astype(bool)).save(tmp_path / "m.tif", compression="group4", tiffinfo={262: 0})
    assert np.array_equal(read_mask(tmp_path / "m.tif", TWO, 34, 40), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_numbers_of_a_png_of_few_bits_are_those_that_are_stored(tmp_path: Path, bits: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**bits, (34, 40), dtype=np.uint8)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([0] * 3 * 2**bits)
    palette.save(tmp_path / "m.png", bits=bits)
    data = (tmp_path / "m.png").read_bytes()
    head = b"IHDR" + data[16:25] + b"\0" + data[26:29]  # grey in the place of a palette
    start = data.index(b"IDAT") - 4
    (tmp_path / "m.png").write_bytes(data[:12] + head + zlib.crc32(head).to_bytes(4) + data[start:])
    classes = MaskCoding(tuple(f"class {number}" for number in range(2**bits)))
    assert np.array_equal(read_mask(tmp_path / "m.png", classes, 34, 40), numbers)


def test_an_image_and_its_mask_are_turned_alike(tmp_path: Path) -> None:
    found = items(write_pairs(tmp_path))
    for name in ("2.png", "2m.png"):
        with Image.open(tmp_path / name) as image:
            image.copy().save(tmp_path / name, exif=TURNED)
    pixels, mask = found.whole(2)
    assert np.array_equal(pixels[..., 0], mask * 50)


def test_instances_of_sixteen_bits_and_wrong_codings(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 300], [65535, 0]], np.uint16)).save(path)
    assert read_mask(path, MaskCoding(("b", "n"), "instances"), 2, 2).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(DatasetError, match="value 300 is no class"):
        read_mask(path, TWO, 2, 2)
    for options, words in (
        ({"kind": "instances", "classes": ("a", "b", "c")}, "mask_kind='instances'"),
        ({"values": (0, 0)}, "mask_values"),
        ({"values": (0, 1, 2)}, "mask_values"),
        ({"kind": "instance"}, "did you mean 'instances'"),
        ({"classes": ("a",)}, "name two or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            MaskCoding(**{"classes": ("a", "b"), **options})  # type: ignore[arg-type]


@given(sizes=st.lists(st.integers(1, 6), min_size=4, max_size=20), seed=st.integers(0, 5))
def test_patients_are_whole(sizes: list[int], seed: int) -> None:
    patients = np.repeat([f"p{number}" for number in range(len(sizes))], sizes)
    parts = deal_parts(patients, np.full(len(patients), ""), (0.2, 0.3), seed)
    sides = {part: set(patients[parts == part]) for part in ("training", "validation", "testing")}
    assert all(sides.values()) and sum(map(len, sides.values())) == len(sizes)
    # Within a patient of the share, and never none.
    tested, rest = parts == "testing", parts != "testing"
    largest = max(sizes)
    assert abs(tested.sum() - 0.3 * len(parts)) <= largest or len(sides["testing"]) == 1
    assert abs((parts == "validation").sum() - 0.2 * rest.sum()) <= largest or len(sides["validation"]) == 1


def test_parts_are_nearest_to_their_shares_and_validation_is_of_what_is_not_tested_on() -> None:
    patients = np.repeat([f"p{number}" for number in range(20)], 5)
    given = np.where(np.arange(100) < 40, "testing", "")
    parts = deal_parts(patients, given, (0.3, 0.5), seed=0)
    assert [(parts == part).sum() for part in ("testing", "validation", "training")] == [40, 20, 40]  # 18 of 60 wanted
    parts = deal_parts(patients, np.full(100, ""), (0.25, 0.2), seed=0)
    assert [(parts == part).sum() for part in ("testing", "validation", "training")] == [20, 20, 60]


@given(sizes=st.lists(st.integers(1, 6), min_size=4, max_size=20), seed=st.integers(0, 5))
def test_fractions_nest(sizes: list[int], seed: int) -> None:
    patients = np.repeat([f"p{number}" for number in range(len(sizes))], sizes)
    taken = [fraction_of(patients, fraction, seed) for fraction in (0.01, 0.1, 0.5, 1.0)]
    for fewer, more in pairwise(taken):
        assert (more | ~fewer).all()
    assert taken[-1].all() and len(set(patients[taken[0]])) >= 1
    rare = np.where(np.isin(patients, ["p0", "p1"]), "outlined", "not")
    both = fraction_of(patients, 0.01, seed, rare)
    assert sorted(set(rare[both])) == ["not", "outlined"] and len(set(patients[both])) == 2
    for side, fraction in zip(taken, (0.01, 0.1, 0.5, 1.0), strict=True):
        assert side.mean() >= fraction - 1e-9
        assert set(patients[side]).isdisjoint(patients[~side])


def test_given_parts_are_kept_and_a_patient_on_two_sides_is_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, header="file,mask,patient,part")
    text = (folder / "index.csv").read_text().replace("p2,", "p2,test").replace("p1,", "p1,val")
    (folder / "index.csv").write_text(text)
    table = read_mask_table(folder)
    parts = deal_parts(table.patient, table.part, (0.2, 0.2), 0)
    assert parts.tolist() == ["training"] * 2 + ["validation"] * 2 + ["testing"] * 2
    (folder / "index.csv").write_text(text.replace("5.png,5m.png,p2,test", "5.png,5m.png,p2,train"))
    table = read_mask_table(folder)
    with pytest.raises(
        DatasetError, match=r"x\.csv: patient 'p2' is in testing and in training; give all of a patient's"
    ):
        deal_parts(table.patient, table.part, (0.2, 0.2), 0, source="x.csv")
    (folder / "index.csv").write_text(text.replace("p2,test", "p2,tset"))
    with pytest.raises(DatasetError, match="row 6: part 'tset' unknown"):
        read_mask_table(folder)
    with pytest.raises(ConfigError, match="label_fraction=0"):
        fraction_of(np.array(["a"]), 0, 0)


def test_what_is_given_to_training_is_never_tested_on(caplog: pytest.LogCaptureFixture) -> None:
    patients = np.array([f"p{number}" for number in range(8)])
    given = np.array(["training"] * 5 + ["", "", ""])
    parts = deal_parts(patients, given, (0.3, 0.4), seed=0, source="index.csv: column 'part'")
    assert (parts == "testing").sum() == 1 and not (parts[:5] == "testing").any()
    taken = int((parts[:5] == "validation").sum())
    assert (parts == "validation").sum() == 2 and taken
    told = f"index.csv: column 'part': nobody is given to validation; {taken} of the 5 patients given to training are"
    assert told in caplog.text
    caplog.clear()
    one_left = deal_parts(patients, np.array(["training"] * 7 + [""]), (0.3, 0.4), seed=0)
    assert (one_left == "testing").tolist() == [False] * 7 + [True]  # the others are enough to train on
    caplog.clear()
    assert (deal_parts(patients, np.full(8, ""), (0.3, 0.4), seed=0) == "testing").any() and not caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["", ""], "2 patients are too few for three parts, none is left for testing"),
        (["testing"] * 3, "3 of 3 patients are given to testing, none is left for training; give some to training"),
        (
            ["testing", "validation", "validation"],
            "3 of 3 patients are given to testing and validation, none .* training",
        ),
        (["testing", "testing", "training"], "2 of 3 patients are given to testing, none is left for validation; give"),
        (["training"] * 4, "4 of 4 patients are given to training, none is left for testing; give some to testing, or"),
        (["training"] * 3 + ["validation"], "3 of 4 patients are given to training, none is left for testing; give"),
    ],
)
def test_a_part_that_nobody_is_left_for_is_told_with_who_left_none(given: list[str], words: str) -> None:
    patients = np.array([f"p{number}" for number in range(len(given))])
    with pytest.raises(DatasetError, match=rf"^index\.csv: column 'part': {words}"):
        deal_parts(patients, np.array(given), (0.2, 0.2), 0, source="index.csv: column 'part'")
