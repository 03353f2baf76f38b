"""The command line: what it prints, its exit codes, and one clear line for a user's mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import medsd
from medsd import cli, doctor
from medsd.cohort.entry import SlideEntry
from medsd.export import export
from medsd.heatmap import cohort
from medsd.heatmap.model import MapRequest
from medsd.record import write_record
from medsd.slides.slide import open_slide
from medsd.slides.stain import profile_from_dict
from medsd.slides.stain.slide import fit_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory, phantoms) -> Path:
    path = tmp_path_factory.mktemp("cli") / "slide.tif"
    shutil.copy(phantoms / "training" / "normal" / "normal_001.tif", path)
    return path


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["medsd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_help_needs_no_heavy_package():
    """Help answers at once because nothing heavy is imported for it."""
    code = """
import sys
sys.argv = ["medsd", "--help"]
import medsd.cli
try:
    medsd.cli.main()
except SystemExit:
    pass
heavy = {"torch", "monai", "tiatoolbox", "openslide", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        verb in done.stdout for verb in ("doctor", "info", "phantom", "tiles", "stain", "heatmap", "methods", "explain")
    )


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"{medsd.__version__}\n", "")


def test_info_tells_size_scale_and_levels(monkeypatch, capsys, slide):
    code, out, _ = run(monkeypatch, capsys, "info", slide)
    assert code == 0
    assert "1024 x 1024 px, 0.51 x 0.51 mm" in out
    assert "0.5 um per pixel (TIFF resolution tags)" in out
    assert "level 1     256 x 256 px, 2 um per pixel" in out
    assert (
        "0.25 um per pixel (given by the caller; the file says 0.5)"
        in run(monkeypatch, capsys, "info", slide, "--mpp", 0.25)[1]
    )


def test_info_does_not_wait_for_a_pipe(monkeypatch, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    code, _, err = run(monkeypatch, capsys, "info", tmp_path / "pipe.svs")
    assert code == 1 and "is a pipe or device, not a slide" in err


def test_phantom_writes_a_camelyon_folder(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "phantom", tmp_path / "data", "--slides", 4, "--size", 512)
    assert code == 0 and "4 phantom slides" in out
    assert (tmp_path / "data" / "testing" / "reference.csv").is_file()


def test_doctor_passes_here_and_names_a_fix_elsewhere(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0 and "FIX" not in out and "openslide library" in out
    finding = doctor.Finding("imagecodecs", False, "not installed; run ./scripts/setup")
    monkeypatch.setattr(doctor, "examine", lambda _out: [finding])
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert code == 1 and out.startswith("FIX  imagecodecs") and "./scripts/setup" in out


def test_doctor_sees_what_breaks_later(monkeypatch, tmp_path):
    def without_libgl(name):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        if name == "torch":
            cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
            return SimpleNamespace(
                get_num_threads=lambda: 2, cuda=cuda, version=SimpleNamespace(cuda=None), __version__="2.12+cpu"
            )
        return SimpleNamespace(
            __library_version__="4", version=SimpleNamespace(openjpeg_version="0.0.0"),
            **{codec: SimpleNamespace(available=True) for codec in ("JPEG8", "JPEG2K", "DEFLATE", "LZW", "ZSTD")},
        )  # fmt: skip

    monkeypatch.setattr(doctor.importlib, "import_module", without_libgl)
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=64e6, free=1e9))
    (tmp_path / "file").touch()
    found = {finding.subject: finding for finding in doctor.examine(tmp_path / "new" / "out")}
    for subject, words in (
        ("libGL", "libgl1"), ("gpu", "is for CPUs"), ("shared memory", "--shm-size"), ("outputs", "make room"),
    ):  # fmt: skip
        assert not found[subject].ok and words in found[subject].text, subject
    assert "libopenjp2-7" in found["OpenJPEG"].text
    assert next(doctor._disk(tmp_path / "file" / "out")).text.endswith("is a file; name a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert next(doctor._disk(tmp_path / "link")).text.endswith("is a link to nothing; name a folder")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", raising(OSError(30, "Read-only file system")))
    assert "Read-only file system" in next(doctor._disk(tmp_path)).text


def raising(error):
    def fail(**_):
        raise error

    return fail


def test_a_missing_system_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: raising(ImportError("libGL.so.1: cannot open shared object file"))())
    code, _, err = run(monkeypatch, capsys, "info", "a.svs")
    assert code == 1 and err.startswith("medsd: libGL.so.1: ") and err.count("\n") == 1 and "medsd doctor" in err


