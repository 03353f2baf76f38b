"""The bundles and configurations that come with medsd, for whoever installed the package alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import medsd
from medsd.errors import OutputError
from medsd.files import make_folder

FOLDERS = ("bundles", "configs")


def shipped_folder() -> Path:
    """The folder that holds them."""
    package = Path(medsd.__file__).parent
    # Of an editable installation they lie beside the package.
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def copy_bundles(out: str | Path) -> list[Path]:
    """Copy `bundles/` and `configs/` into a folder, to be run and changed there.

    Returns:
        The files written.

    Raises:
        OutputError: the folder holds one of these already, which is left as it is, or cannot be written to.
    """
    source, out = shipped_folder(), make_folder(out)
    for name in FOLDERS:
        if (out / name).exists():
            raise OutputError(f"{out / name}: is there already and is left as it is; choose another folder")
    try:
        for name in FOLDERS:
            shutil.copytree(source / name, out / name)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written to ({error.strerror}); choose another folder") from error
    return sorted(path for name in FOLDERS for path in (out / name).iterdir())
