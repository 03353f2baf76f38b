"""Patch folders: real PatchCamelyon patches to the bit, bad tables and files, and splits that keep groups whole."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medsd.cohort.patches import PatchDataset, PatchTable, check_scale, read_patch, read_patch_table, split_groups
from medsd.errors import ConfigError, DatasetError
from medsd.explain.images import read_image


@pytest.fixture(scope="session")
def pcam(shared_data: Path) -> PatchTable:
    return read_patch_table(shared_data / "pcam_patches", "stain_cluster")


def patch(seed: int, width: int = 12, height: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four patches in two formats and folders."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number, name in enumerate(["images/a.png", "images/b.png", "images/deep/c.webp", "d.tif"]):
        Image.fromarray(patch(number)).save(tmp_path / name, lossless=True)
    (tmp_path / "labels.csv").write_text("id,label,slide\na,0,s1\nb,1,s1\nc,1,s2\nd,0,s3\n")
    return tmp_path


def test_real_patches_are_decoded_to_the_bit(pcam: PatchTable) -> None:
    data = PatchDataset(pcam)
    assert len(data) == 1600 and int(data.labels.sum()) == 800
    for item, path in enumerate(pcam.paths):
        image = data[item]["image"]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert hashlib.sha1(image.permute(1, 2, 0).numpy().tobytes()).hexdigest() == path.stem


def test_a_table_is_read_as_it_stands(folder: Path) -> None:
    table = read_patch_table(str(folder), "slide")
    assert [path.name for path in table.paths] == ["a.png", "b.png", "c.webp", "d.tif"]
    assert table.label.tolist() == [0, 1, 1, 0] and table.label.dtype == np.int8
    assert table.group.tolist() == ["s1", "s1", "s2", "s3"]
    chosen = table.rows(np.array([True, False, False, True]))
    assert [p.name for p in chosen.paths] == ["a.png", "d.tif"] and chosen.group.tolist() == ["s1", "s3"]


def test_classes_by_name_and_tables_that_name_files(folder: Path) -> None:
    (folder / "labels.csv").rename(folder / "index.csv")
    text = "file,label,patient\nimages/a.png,grade 1,p\nimages/b.png,2,q\nimages/deep/c.webp,polyp,q\nd.tif,none,q\n"
    (folder / "index.csv").write_text(text)
    classes = ("none", "grade 1", "grade 2")
    table = read_patch_table(folder, "patient", classes, left_out=["polyp"])
    assert [path.name for path in table.paths] == ["a.png", "b.png", "d.tif"]
    assert table.label.tolist() == [1, 2, 0] and table.group.tolist() == ["p", "q", "q"]
    with pytest.raises(DatasetError, match=r"index\.csv: row 4: label 'polyp' unknown; use 0 or 1 or 2, or a class"):
        read_patch_table(folder, "patient", classes)
    (folder / "index.csv").write_text(text.replace("images/b", "b"))
    with pytest.raises(DatasetError, match=r"row 3: no patch named 'b\.png' below"):
        read_patch_table(folder, "patient", classes, ["polyp"])


def test_names_written_otherwise_are_told_as_the_folder_has_them(folder: Path) -> None:
    for name, meant in (("a.png", "a"), ("images\\a.png", "a"), (f"{folder}/d.tif", "d")):
        (folder / "labels.csv").write_text(f"id,label,slide\n{name},0,s\n")
        with pytest.raises(DatasetError, match=rf"row 2: no patch named .*; did you mean '{meant}'\?"):
            read_patch_table(folder, "slide")
    (folder / "labels.csv").rename(folder / "index.csv")
    for name in ("images\\a.png", "./images/a.png", f"{folder}/images/a.png", "images/deep/../a.png"):
        (folder / "index.csv").write_text(f"file,label,slide\n{name},0,s\n")
        with pytest.raises(DatasetError, match=r"did you mean 'images/a\.png'\?"):
            read_patch_table(folder, "slide")


def test_parts_that_are_not_read_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_patch_table(folder, "slide")
    assert not caplog.text
    (folder / "labels.csv").write_text("id,label,slide,part\na,0,s1,train\n")
    read_patch_table(folder, "slide")
    assert "labels.csv: the column 'part' is not read" in caplog.text


def test_patches_of_no_known_group_are_groups_of_their_own(folder: Path) -> None:
    assert read_patch_table(folder, None).group.tolist() == ["a", "b", "c", "d"]
    (folder / "labels.csv").unlink()
    (folder / "index.csv").write_text("file,label\nimages/a.png,0\nd.tif,1\n")
    assert read_patch_table(folder, None).group.tolist() == ["images/a.png", "d.tif"]
    with pytest.raises(DatasetError, match="nowhere: no such folder; set more_dirs to one with"):
        read_patch_table(folder / "nowhere", None, key="more_dirs")


def test_shrunk_patches_are_means_of_squares(folder: Path) -> None:
    data = PatchDataset(read_patch_table(folder, "slide"), side_px=4, scale=0.5)
    means = patch(0).reshape(5, 2, 6, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)[:, :4, 1:5]
    np.testing.assert_allclose(data[0]["image"].numpy(), means, atol=0.5)
    with pytest.raises(DatasetError, match=r"6 x 5 px \(scale=0.5\) is smaller than tile_px=6"):
        PatchDataset(data.table, side_px=6, scale=0.5)[0]
    assert data.fingerprint() != PatchDataset(data.table, side_px=4).fingerprint()


def test_enlarged_patches_are_interpolated_between_pixels(folder: Path) -> None:
    table = read_patch_table(folder, "slide")
    whole = torch.from_numpy(table.pixels(0)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(whole, scale_factor=2, mode="bilinear")[0]
    torch.testing.assert_close(PatchDataset(table, scale=2)[0]["image"].float(), expected, atol=1, rtol=0)


@pytest.mark.parametrize("scale", [0, 1.5, 0.4, 17, float("nan"), "2"])
def test_scales_are_whole_numbers_or_one_over_them(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale"):
        check_scale(scale)


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_stratified_split_gives_every_side_its_share_of_a_rare_class(seed: int) -> None:
    labels = [0] * 8 + [1] * 60
    table = table_of([f"g{row // 2}" for row in range(68)], labels)
    training, validation, test = split_groups(table, (0.25, 0.25), seed, stratified=True)
    assert [int((table.label[side] == 0).sum()) for side in (training, validation, test)] == [4, 2, 2]
    assert [int(side.sum()) for side in (validation, test)] == [16, 16]
    assert (training.astype(int) + validation + test == 1).all()


def test_samples(folder: Path) -> None:
    data = PatchDataset(read_patch_table(folder, "slide"))
    assert len(data) == 4 and data.groups.tolist() == ["s1", "s1", "s2", "s3"]
    for item in range(4):
        sample = data[item]
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), patch(item)) and sample["image"].is_contiguous()
        assert sample["label"].dtype == torch.int64 and int(sample["label"]) == data.labels[item]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[2]["image"], data[2]["image"])


@pytest.mark.parametrize(("side", "top", "left"), [(10, 0, 1), (8, 1, 2), (7, 1, 2), (1, 4, 5)])
def test_patches_are_cropped_around_their_centre(folder: Path, side: int, top: int, left: int) -> None:
    image = PatchDataset(read_patch_table(folder, "slide"), side_px=side)[1]["image"]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), patch(1)[top : top + side, left : left + side])
    assert image.is_contiguous()


def test_patches_too_small_to_crop_are_named(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.png: 12 x 10 px is smaller than tile_px=11"):
        PatchDataset(read_patch_table(folder, "slide"), side_px=11)[0]


def test_a_patch_is_read_as_it_is_explained(tmp_path: Path) -> None:
    """Upright, transparency on white, and nothing of more than 8 bits a colour."""
    pixels, path = patch(0, width=12, height=10), tmp_path / "a.png"
    glass = np.dstack([pixels, np.full((10, 12), 255, np.uint8)])
    glass[:3, :3, 3] = 0
    palette = Image.fromarray(pixels).quantize(8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(glass).save(path)
    assert (read_patch(path)[:3, :3] == 255).all()
    for image, options in (
        (Image.fromarray(glass), {}),
        (palette, {"transparency": 0}),
        (Image.fromarray(pixels), {"exif": turned}),
    ):
        image.save(path, **options)
        np.testing.assert_array_equal(read_patch(path), read_image(path))
    assert read_patch(path).shape == (12, 10, 3)
    for deep in (
        np.full((4, 4), 60_000, np.uint16),
        np.ones((4, 4), np.float32),
        np.full((4, 4, 3), 60_000, np.uint16),  # of which Pillow drops the lower half
    ):
        tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb" if deep.ndim == 3 else "minisblack")
        with pytest.raises(DatasetError, match=r"deep\.tif: not 8 bits a colour"):
            read_patch(tmp_path / "deep.tif")
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((2, 4, 4, 3), np.uint8), photometric="rgb")
    with pytest.raises(DatasetError, match=r"deep\.tif: has several pages"):
        read_patch(tmp_path / "deep.tif")


def test_grey_palette_and_alpha_become_rgb(folder: Path) -> None:
    picture = Image.fromarray(patch(0))
    for mode in ("L", "P", "RGBA", "1"):
        picture.convert(mode).save(folder / "images/a.png")
        assert PatchDataset(read_patch_table(folder, "slide"))[0]["image"].shape == (3, 10, 12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,label\na,0\n", r"labels\.csv: row 1: no column 'slide'"),
        ("id,lable,slide\na,0,s\n", r"row 1: no column 'label'; did you mean 'lable'\?"),
        ("", r"row 1: no column 'id'"),
        ("id,label,slide\n", r"labels\.csv: no rows"),
        (
            "id,label,slide\na,0,s\nb,tumor,s\n",
            r"row 3: label 'tumor' unknown; use 0 or 1, or a class \(normal, tumour\)",
        ),
        ("id,label,slide\na\n", r"row 2: 1 cells where the first row has 3"),
        ("id,label,slide\na,,s\n", r"row 2: label '' unknown"),
        ("id,label,slide\na,1,\n", r"row 2: slide is empty"),
        ("id,label,slide\nzz,0,s\n", r"row 2: no patch named 'zz' below"),
        ("id,label,slide\na,0,s\nb,0,s\na,1,t\n", r"row 4: 'a' is also in row 2"),
    ],
)
def test_bad_tables_are_named(folder: Path, text: str, words: str) -> None:
    (folder / "labels.csv").write_text(text)
    with pytest.raises(DatasetError, match=words) as caught:
        read_patch_table(folder, "slide")
    assert str(folder / "labels.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_other_encodings(folder: Path) -> None:
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text, encoding="utf-8-sig")
    assert len(read_patch_table(folder, "slide").paths) == 4
    (folder / "labels.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(DatasetError, match=r"labels\.csv: row 1: not UTF-8"):
        read_patch_table(folder, "slide")


def test_missing_folders_tables_and_doubled_files(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent: no such folder; set dataset_dir"):
        read_patch_table(folder / "absent", "slide")
    with pytest.raises(DatasetError, match=r"labels\.csv: missing; it must have the columns id, label, slide"):
        read_patch_table(folder / "images", "slide")
    (folder / "._a.png").touch()  # a copying tool's litter is no second 'a'
    assert len(read_patch_table(folder, "slide").paths) == 4
    Image.fromarray(patch(9)).save(folder / "a.png")
    with pytest.raises(DatasetError, match=r"row 2: 'a' is both .*a\.png and .*a\.png; delete one"):
        read_patch_table(folder, "slide")


def test_a_patch_that_vanishes_is_named(folder: Path) -> None:
    data = PatchDataset(read_patch_table(folder, "slide"))
    (folder / "images/a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png: cannot be read as an image"):
        data[0]


def test_other_formats_and_sizes_are_no_patches(folder: Path) -> None:
    data = PatchDataset(read_patch_table(folder, "slide"))
    Image.new("RGB", (8, 8)).save(folder / "images/a.png", "PPM")
    with pytest.raises(DatasetError, match=r"a\.png: cannot be read as an image"):
        data[0]
    Image.new("1", (8192, 2049)).save(folder / "images/a.png")
    with pytest.raises(DatasetError, match=r"a\.png: 8192 x 2049 px, no patch"):
        data[0]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("item", range(4))
def test_damaged_images_are_the_error_or_pixels(folder: Path, item: int) -> None:
    data = PatchDataset(read_patch_table(folder, "slide"))
    path = data.table.paths[item]
    whole = path.read_bytes()
    generator = np.random.default_rng(item)
    cases = [whole[:length] for length in range(0, len(whole), 5)]
    for _ in range(150):
        hurt = bytearray(whole)
        for spot in generator.integers(0, len(whole), 4):
            hurt[spot] = int(generator.integers(0, 256))
        cases.append(bytes(hurt))
    failures = 0
    for case in cases:
        path.write_bytes(case)
        try:
            assert data[item]["image"].dtype == torch.uint8
        except DatasetError as error:
            failures += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert failures > 20


def table_of(groups: list[str], labels: list[int]) -> PatchTable:
    return PatchTable(tuple(Path(f"{i}.png") for i in range(len(groups))), np.array(labels, np.int8), np.array(groups))


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=60),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    seed=st.integers(0, 1000),
)
def test_groups_stay_whole_or_the_split_is_refused(
    rows: list[tuple[int, int]], shares: tuple[float, float], seed: int
) -> None:
    # Most groups get both classes, or hardly a split would succeed.
    pairs = [pair for group, label in rows for pair in ((group, label), (group, 0 if group < 2 else 1 - label))]
    table = table_of([f"g{group}" for group, _ in pairs], [label for _, label in pairs])
    try:
        sides = split_groups(table, shares, seed)
    except DatasetError as error:
        assert "labels.csv" in str(error)
        return
    assert (np.sum(sides, axis=0) == 1).all()
    for one, other in itertools.combinations(sides, 2):
        assert not set(table.group[one]) & set(table.group[other])
    for side in sides:
        assert set(table.label[side]) == {0, 1}
    again = split_groups(table, shares, seed)
    assert all(np.array_equal(one, other) for one, other in zip(sides, again, strict=True))


def test_real_clusters_are_dealt_by_share(pcam: PatchTable) -> None:
    largest = max(np.unique(pcam.group, return_counts=True)[1]) / len(pcam.group)
    for seed in range(10):
        training, validation, test = split_groups(pcam, (0.15, 0.25), seed)
        assert sum(len(np.unique(pcam.group[side])) for side in (training, validation, test)) == 15
        assert 0.15 <= validation.mean() < 0.15 + largest and 0.25 <= test.mean() < 0.25 + largest
        assert training.mean() > 0.4
        for side in (training, validation, test):
            assert 0.2 < pcam.label[side].mean() < 0.8
    assert not np.array_equal(split_groups(pcam, (0.15, 0.25), 0)[2], split_groups(pcam, (0.15, 0.25), 1)[2])


def test_what_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match=r"2 group\(s\); at least 3 are needed"):
        split_groups(table_of(["a", "b"] * 4, [0, 1] * 4), (0.2, 0.2), 0)
    with pytest.raises(DatasetError, match=r"^data: slide: class tumour is in 1 group\(s\); at least 3 are needed"):
        split_groups(table_of(list("abcd"), [0, 0, 0, 1]), (0.3, 0.3), 0, source="data: slide")
    lopsided = table_of(list("aabcdef"), [0, 1, 0, 0, 1, 1, 0])
    with pytest.raises(DatasetError, match=r"side lacks (normal|tumour); change the seed or the shares"):
        for seed in range(20):
            split_groups(lopsided, (0.1, 0.1), seed)


def test_other_pixels_under_the_same_names_are_other_patches(folder: Path) -> None:
    before = PatchDataset(read_patch_table(str(folder), "slide")).fingerprint()
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(folder / "images" / "a.png")
    table = read_patch_table(str(folder), "slide")
    assert PatchDataset(table).fingerprint() != before
    (folder / "images" / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png: No such file or directory; put the patch back"):
        PatchDataset(table).fingerprint()


def test_classes_that_are_called_by_numbers_go_by_name(folder: Path) -> None:
    (folder / "labels.csv").write_text("id,label,slide\na,0,s1\nb,3,s1\nc,4,s2\nd,0,s3\n")
    assert read_patch_table(str(folder), "slide", ("0", "3", "4")).label.tolist() == [0, 1, 2, 0]
    assert read_patch_table(str(folder), "slide", ("4", "3", "0")).label.tolist() == [2, 1, 0, 2]
    with pytest.raises(DatasetError, match=r"label '4' unknown; use 0 or 3, or a class"):
        read_patch_table(str(folder), "slide", ("0", "3", "five"))
