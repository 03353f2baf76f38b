"""Bundles for whoever has the package alone, and a clone in a folder of the package's name."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

from medsd.errors import OutputError
from medsd.shipped import copy_bundles

ROOT = Path(__file__).parents[1]


def test_bundles_are_copied_whole_and_nothing_is_overwritten(tmp_path: Path) -> None:
    files = copy_bundles(tmp_path / "new")
    assert {path.parent.name for path in files} == {"bundles", "configs"}
    for path in files:
        assert filecmp.cmp(path, ROOT / path.relative_to(tmp_path / "new"), shallow=False)
    files[0].write_text("mine")
    with pytest.raises(OutputError, match=r"bundles: is there already and is left as it is; choose another folder"):
        copy_bundles(tmp_path / "new")
    assert files[0].read_text() == "mine"


def test_what_is_built_holds_them(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for folder in ("bundles", "configs"):
        names = {path.name for path in (ROOT / folder).iterdir()}
        assert {path.name for path in (tmp_path / "medsd" / "shipped" / folder).iterdir()} == names


def test_a_folder_around_the_clone_is_not_the_package(tmp_path: Path) -> None:
    (tmp_path / "medsd").symlink_to(ROOT)
    code = "import medsd; print(medsd.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
