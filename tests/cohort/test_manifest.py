"""Tables and folders of slides: what is taken, and what is said of every mistake."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.cohort.entry import RESERVED, SlideEntry, output_name, own_name
from medsd.cohort.manifest import SLIDE_SUFFIXES, find_cohort, find_slides_at, read_manifest, search_folder
from medsd.errors import ConfigError, DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Slides, annotations and other files, all empty."""
    for name in ("a.svs", "deep/b.tif", "deep/ä 1.ome.tif", "outlines/a.xml", "notes.txt", "deep/c.zarr/0/d.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "slides.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FULL = "slide,mpp,label,annotation\na.svs,0.25,tumor,outlines/a.xml\ndeep/b.tif,,normal,\ndeep/ä 1.ome.tif,.5,,\n"


def test_every_column_is_read_and_empty_cells_say_nothing(folder: Path) -> None:
    assert read_manifest(str(write(folder, FULL))) == [
        SlideEntry("a", folder / "a.svs", 1, "", folder / "outlines/a.xml", 0.25),
        SlideEntry("b", folder / "deep/b.tif", 0, "", None, None),
        SlideEntry("ä 1.ome", folder / "deep/ä 1.ome.tif", None, "", None, 0.5),
    ]


def test_classes_parts_and_patients(folder: Path) -> None:
    table = write(folder, "slide,label,part,patient\na.svs,Benign,test,p 1\ndeep/b.tif,cancer,train,\ndeep/c.zarr,,,\n")
    assert read_manifest(table, classes=("benign", "cancer")) == [
        SlideEntry("a", folder / "a.svs", 0, "testing", patient="p 1"),
        SlideEntry("b", folder / "deep/b.tif", 1, "training"),
        SlideEntry("c", folder / "deep/c.zarr"),
    ]
    with pytest.raises(DatasetError, match="row 2, column 'label': 'Benign' is unknown; use normal, tumour or"):
        read_manifest(table)


def test_slides_of_one_name_each_get_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one/x.svs", "two/X.tif", "two/y.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {entry.path.name: entry.name for entry in search_folder(tmp_path)}
    assert found["y.svs"] == "y" and found["x.svs"][:2] == "x-" and found["X.tif"][:2] == "X-"
    assert len(found["x.svs"]) == len(found["X.tif"]) == 10
    table = write(tmp_path, "slide\none/x.svs\ntwo/X.tif\n")
    monkeypatch.chdir(tmp_path)  # whoever names them, from wherever, and among whatever others
    assert [entry.name for entry in find_slides_at([Path("one"), Path("two/X.tif")])] == [
        found["x.svs"],
        found["X.tif"],
    ]
    assert [entry.name for entry in read_manifest(table)] == [found["x.svs"], found["X.tif"]]
    assert [entry.name for entry in find_slides_at([tmp_path / "one"])] == ["x"]
    (tmp_path / "x.xml").touch()
    (tmp_path / "two/x.svs").touch()
    with pytest.raises(DatasetError, match=r"x\.xml: belongs to either of several slides .*; name it in a manifest"):
        find_cohort(write(tmp_path, "slide\none/x.svs\ntwo/x.svs\n"), annotations=tmp_path)


@given(
    st.text(max_size=300)
    | st.sampled_from(["", ".", "..", "...", " ", "a" * 500, "ä" * 200, "=cmd", "C:\\x"])
    | st.sampled_from([*RESERVED, "Index.HTML", "CON", "nul.1", "con ." + "a" * 200, "lpt1." + "b" * 116])
)
def test_a_name_of_outputs_is_a_part_of_a_path_and_stays_itself(text: str) -> None:
    name = output_name(text)
    assert name and name == output_name(name) and len(name.encode()) <= 120 and name.isprintable()
    assert not set(name) & set('/\\:*?"<>|') and name[0] not in ".=+-@ " and name[-1] not in ". "
    for taken in (name, Path(name).name.casefold()):
        assert taken not in RESERVED and taken.split(".")[0].strip() not in {"con", "nul", "lpt1"}
    own = own_name(Path("folder") / (text.replace("/", "").replace("\0", "") or "x"))
    assert own == output_name(own) and own != name
    fit = text.isalnum() and len(text.encode()) <= 120
    assert not fit or name in (text, f"{text}_")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\0", "x" * 121, "f\udce9vrier"])
def test_an_entry_takes_no_name_that_is_none(name: str) -> None:
    with pytest.raises(DatasetError, match=r"a\.svs: outputs cannot be kept by the name"):
        SlideEntry(name, Path("a.svs"))
    with pytest.raises(ConfigError, match=r"a\.svs: mpp=250: must be a number from 0\.05 to 20"):
        SlideEntry("a", Path("a.svs"), mpp=250)


@pytest.mark.parametrize(
    "text",
    [
        "slide\na.svs\n",
        "\ufeffSlide\r\na.svs\r\n\r\n",  # as Excel saves it
        " slide , label\n a.svs ,\n , \n",
        'label,slide\n,"a.svs"',
        "slide\n./deep/../a.svs\n",
        "slide\n{folder}/a.svs\n",
    ],
)
def test_tables_of_several_tastes(folder: Path, text: str) -> None:
    entries = read_manifest(write(folder, text.replace("{folder}", str(folder))))
    assert entries == [SlideEntry("a", folder / "a.svs", None, "", None, None)]


def test_a_zarr_store_is_a_slide_though_a_folder(folder: Path) -> None:
    assert read_manifest(write(folder, "slide\ndeep/c.zarr\n"))[0].name == "c"


def test_relative_names_start_from_the_root_and_links_in_it_are_followed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("tables")
    (folder / "link").symlink_to(folder / "deep")
    path = write(elsewhere, "slide\nb.tif\n")
    assert read_manifest(path, folder / "link")[0].path == folder / "link" / "b.tif"
    monkeypatch.chdir(folder)
    assert read_manifest(path, "deep")[0].path == folder / "deep" / "b.tif"  # absolute, also where the root is not
    with pytest.raises(DatasetError, match=r"row 2, column 'slide': no file .*b\.tif"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["../a.svs", "deep/../../a.svs", "b/../.."])
def test_no_relative_name_leads_out_of_the_root(folder: Path, name: str) -> None:
    path = write(folder, f"slide\n{name}\n")
    with pytest.raises(DatasetError, match=r"row 2, column 'slide': '.*' leads out of .*deep; give the whole path"):
        read_manifest(path, folder / "deep")
    with pytest.raises(DatasetError, match=r"row 2, column 'annotation': '\.\./x\.xml' leads out"):
        read_manifest(write(folder, "slide,annotation\na.svs,../x.xml\n"))


MISTAKES = {
    "": r"row 1: no column 'slide'; the first row names the columns",
    "\n": r"row 1: no column 'slide'",
    "name,mpp\na.svs,\n": r"row 1: column 'name' is unknown \(slide, label",
    "slide,anotation\n": r"row 1: column 'anotation' is unknown; did you mean 'annotation'\?",
    "mpp\n0.5\n": r"row 1: no column 'slide'",
    "slide,mpp,mpp\n": r"row 1: column 'mpp' is there twice; drop one",
    "slide;mpp\na.svs;1\n": r"row 1: cells are separated by semicolons; save the table with commas",
    "slide\tmpp\n": r"row 1: cells are separated by tabs",
    "slide,mpp\n": r"lists no slide",
    "slide,mpp\n,0.5\n": r"row 2, column 'slide': empty; name a file",
    "slide,mpp\na.svs,0,25\n": r"row 2: 3 cells where the first row has 2; quote cells that hold a comma",
    "slide,mpp\n\na.svs\n": r"row 3: 1 cells where the first row has 2",
    "slide,mpp\na.svs,abc\n": r"row 2, column 'mpp': 'abc' is no number; give micrometres per level-0 pixel, as 0\.25",
    'slide,mpp\na.svs,"0,25"\n': r"row 2, column 'mpp': '0,25' is no number",
    "slide,mpp\na.svs,nan\n": r"column 'mpp': 'nan' is no number",
    "slide,mpp\na.svs,1_0\n": r"column 'mpp': '1_0' is no number",
    "slide,mpp\na.svs,٣\n": r"column 'mpp': '٣' is no number",
    "slide,mpp\na.svs,-0.5\n": r"column 'mpp': '-0\.5' is no number",
    "slide,mpp\na.svs,0.001\n": r"column 'mpp': no microscope has 0\.001 um per pixel; give micrometres.* 0\.05 to 20",
    "slide,mpp\na.svs,1e999\n": r"column 'mpp': no microscope has 1e999 um",
    "slide,label\na.svs,maybe\n": r"row 2, column 'label': 'maybe' is unknown; use normal, tumour or nothing",
    "slide,part\na.svs,later\n": r"row 2, column 'part': 'later' is unknown; use training, train, validation",
    "slide\nb.svs\n": r"row 2, column 'slide': no file .*b\.svs; correct the name, which starts from",
    "slide\ndeep\n": r"row 2, column 'slide': no file .*deep",
    f"slide\n{'x' * 300}.svs\n": r"row 2, column 'slide': ",
    "slide,annotation\na.svs,a.xml\n": r"row 2, column 'annotation': no file .*a\.xml",
    "slide\na.svs\na.svs\n": r"row 3, column 'slide': row 2 has this slide, too; drop one",
    "slide,patient\na.svs,P01\ndeep/b.tif,p01\n": r"row 3: patient 'p01' differs from 'P01' \(.*: row 2\) in case",
    'slide\n"a.svs\n': r"not a table \(.*\); close every quote",
    "slide\na.svs\nb\0.svs\n": r"row 3: characters that are no text; save the table as CSV in UTF-8",
    "slide\na\x1b[2J.svs\n": r"row 2: characters that are no text",
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.items())
def test_every_mistake_is_one_line_with_its_row(folder: Path, text: str, words: str) -> None:
    path = write(folder, text)
    with pytest.raises(DatasetError, match=words) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("slide\na.svs\nä.svs\n".encode("latin-1"), "row 3: not UTF-8; save the table as CSV in UTF-8"),
        ("slide\na.svs\n".encode("utf-16"), "row 1: not UTF-8"),
        ("slide\na.svs\n".encode("utf-16-le"), "row 1: characters that are no text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "row 1: not UTF-8"),
    ],
)
def test_other_encodings_are_named(folder: Path, data: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read_manifest(write(folder, data))


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.csv: cannot be read \(No such file"):
        read_manifest(tmp_path / "none.csv")


@settings(deadline=None)
@given(data=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: ("slide\n" + text).encode())))
def test_no_table_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    with pytest.raises(DatasetError) as caught:
        read_manifest(write(folder, data))
    assert "\n" not in str(caught.value)


