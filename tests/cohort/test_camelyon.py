"""Data folders in CAMELYON16's layout, and what is said when something is missing."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.cohort.camelyon import (
    PARTLY_ANNOTATED,
    WITHDRAWN,
    _read_reference,
    find_slides,
)
from medsd.cohort.entry import SlideEntry, check_names
from medsd.cohort.split import split_validation
from medsd.errors import DatasetError


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


BUCKET = (
    "images/normal_001.tif",
    "images/normal_002.tif",
    "images/tumor_001.tif",
    "images/tumor_002.tif",
    "images/test_001.tif",
    "images/test_002.tif",
    "annotations/tumor_001.xml",
    "annotations/tumor_002.xml",
    "annotations/test_001.xml",
    "masks/tumor_001_mask.tif",
    "README.md",
)
REFERENCE = "image,type,class,center\ntest_001.tif,test,micro,1\ntest_002.tif,test,negative,0\n"


@pytest.fixture
def bucket_folder(tmp_path: Path) -> Path:
    """The layout of the open bucket, of empty files."""
    for name in (*BUCKET, "evaluation/reference.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "evaluation/reference.csv").write_text(REFERENCE)
    return tmp_path


def test_the_layout_of_the_bucket(bucket_folder: Path) -> None:
    slides = find_slides(bucket_folder)
    assert [(s.name, s.label, s.part) for s in slides] == [
        ("normal_001", 0, "training"),
        ("normal_002", 0, "training"),
        ("tumor_001", 1, "training"),
        ("tumor_002", 1, "training"),
        ("test_001", 1, "testing"),
        ("test_002", 0, "testing"),
    ]
    annotations = [None if slide.annotation is None else slide.annotation.name for slide in slides]
    assert annotations == [None, None, "tumor_001.xml", "tumor_002.xml", "test_001.xml", None]
    assert all(slide.exhaustive for slide in slides)
    (bucket_folder / "evaluation/reference.csv").rename(bucket_folder / "reference.csv")
    assert find_slides(bucket_folder) == slides


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("images/test_001.tif images/test_002.tif", r"images: no test_\*\.tif slides; fetch some"),
        ("images/tumor_001.tif images/tumor_002.tif", r"images: no tumor_\*\.tif slides"),
        ("annotations/tumor_002.xml", r"annotations/tumor_002\.xml: missing; a tumour slide for training needs"),
        ("evaluation/reference.csv", r"evaluation/reference\.csv: missing; it must hold rows like"),
    ],
)
def test_what_is_missing_of_the_bucket_is_named(bucket_folder: Path, gone: str, words: str) -> None:
    for name in gone.split():
        (bucket_folder / name).unlink()
    with pytest.raises(DatasetError, match=words):
        find_slides(bucket_folder)


def test_a_slide_of_no_kind_is_named(bucket_folder: Path) -> None:
    (bucket_folder / "images/case_7.tif").touch()
    with pytest.raises(DatasetError, match=r"case_7\.tif: its name says not what it is; slides here are normal_\*, "):
        find_slides(bucket_folder)


@pytest.mark.parametrize(("word", "label"), [("itc", 1), ("Macro", 1), ("negative", 0), ("normal", 0), ("tumor", 1)])
def test_the_class_of_a_bucket_slide_is_its_label(bucket_folder: Path, word: str, label: int) -> None:
    (bucket_folder / "evaluation/reference.csv").write_text(REFERENCE.replace("micro", word))
    assert find_slides(bucket_folder)[4].label == label
    (bucket_folder / "evaluation/reference.csv").write_text(REFERENCE.replace("micro", "huge"))
    with pytest.raises(DatasetError, match=r"reference\.csv: row 2: label 'huge' unknown"):
        find_slides(bucket_folder)


@pytest.mark.parametrize("part", ["training", "testing"])
def test_annotations_that_are_still_packed_are_told(folder: Path, part: str) -> None:
    outlines = folder / part / "lesion_annotations"
    with zipfile.ZipFile(outlines.with_suffix(".zip"), "w") as packed:
        for path in outlines.iterdir():
            packed.write(path, f"lesion_annotations/{path.name}")
    assert find_slides(folder)[2].annotation is not None  # both are there
    expected = find_slides(folder)
    shutil.rmtree(outlines)
    with pytest.raises(DatasetError, match=r"lesion_annotations\.zip: still packed; unpack it: unzip -j ") as caught:
        find_slides(folder)
    command = shlex.split(str(caught.value).partition("unpack it: ")[2])
    if shutil.which(command[0]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert find_slides(folder) == expected


def test_releases_differ_in_case(folder: Path) -> None:
    for kind in ("training/lesion_annotations/tumor", "testing/lesion_annotations/test"):
        path = folder / f"{kind}_001.xml"
        path.rename(path.with_name(path.name.capitalize()))
    (folder / "testing/reference.csv").write_text("Test_001,Tumor\nTest_002,Normal\n")
    slides = find_slides(folder)
    assert [slide.label for slide in slides[4:]] == [1, 0]
    assert slides[2].annotation == folder / "training/lesion_annotations/Tumor_001.xml"
    assert slides[4].annotation == folder / "testing/lesion_annotations/Test_001.xml"


def with_odd_slides(folder: Path) -> Path:
    """Adds slides that the README speaks of, in the challenge's layout."""
    for name in (
        "training/normal/normal_086.tif",
        "training/tumor/Tumor_010.tif",
        "training/lesion_annotations/tumor_010.xml",
        "testing/images/test_049.tif",
        "testing/images/test_114.tif",
    ):
        (folder / name).touch()
    with open(folder / "testing/reference.csv", "a") as handle:
        handle.write("test_049,Tumor\ntest_114,Tumor\n")
    return folder


