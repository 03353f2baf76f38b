"""Data folders in CAMELYON16's layout, and what is said when something is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.slides.camelyon import SlideEntry, _read_reference, check_names, find_slides, split_validation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete layout of empty files."""
    for name in (
        "training/normal/normal_001.tif",
        "training/normal/normal_002.tif",
        "training/tumor/tumor_001.tif",
        "training/tumor/tumor_002.tif",
        "training/lesion_annotations/tumor_001.xml",
        "training/lesion_annotations/tumor_002.xml",
        "testing/images/test_001.tif",
        "testing/images/test_002.tif",
        "testing/lesion_annotations/test_001.xml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "testing/reference.csv").write_text("test_001,Tumor\ntest_002,Normal\n")
    return tmp_path


def test_phantom_folders_are_found(phantoms: Path) -> None:
    slides = find_slides(phantoms)
    assert [slide.part for slide in slides] == ["training"] * 4 + ["testing"] * 2
    assert [slide.label for slide in slides[:4]] == [0, 0, 1, 1] and sorted(s.label for s in slides[4:]) == [0, 1]
    for slide in slides:
        assert slide.path.is_file() and slide.name == slide.path.stem
        assert (slide.annotation is not None) == (slide.label == 1)
        assert slide.annotation is None or slide.annotation.stem == slide.name


def test_the_whole_layout(folder: Path) -> None:
    slides = find_slides(str(folder))
    assert [(s.name, s.label, s.part) for s in slides] == [
        ("normal_001", 0, "training"),
        ("normal_002", 0, "training"),
        ("tumor_001", 1, "training"),
        ("tumor_002", 1, "training"),
        ("test_001", 1, "testing"),
        ("test_002", 0, "testing"),
    ]
    assert slides[2].annotation == folder / "training/lesion_annotations/tumor_001.xml"
    assert slides[4].annotation == folder / "testing/lesion_annotations/test_001.xml"
    assert slides[0].annotation is None and slides[5].annotation is None


def test_a_tumour_slide_for_testing_may_lack_its_annotation(folder: Path) -> None:
    (folder / "testing/lesion_annotations/test_001.xml").unlink()
    assert find_slides(folder)[4] == SlideEntry("test_001", folder / "testing/images/test_001.tif", 1, "testing", None)


def test_hidden_files_are_not_slides(folder: Path) -> None:
    for name in ("training/normal/._normal_001.tif", "testing/images/.77-test_001.tif", "testing/images/notes.txt"):
        (folder / name).touch()
    assert len(find_slides(folder)) == 6


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("training/normal", r"training/normal: no \*\.tif slides; dataset_dir must be laid out like CAMELYON16"),
        ("training/tumor", r"training/tumor: no \*\.tif slides"),
        ("testing/images", r"testing/images: no \*\.tif slides"),
        ("training/lesion_annotations", r"tumor_001\.xml: missing; a tumour slide for training needs its annotation"),
        ("testing/reference.csv", r"reference\.csv: missing; it must hold rows like 'test_001,tumor'"),
    ],
)
def test_missing_parts_are_named(folder: Path, gone: str, words: str) -> None:
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DatasetError, match=words) as caught:
        find_slides(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent: no such folder; set dataset_dir"):
        find_slides(tmp_path / "absent")


def test_two_slides_of_one_name_are_refused(folder: Path) -> None:
    (folder / "training/normal/tumor_001.tif").touch()
    with pytest.raises(DatasetError, match=r"tumor/tumor_001\.tif: a slide of this name is also at .*normal/tumor_001"):
        find_slides(folder)


def test_names_that_differ_by_case_alone_are_one_file_elsewhere() -> None:
    one, other = (SlideEntry(name, Path(f"{name}.tif"), None, "", None) for name in ("Case", "case"))
    check_names([one])
    for slides in ([one, other], [one, one]):
        with pytest.raises(DatasetError, match=r"ase\.tif: a slide of this name is also at Case\.tif; rename one"):
            check_names(slides)


@pytest.mark.parametrize(
    "text",
    [
        "test_001,Tumor\ntest_002,Normal\n",
        "slide,label\ntest_001,tumor\ntest_002,normal\n",
        "\ufefftest_001,tumor\ntest_002,normal\n",
        "image,label,type,size\r\ntest_001,Tumor,IDC,Macro\r\n\r\ntest_002,Normal,None,None\r\n",
        "\ufefffile name, Label\ntest_001.tif , tumour\n test_002.tif,NORMAL\n , \n",
    ],
)
def test_reference_tables_of_several_tastes(folder: Path, text: str) -> None:
    (folder / "testing/reference.csv").write_text(text, encoding="utf-8")
    assert [slide.label for slide in find_slides(folder)[4:]] == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test_001,tumor\n", r"reference\.csv: no row for slide 'test_002'; add it"),
        ("test_001,tumor\ntest_002,maybe\n", r"reference\.csv: row 2: label 'maybe' unknown; use 'normal' or 'tumor'"),
        ("test_001,tumor\ntest_002\n", r"reference\.csv: row 2: label '' unknown"),
        ("test_001,tumor\ntest_001,normal\n", r"row 2: 'test_001' has another label further up"),
        ("", r"no row for slide 'test_001'"),
    ],
)
def test_bad_reference_rows_are_named(folder: Path, text: str, words: str) -> None:
    (folder / "testing/reference.csv").write_text(text)
    with pytest.raises(DatasetError, match=words):
        find_slides(folder)