def test_doctor_sees_two_opencvs(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "5.0" if name.endswith("headless") else "4.1")
    finding = doctor._opencv()
    assert not finding.ok and "share a folder" in finding.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "missing.svs"], ["missing.svs", "no such file"]),
        (["info", "."], ["folder"]),
        (["phantom", "{tmp}/p", "--slides", "2"], ["slides"]),
        (["phantom", "{tmp}/p", "--difficulty", "3"], ["difficulty"]),
        (["heatmap", "{slide}", "--weights", "none.safetensors", "--out", "{tmp}/o"], ["none.safetensors"]),
        (["heatmap", "{slide}", "--weights", "{slide}", "--out", "{tmp}/o"], ["safetensors"]),
        (["segment", "{slide}", "--weights", "none.safetensors", "--out", "{tmp}/o"], ["none.safetensors"]),
        (["segment", "{slide}", "--weights", "x", "--out", "{tmp}/o", "--overlap", "0.7"], ["overlap=0.7"]),
        (["view", "{tmp}"], ["no slide with a report"]),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, slide, arguments, words):
    filled = [argument.format(tmp=tmp_path, slide=slide) for argument in arguments]
    code, _, err = run(monkeypatch, capsys, *filled)
    assert code == 1
    assert err.startswith("medsd: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_stain_writes_a_configuration_for_the_bundle(monkeypatch, capsys, slide, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "stain", slide, "--out", tmp_path / "stain.json")
    assert code == 0 and "macenko stain of slide.tif" in out
    kept = json.loads((tmp_path / "stain.json").read_text("utf-8"))["stain_target"]
    with open_slide(slide) as opened:
        assert profile_from_dict(kept) == fit_slide(opened, "macenko")
    before = slide.read_bytes()
    for taken in (slide, tmp_path / "stain.json"):
        code, _, err = run(monkeypatch, capsys, "stain", slide, "--out", taken)
        assert code == 1 and f"{taken}: is there already and is left as it is" in err
    assert slide.read_bytes() == before
    code, _, err = run(monkeypatch, capsys, "stain", slide, "--out", tmp_path / "b.json", "--method", "macenkoo")
    assert code == 1 and "did you mean 'macenko'?" in err and not (tmp_path / "b.json").exists()


def test_heatmap_takes_the_scale_of_a_manifest(monkeypatch, capsys, slide, tmp_path):
    asked = []
    monkeypatch.setattr(
        cohort, "map_slides", lambda jobs, *_, **__: asked.extend(jobs) or [cohort.SlideResult("a", "ok", "", 1.0)]
    )
    (tmp_path / "slides.csv").write_text(f"slide,mpp\n{slide},0.25\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.svs").touch()
    places = tmp_path / "slides.csv", tmp_path / "other"
    assert run(monkeypatch, capsys, "heatmap", *places, "--weights", "w", "--out", "o", "--mpp", 0.5)[0] == 0
    expected = [SlideEntry(slide.stem, slide, mpp=0.25), SlideEntry("b", tmp_path / "other" / "b.svs", mpp=0.5)]
    assert asked == expected
    assert run(monkeypatch, capsys, "heatmap", *places, "--weights", "w", "--out", "o", "--shard", "1/2")[0] == 0
    assert asked[2:] == [replace(expected[1], mpp=None)]  # by name
    options = "--weights", "w", "--out", "o"
    assert run(monkeypatch, capsys, "heatmap", *places, *options, "--shard", "3/3")[1].endswith("no slide in 3/3\n")
    code, _, err = run(monkeypatch, capsys, "heatmap", *places, *options, "--mpp", 250)
    assert code == 1 and "b.svs: mpp=250.0: must be a number from 0.05 to 20" in err


def test_export_hands_on_what_is_asked_for(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(export, "export_run", lambda *given: asked.append(given) or "made")
    assert run(monkeypatch, capsys, "export", "run", "a.zip", "--license", "b.txt") == (0, "made\n", "")
    assert run(monkeypatch, capsys, "export", "run", "a", "--wsinfer")[0] == 0
    assert asked == [(Path("run"), Path("a.zip"), False, Path("b.txt")), (Path("run"), Path("a"), True, None)]


def test_gather_makes_the_tables_of_what_others_left(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, "gather", tmp_path)[0] == 1
    result = asdict(cohort.SlideResult("a", "ok"))
    write_record(tmp_path / "a" / "record.json", {"slide": []}, [], status="ok", result=result)
    code, out, _ = run(monkeypatch, capsys, "gather", tmp_path)
    assert code == 0 and out == f"1 ok; see {tmp_path / 'slides.csv'}\n" and (tmp_path / "index.html").is_file()


def test_heatmap_hands_on_what_an_encoder_needs(monkeypatch, capsys, slide, tmp_path):
    asked = []
    row = cohort.SlideResult("a", "ok", "", model="A model.", misfit="No fit.")  # without classes, so without a score
    monkeypatch.setattr(cohort, "map_slides", lambda *arguments, **_: asked.append(arguments[3]) or [row])
    options = ["--method", "tsm", "--layer", "layer3", "--network-mpp", "0.5", "--block-px", "512"]
    options += ["--overlay-tif", "--tiles-geojson"]
    code, out, err = run(monkeypatch, capsys, "heatmap", slide, "--weights", "w", "--out", "o", *options)
    assert (code, err) == (0, "medsd: a: No fit.\n") and "A model.\n1 ok; see" in out and "score" not in out
    assert asked == [MapRequest(["tsm"], "layer3", 0.5, 512, also=["overlay.tif", "tiles.geojson"])]


def test_a_name_that_is_no_utf8_can_be_printed(monkeypatch, tmp_path):
    name = os.fsdecode(b"f\xe9vrier")
    monkeypatch.setattr(cohort, "map_slides", lambda *_, **__: [cohort.SlideResult(name, "ok", "", 1.0, 0, 0.0)])
    written = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(sys, "argv", ["medsd", "heatmap", f"{name}.svs", "--weights", "w", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    written.flush()
    assert rb"f\udce9vrier: score 1, " in written.buffer.getvalue()


def test_a_configuration_of_somebody_else_is_audited(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.json").write_text('{"a": "$torch.os.system(\'true\')"}')
    code, out, _ = run(monkeypatch, capsys, "audit", tmp_path)
    assert code == 1 and out.startswith("??  ") and "1 thing(s) would be run or loaded, 1 of them unknown" in out
    assert run(monkeypatch, capsys, "audit", Path(medsd.__file__).parents[1] / "bundles")[0] == 0
