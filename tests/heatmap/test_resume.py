"""Maps that are stopped go on where they were, and come out the same; memory that runs out costs nothing else."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import medsd.heatmap.cohort as cohort
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import MapSettings, SlideMaps
from medsd.heatmap.store import BlockStore
from medsd.heatmap.tiled import TiledEngine
from medsd.networks.classifier import TileClassifier
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask
from tests.heatmap.mapping import map_here

PIXELS = np.random.default_rng(3).integers(0, 256, (250, 280, 3), dtype=np.uint8)
TISSUE = TissueMask(np.ones((64, 64), bool), 8.0)
METHODS = ("deeplift", "gradient_x_activation")


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.2)
    return network.eval()


@pytest.fixture
def damaged(array_slide):
    """Places that could not be decoded are to be remembered as well."""

    class Damaged(array_slide):
        def read_seen(self, x, y, width, height, mpp=None):
            rows, columns = np.arange(height) + y, np.arange(width) + x
            seen = ~(((rows >= 96) & (rows < 128))[:, None] & ((columns >= 64) & (columns < 128))[None])
            return self.read(x, y, width, height, mpp), None if seen.all() else seen

    return Damaged(PIXELS)


def dense(classifier: TileClassifier) -> DenseEngine:
    reference = NeutralReference("layer2", (0.3,) * 48, 0.0, 0.5, "plane", "made up")
    return DenseEngine(classifier, 96, 1.0, settings=MapSettings(METHODS, "layer2", block_px=96), reference=reference)


def tiled(classifier: TileClassifier) -> TiledEngine:
    reference = NeutralReference("layer2", (0.3,) * 48, 0.0, 0.5, "tile", "made up")
    return TiledEngine(classifier, 64, 1.0, settings=MapSettings(METHODS, "layer2"), reference=reference)


def content(maps: SlideMaps) -> list[object]:
    """All that is to come out the same, to the bit."""
    shown = [maps.probability, *maps.explanations.values()]
    lost = None if maps.lost is None else maps.lost.tobytes()
    return [*(each.values.tobytes() for each in shown), lost, maps.seam, maps.moved, maps.blocks, maps.pixels_read]


class Written:
    """Names of the groups that are written; stops the process, so to speak, at the one of that number."""

    def __init__(self, monkeypatch) -> None:
        self.names: list[str] = []
        self.stop_at: int | None = None
        self.half = False
        write = BlockStore.write

        def counted(store, name, **arrays):
            if len(self.names) == self.stop_at:
                if self.half:  # the group is named but not whole
                    store.folder.mkdir(parents=True, exist_ok=True)
                    (store.folder / f".4194305-{name}.zarr.zip").write_bytes(b"half")
                raise KeyboardInterrupt
            self.names.append(name)
            write(store, name, **arrays)

        monkeypatch.setattr(BlockStore, "write", counted)

    def since(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.mark.parametrize("make", [dense, tiled])
def test_a_map_that_is_stopped_goes_on_where_it_was(classifier, damaged, monkeypatch, tmp_path, make):
    monkeypatch.setattr("medsd.heatmap.tiled._GROUP", 4)
    written, engine = Written(monkeypatch), make(classifier)
    expected = content(engine.map(damaged, TISSUE))
    names = written.since()
    maps = {name for name in names if name.startswith("maps")}
    assert len(names) == len(set(names)) and len(maps) >= 4 and b"\x01" in expected[3]
    stops = sorted(random.Random(0).sample(range(len(names)), min(4, len(names))))
    for number in stops:
        folder = tmp_path / str(number)
        written.stop_at, written.half = number, number % 2 == 0
        with pytest.raises(KeyboardInterrupt):
            engine.map(damaged, TISSUE, store=folder)
        before, written.stop_at = written.since(), None
        assert before == names[:number]
        assert content(engine.map(damaged, TISSUE, store=folder)) == expected
        after = written.since()
        # No map is made again, and of the features only those that were let go and are needed.
        assert set(before) | set(after) == set(names)
        assert not (maps | {"plan"}) & set(before) & set(after)
        again = set(before) & set(after)
        assert len([name for name in again if name.startswith("features")]) <= len(maps - set(before)) * 9
        assert not list(folder.rglob(".*"))
        # What is whole is not made again at all.
        assert content(engine.map(damaged, TISSUE, store=folder)) == expected
        assert written.since() == []


def test_a_map_that_is_stopped_again_and_again_comes_out_the_same(classifier, array_slide, monkeypatch, tmp_path):
    slide, written, engine = array_slide(PIXELS), Written(monkeypatch), dense(classifier)
    expected, rounds = content(engine.map(slide, TISSUE)), 0
    for written.stop_at in [5] * 40:
        written.since()
        try:
            found = content(engine.map(slide, TISSUE, store=tmp_path))
            break
        except KeyboardInterrupt:
            rounds += 1
    assert rounds >= 3 and found == expected


@pytest.mark.parametrize("room", [60_000, 1e9])
def test_features_that_are_held_in_memory_change_nothing(classifier, damaged, monkeypatch, tmp_path, room):
    written, engine = Written(monkeypatch), dense(classifier)
    expected = content(engine.map(damaged, TISSUE))
    names = written.since()
    monkeypatch.setattr("medsd.heatmap.dense.room_on", lambda _device: room)
    assert content(engine.map(damaged, TISSUE)) == expected
    features = [name for name in written.since() if name.startswith("features")]
    assert bool(features) == (room < 1e9) and set(features) < {name for name in names if name.startswith("features")}
    maps: list[str] = []
    for written.stop_at in (3, 9, None):
        with nullcontext() if written.stop_at is None else pytest.raises(KeyboardInterrupt):
            assert content(engine.map(damaged, TISSUE, store=tmp_path)) == expected
        maps += [name for name in written.since() if name.startswith("maps")]
    assert sorted(maps) == sorted(name for name in names if name.startswith("maps"))


def test_a_slide_that_breaks_off_while_it_is_read(classifier, array_slide, tmp_path):
    class Breaking(array_slide):
        left = 2

        def read_seen(self, *arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().read_seen(*arguments, **options)

    engine = dense(classifier)
    expected = content(engine.map(array_slide(PIXELS), TISSUE))
    with pytest.raises(KeyboardInterrupt):
        engine.map(Breaking(PIXELS), TISSUE, store=tmp_path)
    assert content(engine.map(array_slide(PIXELS), TISSUE, store=tmp_path)) == expected


NO_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_blocks_are_halved_where_memory_runs_out(classifier, array_slide, monkeypatch, caplog, error):
    slide, engine, make = array_slide(PIXELS), dense(classifier), DenseEngine._maps
    engine.settings = replace(engine.settings, block_px=1024)
    expected = engine.map(slide, TISSUE)
    asked = []

    def greedy(self, plan, number, store):
        asked.append(max(rect.area for rect, _ in plan.rects))
        if asked[-1] > 8 * 8:
            raise error
        return make(self, plan, number, store)

    monkeypatch.setattr(DenseEngine, "_maps", greedy)
    found = engine.map(slide, TISSUE)
    assert found.blocks > expected.blocks == 1
    assert "goes on with blocks of 256 px" in caplog.text and engine.settings.block_px == 1024
    for name in METHODS:
        one, other = expected.explanations[name].values, found.explanations[name].values
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
    np.testing.assert_allclose(found.probability.values, expected.probability.values, rtol=0, atol=1e-6)
    # The slides that follow begin there.
    refused = len(asked)
    engine.map(slide, TISSUE)
    assert len(asked) == refused + found.blocks


@pytest.mark.parametrize("error", NO_MEMORY)
def test_where_memory_runs_out_fewer_tiles_are_computed_at_once(classifier, array_slide, monkeypatch, error):
    slide, expected = array_slide(PIXELS), tiled(classifier).map(array_slide(PIXELS), TISSUE)
    engine, sizes, run = tiled(classifier), [], TiledEngine._run

    def greedy(engine, images):
        sizes.append(len(images))
        if len(images) > 3:
            raise error
        return run(engine, images)

    monkeypatch.setattr(TiledEngine, "_run", greedy)
    found = engine.map(slide, TISSUE)
    assert sizes[:4] == [32, 16, 8, 4] and set(sizes[4:]) <= {1, 2}
    np.testing.assert_allclose(found.probability.values, expected.probability.values, rtol=0, atol=1e-6)
    for name, value_map in expected.explanations.items():
        np.testing.assert_allclose(found.explanations[name].values, value_map.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [*NO_MEMORY, RuntimeError("sizes do not match")])
@pytest.mark.parametrize("make", [dense, tiled])
def test_what_halving_does_not_help_is_raised(classifier, array_slide, monkeypatch, caplog, error, make):
    tries, engine = [], make(classifier)
    engine.settings, engine._batch = replace(engine.settings, block_px=None), 4

    def greedy(*_arguments):
        tries.append(engine.block_px if make is dense else engine._batch)
        raise error

    monkeypatch.setattr(type(engine), "_maps" if make is dense else "_run", greedy)
    with pytest.raises(type(error)) as raised:
        engine.map(array_slide(PIXELS), TISSUE)
    assert raised.value is error
    expected = [None, 2048, 1024, 512, 256] if make is dense else [4, 2, 1]
    assert tries == (expected if error in NO_MEMORY else expected[:1])


def test_a_killed_slide_leaves_no_record_and_is_done_next_time(tmp_path, small_slide, green_weights, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cohort, "write_report", die)
        with pytest.raises(Killed):
            map_here([small_slide], green_weights, tmp_path)
    folder = tmp_path / "small"
    assert not (folder / "record.json").exists() and not list(folder.glob(".*"))
    assert map_here([small_slide], green_weights, tmp_path)[0].status == "ok"
    assert (folder / "record.json").is_file()


DIES_IN_ITS_25TH_GROUP = """
import os, signal, sys
from pathlib import Path
import zarr
from medsd.cohort.entry import SlideEntry
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.model import MapRequest

