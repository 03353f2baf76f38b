"""Blocks of a slide's maps on disk while it is mapped, so that a run that is stopped goes on where it was."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import ZipStore

from medsd.files import atomic_path, remove_leftovers

Arrays = dict[str, np.ndarray]


def own_store(folder: Path, made_from: str) -> Path:
    """The folder in `folder` for what follows from `made_from`, all that determines it; those for others go."""
    store = folder / sha256(made_from.encode()).hexdigest()[:16]
    for other in folder.glob("*"):
        if other != store:
            shutil.rmtree(other, ignore_errors=True)
    return store


class BlockStore:
    """Named groups of arrays in a folder, each a zipped Zarr group that is whole or not there.

    Args:
        folder: where they are kept; made with the first group.

    Example:
        >>> store = BlockStore("blocks")
        >>> store.write("maps-0-0", probability=np.ones((2, 3), np.float32))
        >>> store.read("maps-0-0")["probability"].shape, store.has("maps-0-1")
        ((2, 3), False)
        >>> store.clear()
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_dir():
            remove_leftovers(self.folder)

    def has(self, name: str) -> bool:
        """Whether the group was written."""
        return self._path(name).is_file()

    def write(self, name: str, **arrays: np.ndarray) -> None:
        """Write a group, atomically.

        Raises:
            OutputError: the folder cannot be written to, or the disk is full.
        """
        with atomic_path(self._path(name)) as temporary, ZipStore(temporary, mode="w") as file:
            group = zarr.create_group(file)
            for key, values in arrays.items():
                # One chunk, as it is: deflating features takes longer than computing them on an accelerator.
                chunks = tuple(max(1, side) for side in values.shape)
                stored = group.create_array(
                    key,
                    shape=values.shape,
                    dtype=values.dtype,
                    chunks=chunks,
                    compressors=None,
                    config={"write_empty_chunks": True},  # or values are searched for a zero first
                )
                stored[...] = values

    def read(self, name: str) -> Arrays:
        """The arrays of a group by their names."""
        with ZipStore(self._path(name), mode="r") as file:
            group = zarr.open_group(file, mode="r")
            return {key: np.asarray(array[...]) for key, array in group.arrays()}

    def remove(self, name: str) -> None:
        """Let a group go, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder with all groups."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def belongs_to(self, plan: np.ndarray) -> None:
        """Let go what was kept for another plan of the blocks, as memory may have allowed another."""
        if not self.has("plan") or not np.array_equal(self.read("plan")["plan"], plan):
            self.clear()
            self.write("plan", plan=plan)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.zarr.zip"