def test_a_folder_is_searched(folder: Path) -> None:
    for name in (".hidden.svs", ".trash/x.svs", "a_mask.tif", "b_Mask.TIF", "out/overlay.tif", "UPPER.NDPI"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "loop").symlink_to(folder)
    entries = search_folder(folder, leave_out=folder / "out")
    assert entries == [
        SlideEntry(name, folder / file, None, "", None)
        for name, file in {
            "UPPER": "UPPER.NDPI",
            "a": "a.svs",
            "b": "deep/b.tif",
            "c": "deep/c.zarr",
            "ä 1.ome": "deep/ä 1.ome.tif",
        }.items()
    ]


def test_a_linked_folder_is_searched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cohort = tmp_path_factory.mktemp("cohort")
    (cohort / "site").symlink_to(folder / "deep")
    assert [entry.name for entry in search_folder(cohort)] == ["b", "c", "ä 1.ome"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], r"no slides; their names end in \.svs \.tif"),
        (["x.txt", "y_mask.tif"], r"no slides; [^;]*$"),
        (
            ["x.PNG", "y.jpg", "z_mask.png"],
            r"no slides; .*; 3 picture\(s\) \(\.png, .*\) are left out; name those that are",
        ),
    ],
)
def test_folders_that_are_no_cohort(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=words):
        search_folder(tmp_path)
    with pytest.raises(DatasetError, match=r"none: no such folder; name one with slides, or a manifest"):
        search_folder(tmp_path / "none")