@pytest.mark.parametrize("data", [b"test_001,\xff\xfe\n", "slide,label\n".encode("utf-16")])
def test_a_reference_in_another_encoding_is_the_error(folder: Path, data: bytes) -> None:
    (folder / "testing/reference.csv").write_bytes(data)
    with pytest.raises(DatasetError, match=r"reference\.csv: "):
        find_slides(folder)


def test_names_with_dots_keep_them(folder: Path) -> None:
    (folder / "testing/images/test_002.tif").rename(folder / "testing/images/case.1.tif")
    (folder / "testing/reference.csv").write_text("test_001,tumor\ncase.1,normal\n")
    assert {slide.name for slide in find_slides(folder)} >= {"case.1", "test_001"}


def test_the_real_test_labels_are_read(shared_data: Path) -> None:
    labels = _read_reference(shared_data / "camelyon16_metadata" / "test_slide_labels.csv")
    assert len(labels) == 128 and set(labels.values()) == {0, 1} and labels["test_001"] == 1


def entries(normal: int, tumour: int) -> list[SlideEntry]:
    slides = [SlideEntry(f"normal_{i:03}", Path("n"), 0, "training", None) for i in range(normal)]
    slides += [SlideEntry(f"tumor_{i:03}", Path("t"), 1, "training", None) for i in range(tumour)]
    return [*slides, SlideEntry("test_001", Path("x"), 1, "testing", None)]


@given(normal=st.integers(2, 40), tumour=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_both_sides_hold_both_classes_and_nothing_is_lost(normal: int, tumour: int, share: float, seed: int) -> None:
    slides = entries(normal, tumour)
    training, validation = split_validation(slides, share, seed)
    names = [slide.name for slide in slides if slide.part == "training"]
    assert sorted(training + validation) == sorted(names)
    for word, count in (("normal", normal), ("tumor", tumour)):
        held_out = sum(name.startswith(word) for name in validation)
        assert 1 <= held_out <= count - 1
        assert abs(held_out - share * count) <= 1
    assert split_validation(list(reversed(slides)), share, seed) == (training, validation)


def test_the_seed_chooses() -> None:
    assert len({tuple(split_validation(entries(20, 20), 0.25, seed)[1]) for seed in range(5)}) == 5


@pytest.mark.parametrize(("normal", "tumour", "word"), [(1, 5, "normal"), (5, 0, "tumor")])
def test_too_few_slides_to_split(normal: int, tumour: int, word: str) -> None:
    with pytest.raises(DatasetError, match=rf"training/{word}: [01] slide\(s\); at least 2 are needed"):
        split_validation(entries(normal, tumour), 0.25, 0)