create, left = zarr.create_group, [24]

def dying(store):
    group = create(store)
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return group

zarr.create_group = dying
slide, weights, output = map(Path, sys.argv[1:])
map_slides([SlideEntry(slide.stem, slide)], weights, output, MapRequest(block_px=64), "cpu", isolate=False)
"""


def test_kill_9_costs_the_block_in_flight_only(tmp_path, small_slide, green_weights, monkeypatch):
    killed, other, clean = (tmp_path / name for name in ("killed", "other", "clean"))
    arguments = [sys.executable, "-c", DIES_IN_ITS_25TH_GROUP, str(small_slide), str(green_weights), str(killed)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = killed / "small"
    assert not (folder / "record.json").exists() and list((folder / "blocks").rglob(".*-*.zarr.zip"))
    kept = {path.name.removesuffix(".zarr.zip") for path in (folder / "blocks").rglob("[!.]*.zarr.zip")}
    shutil.copytree(killed, other)
    written: list[str] = []
    write = BlockStore.write

    def counted(store, name, **arrays):
        written.append(name)
        write(store, name, **arrays)

    monkeypatch.setattr(BlockStore, "write", counted)
    names = {}
    for output, options in ((clean, {}), (killed, {}), (other, {"max_unseen": 0.5})):
        written.clear()
        assert map_here([small_slide], green_weights, output, block_px=64, **options)[0].status == "ok"
        names[output] = set(written)
        assert not (output / "small" / "blocks").exists() and not list(output.rglob(".*"))
        for file in ("probability.ome.tif", "saliency.ome.tif", "regions.geojson"):
            assert (output / "small" / file).read_bytes() == (clean / "small" / file).read_bytes()
    features, lasting = (
        {name for name in names[clean] & kept if name.startswith("features") == at} for at in (True, False)
    )
    assert any(name.startswith("maps") for name in lasting) and lasting | names[killed] >= names[clean] - features
    # Marks of what could not be decoded are written before the features that the kill cost.
    assert len(lasting & names[killed]) <= 1 and len(names[killed]) < len(names[clean])
    assert names[other] == names[clean]  # blocks of another recipe are not taken