def test_a_dicom_series_is_one_slide(shared_data: Path, tmp_path: Path) -> None:
    for number in (0, 1):  # two levels of one slide
        shutil.copyfile(shared_data / "wsi" / f"boxes_{number}.dcm", tmp_path / f"boxes_{number}.dcm")
    shutil.copyfile(shared_data / "wsi" / "sm_image.dcm", tmp_path / "sm_image.dcm")
    (tmp_path / "broken.dcm").write_bytes(b"no DICOM")
    largest = max((0, 1), key=lambda number: (tmp_path / f"boxes_{number}.dcm").stat().st_size)
    assert [entry.name for entry in search_folder(tmp_path)] == [f"boxes_{largest}", "broken", "sm_image"]


def test_pictures_are_slides_where_they_are_named_and_not_in_a_folder(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (folder / "deep" / "x.png").touch()
    assert len(search_folder(folder)) == 4
    assert [one.getMessage() for one in caplog.records] == [
        f"{folder}: 1 picture(s) (.png, .jpg, .jpeg) are left out; name those that are slides singly"
    ]
    assert [entry.name for entry in find_cohort(folder / "deep" / "x.png")] == ["x"]


def test_a_cohort_is_a_folder_a_table_or_both(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = write(folder, "slide,mpp\na.svs,0.3\n")
    assert [entry.name for entry in find_cohort(folder)] == ["a", "b", "c", "ä 1.ome"]
    assert not caplog.records
    assert find_cohort(table) == read_manifest(table)
    assert find_cohort(folder, table) == read_manifest(table)
    assert "3 slides that" in caplog.text and "are left out" in caplog.text
    with pytest.raises(DatasetError, match="a manifest, as is"):
        find_cohort(table, table)


def test_annotations_are_found_by_the_slides_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outlines = folder / "outlines"
    (outlines / "b_mask.tif").touch()
    (outlines / "unrelated.geojson").touch()
    found = {entry.name: entry.annotation for entry in find_cohort(folder, annotations=outlines)}
    assert found == {"a": outlines / "a.xml", "b": outlines / "b_mask.tif", "c": None, "ä 1.ome": None}
    assert "1 annotations belong to no slide, the first: unrelated.geojson" in caplog.text
    assert "2 slides have no annotation, the first: c.zarr" in caplog.text
    table = write(folder, "slide,annotation\na.svs,notes.txt\ndeep/b.tif,\n")  # the table's word counts
    assert [entry.annotation for entry in find_cohort(table, annotations=outlines)] == [
        folder / "notes.txt",
        outlines / "b_mask.tif",
    ]


def test_annotations_that_cannot_be_told_apart_or_are_not_there(folder: Path) -> None:
    (folder / "outlines" / "a.geojson").touch()
    with pytest.raises(DatasetError, match=r"slide 'a' has several annotations \(a\.xml, a\.geojson\); keep one"):
        find_cohort(folder, annotations=folder / "outlines")
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no annotation of any slide; they are named as the slides, 'a\.xml'"):
        find_cohort(folder, annotations=folder / "empty")
    with pytest.raises(DatasetError, match=r"none: no such folder; name the one that holds the annotations"):
        find_cohort(folder, annotations=folder / "none")


def test_a_slide_beside_its_annotation_is_not_its_own(folder: Path) -> None:
    (folder / "deep" / "b.xml").touch()
    found: dict[str, Any] = {
        entry.name: entry.annotation for entry in find_cohort(folder / "deep", annotations=folder / "deep")
    }
    assert found["b"] == folder / "deep" / "b.xml"


def test_every_suffix_is_searched_for(tmp_path: Path) -> None:
    for number, suffix in enumerate(SLIDE_SUFFIXES):
        path = tmp_path / f"s{number:02}{suffix}"
        path.mkdir() if suffix == ".zarr" else path.touch()
    assert len(search_folder(tmp_path)) == len(SLIDE_SUFFIXES) == len(os.listdir(tmp_path))


@pytest.mark.parametrize("name", ["a.svs", "deep/c.zarr"])
def test_a_slide_itself_is_a_cohort_of_one(folder: Path, name: str) -> None:
    assert find_cohort(folder / name) == [SlideEntry(Path(name).stem, folder / name)]