def test_the_notes_of_the_readme_are_kept_to(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (with_odd_slides(folder) / "README.md").write_text("# CAMELYON16 Data Set\n")
    slides = {slide.name: slide for slide in find_slides(folder)}
    assert not {"normal_086", "test_049"} & set(slides) and len(slides) == 8
    assert [name for name, slide in slides.items() if not slide.exhaustive] == ["Tumor_010", "test_114"]
    assert slides["test_114"].label == 1
    assert [record.args[0].name for record in caplog.records] == ["normal_086.tif", "test_049.tif"]
    assert "misclassified" in caplog.text and "duplicate" in caplog.text


@pytest.mark.parametrize("readme", [None, "# Our data\n"])
def test_your_own_slides_may_have_such_names(
    folder: Path, readme: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if readme:
        (folder / "README.md").write_text(readme)
    assert all(slide.exhaustive for slide in find_slides(folder)) and not caplog.records
    slides = find_slides(with_odd_slides(folder))
    assert len(slides) == 10 and all(slide.exhaustive for slide in slides)
    assert "4 slides are named like some of CAMELYON16 that need care (normal_086)" in caplog.text


def test_the_notes_name_slides_that_exist() -> None:
    assert len(PARTLY_ANNOTATED) == 21 and not PARTLY_ANNOTATED & set(WITHDRAWN)
    for name in {*PARTLY_ANNOTATED, *WITHDRAWN}:
        kind, number = name.split("_")
        assert 1 <= int(number) <= {"normal": 160, "tumor": 111, "test": 130}[kind] and len(number) == 3


def test_what_was_taken_back_is_in_no_published_list(shared_data: Path) -> None:
    labels = _read_reference(shared_data / "camelyon16_metadata" / "test_slide_labels.csv")
    assert "test_049" not in labels and "test_048" in labels
    outlined = {path.stem.lower() for path in (shared_data / "camelyon16_annotations" / "json").glob("*.json")}
    assert not outlined & set(WITHDRAWN) and outlined & PARTLY_ANNOTATED


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


@pytest.mark.parametrize(("normal", "tumour", "word"), [(1, 5, "normal"), (5, 0, "tumour")])
def test_too_few_slides_to_split(normal: int, tumour: int, word: str) -> None:
    with pytest.raises(DatasetError, match=rf"training/{word}: [01] slide\(s\); at least 2 are needed"):
        split_validation(entries(normal, tumour), 0.25, 0)
