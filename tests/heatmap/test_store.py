"""Blocks on disk: whole or not there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import zarr

from medsd.errors import OutputError
from medsd.files import atomic_path
from medsd.heatmap.store import BlockStore

ARRAYS = {
    "features": np.random.default_rng(0).normal(size=(1, 3, 5, 7)).astype(np.float32),
    "places": np.zeros((0, 2), np.int32),
    "count": np.array(3, np.int64),
    "seen": np.array([[True, False]]),
    "double": np.array([np.nan, np.inf, -0.0]),
}


def test_what_is_read_was_written(tmp_path):
    store = BlockStore(tmp_path / "deep" / "blocks")
    assert not store.has("one")
    store.write("one", **ARRAYS)
    assert store.has("one") and not store.has("other")
    again = BlockStore(tmp_path / "deep" / "blocks").read("one")
    assert again.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        assert again[name].dtype == values.dtype and again[name].shape == values.shape
        assert again[name].tobytes() == values.tobytes()
    store.write("one", other=np.arange(3))
    assert list(store.read("one")) == ["other"]
    store.remove("one")
    store.remove("one")
    assert not store.has("one")


def test_a_group_that_is_broken_off_is_not_there(tmp_path, monkeypatch):
    store = BlockStore(tmp_path)
    store.write("kept", **ARRAYS)
    before = (tmp_path / "kept.zarr.zip").read_bytes()
    create, calls = zarr.Group.create_array, []

    def stopped(group, key, **options):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return create(group, key, **options)

    monkeypatch.setattr(zarr.Group, "create_array", stopped)
    for name in ("kept", "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            store.write(name, **ARRAYS)
    assert not store.has("new") and [path.name for path in tmp_path.iterdir()] == ["kept.zarr.zip"]
    assert (tmp_path / "kept.zarr.zip").read_bytes() == before


def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with atomic_path(tmp_path / "maps-0.zarr.zip") as temporary:
        name = temporary.name
        temporary.touch()
    (tmp_path / "maps-0.zarr.zip").unlink()
    (tmp_path / name.replace(str(os.getpid()), str(ended.pid), 1)).write_bytes(b"half")
    (tmp_path / name).write_bytes(b"being written")
    store = BlockStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not store.has("maps-0")


def test_another_plan_clears(tmp_path):
    store, plan = BlockStore(tmp_path / "blocks"), np.array([[0, 0, 3, 4]], np.int32)
    store.belongs_to(plan)
    store.write("maps-0", **ARRAYS)
    store.belongs_to(plan)
    assert store.has("maps-0")
    for other in (plan + 1, np.repeat(plan, 2, axis=0), np.zeros((0, 4), np.int32)):
        store.belongs_to(other)
        assert not store.has("maps-0") and store.has("plan")
        store.write("maps-0", **ARRAYS)
    store.clear()
    store.clear()
    assert not (tmp_path / "blocks").exists()


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_takes_no_more_is_named(tmp_path):
    """A file that is not allowed to grow fails as one on a full disk does."""
    store = BlockStore(tmp_path)
    with files_of_at_most(1 << 20), pytest.raises(OutputError, match=r"maps-0\.zarr\.zip: cannot be written"):
        store.write("maps-0", large=np.random.default_rng(0).random(1 << 18))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: cannot be created|blocks: cannot be created"):
        BlockStore(tmp_path / "file" / "blocks").write("maps-0", **ARRAYS)
