"""Many processes in one folder: nothing is done by two at once, nothing is lost, and names stay apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsd import claims
from medsd.claims import claimed, forget_abandoned
from medsd.cohort.before import Before
from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import FEATURES, TILES, Kept, SlideRow, gather
from medsd.cohort.owner import shard_of
from medsd.cohort.runner import Sharing, run_cohort
from medsd.cohort.work import Made, Work
from medsd.errors import DatasetError, OutputError, SlideError
from medsd.files import MACHINE, process_lives, write_text
from medsd.progress import Progress
from medsd.record import write_record
from medsd.slides.slide import Slide
from tests.cohort.tiled import table


@dataclass(frozen=True)
class Sums(Kept[SlideRow]):
    folder: Path
    row_type = SlideRow
    columns = ("slide", "status", "reason", "path")
    record = "{}/record.json"

    def publish(self, rows: Sequence[SlideRow], _recipes: Mapping[str, Mapping[str, Any]]) -> None:
        sums = {row.slide: (self.folder / row.slide / "sum.txt").read_text() for row in rows if row.status == "ok"}
        write_text(self.folder / "sums.json", json.dumps(sums))


@dataclass(frozen=True)
class SumWork(Sums, Work[SlideRow]):
    """A slide's sum, added slowly, with a guard that two at once would break."""

    pause_s: float = 0.0
    during: Callable[[SlideEntry], object] = lambda _: None
    outputs = ("sum.txt",)

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        return {}

    def make(self, slide: Slide, entry: SlideEntry, _progress: Progress) -> Made[SlideRow]:
        guard = self.folder / f"at_work_{entry.name}_{os.getpid()}"
        guard.touch()
        others = [path for path in self.folder.glob(f"at_work_{entry.name}_*") if path != guard]
        assert not any(process_lives(int(path.name.rpartition("_")[2])) for path in others)
        self.during(entry)
        time.sleep(self.pause_s)
        with open(self.folder / "made.txt", "a") as handle:
            handle.write(f"{entry.name}\n")
        write_text(self.folder / entry.name / "sum.txt", str(int(slide.read(0, 0, *slide.dimensions).sum())))
        guard.unlink()
        return Made(self.row(entry, "ok"), ["sum.txt"])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[SlideEntry]:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(12):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"s{number:02}.png")
    return entries_of(folder)


def entries_of(folder: Path) -> list[SlideEntry]:
    return [SlideEntry(path.stem, path, mpp=0.5) for path in sorted(folder.iterdir())]


FORKS = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sharing import SumWork, entries_of, run_cohort
entries, draw = entries_of(Path(sys.argv[2])), random.Random(int(sys.argv[4]))
def start():
    child = os.fork()
    if not child:
        run_cohort(SumWork(Path(sys.argv[3]), 0.05), entries, isolate=False)
        os._exit(0)
    return child
children = [start() for _ in range(int(sys.argv[4]))]
for _ in range(2 * len(children)):
    time.sleep(draw.uniform(0.02, 0.12))
    os.kill(children.pop(draw.randrange(len(children))), signal.SIGKILL)
    children.append(start())
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_are_killed_and_others_leave_what_one_leaves(
    processes: int, slides: list[SlideEntry], tmp_path: Path
) -> None:
    """Forks of one process that has imported everything: each kill comes in the middle of a slide."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    arguments = map(str, (Path(__file__).parent, slides[0].path.parent, shared, processes))
    assert subprocess.run([sys.executable, "-c", FORKS, *arguments], timeout=60).returncode == 0
    run_cohort(SumWork(alone), slides, isolate=False)
    for entry in slides:
        one, other = (json.loads((folder / entry.name / "record.json").read_text()) for folder in (shared, alone))
        own = dict.fromkeys(("made", "result", "record_sha256"))
        assert {**one, **own} == {**other, **own}
    assert list(table(shared)) == [entry.name for entry in slides]
    assert (shared / "sums.json").read_bytes() == (alone / "sums.json").read_bytes()
    # A kill at the very end may leave a claim, which the next one takes over.
    assert {path.name for path in shared.glob("*/*")} - {".record.json.claim"} == {"record.json", "sum.txt"}


def test_shards_are_whole_apart_and_the_same_in_any_order(slides: list[SlideEntry], tmp_path: Path) -> None:
    shards = [shard_of(slides[::-1], f"{number}/5") for number in range(1, 6)]
    assert sorted((entry for shard in shards for entry in shard), key=lambda entry: entry.name) == slides
    assert shards == [shard_of(slides, f"{number}/5") for number in range(1, 6)]
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(DatasetError, match=f"shard='{text}': give one as 3/40"):
            shard_of(slides, text)
    for shard in shards:
        run_cohort(SumWork(tmp_path), shard, isolate=False, sharing=Sharing(gather=False))
    assert not (tmp_path / "slides.csv").exists()
    assert [row.slide for row in gather(Sums(tmp_path))] == list(table(tmp_path)) == [entry.name for entry in slides]
    with pytest.raises(DatasetError, match="no records of slides"):
        gather(Sums(tmp_path / "none"))


@pytest.mark.parametrize("damage", ["record.json", "sum.txt"])
def test_a_slide_whose_record_does_not_hold_is_told_and_not_left_out(
    damage: str, slides: list[SlideEntry], tmp_path: Path
) -> None:
    run_cohort(SumWork(tmp_path), slides[:2], isolate=False)
    path = tmp_path / "s00" / damage
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "record.json").write_text('{"mine": 1}')  # nobody's slide
    rows = gather(Sums(tmp_path))
    assert [(row.slide, row.status) for row in rows] == [("s00", "failed"), ("s01", "ok")]
    assert rows[0].reason.startswith(str(tmp_path / "s00" / "record.json")) and "give the slide again" in rows[0].reason
    assert [row.status for row in run_cohort(SumWork(tmp_path), slides[:1], isolate=False)] == ["ok"]
    assert [row.status for row in gather(Sums(tmp_path))] == ["ok", "ok"]


def test_a_copied_folder_is_no_slide(
    slides: list[SlideEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_cohort(SumWork(tmp_path), slides[:1], isolate=False)
    for name in ("a", "s00.bak", "s00_backup", "x"):
        shutil.copytree(tmp_path / "s00", tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_text())
        result = record.pop("result") | {"reason": "old"}
        write_record(tmp_path / name / "record.json", record["recipe"], ["sum.txt"], status="ok", result=result)
    assert [(row.slide, row.reason) for row in gather(Sums(tmp_path))] == [("s00", "")]
    assert "4 records are not where their slides have them" in caplog.text and "a/record.json" in caplog.text


def test_finished_outputs_of_other_settings_do_not_go_without_a_word(
    slides: list[SlideEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_cohort(SumWork(tmp_path), slides[:2], isolate=False)
    run_cohort(SumWork(tmp_path), slides[:2], isolate=False)
    assert "made anew" not in caplog.text
    monkeypatch.setattr(SumWork, "recipe", lambda *_: {"weights": "others"})
    run_cohort(SumWork(tmp_path), slides[:3], isolate=False)
    assert "finished outputs of 2 slides are made anew, since these differ: weights" in caplog.text


def test_another_file_of_the_same_name_gets_its_own(slides: list[SlideEntry], tmp_path: Path) -> None:
    folder, path = tmp_path / "out", tmp_path / "s00.png"
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(path)
    other = SlideEntry("s00", path, mpp=0.5)
    run_cohort(SumWork(folder), slides[:1], isolate=False)
    with pytest.raises(DatasetError, match=r"outputs of another slide of this name, .*s00\.png; rename"):
        run_cohort(SumWork(folder), [other], isolate=False)
    for entries in ([other], [other, slides[0]], [slides[0], other]):
        found = run_cohort(SumWork(folder), entries, isolate=False, sharing=Sharing(rename=True))
        assert {Path(row.path): row.slide[:4] for row in found}[path] == "s00-"
        assert all(row.slide == "s00" for row in found if Path(row.path) != path)
    assert len(table(folder)) == 2 and len((folder / "made.txt").read_text().split()) == 2


def test_a_slide_that_changes_while_it_is_read_has_failed(slides: list[SlideEntry], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(slides[3].path.read_bytes())
    entry = SlideEntry("a", path, mpp=0.5)

    def replaced(_: SlideEntry) -> None:
        path.write_bytes(slides[4].path.read_bytes())
        os.utime(path, ns=(5, 5))

    (row,) = run_cohort(SumWork(tmp_path / "out", during=replaced), [entry], isolate=False)
    assert row.status == "failed" and "a.png: was changed while it was read; run again" in row.reason
    assert not (tmp_path / "out/a/sum.txt").exists()
    assert run_cohort(SumWork(tmp_path / "out"), [entry], isolate=False)[0].status == "ok"


@dataclass(frozen=True)
class Kilos(SumWork):
    """The same of other settings."""

    def recipe(self, _entry: SlideEntry) -> dict[str, Any]:
        return {"unit": 1000}


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def masked(error: BaseException) -> BaseException:
    """What a library raises that Ctrl-C breaks into."""
    error.__context__ = KeyboardInterrupt()
    return error


FULL = (
    *(OutputError("disk full"), OSError(28, "no space"), MemoryError()),
    *(torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")),
)


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), masked(RuntimeError("closed")), masked(AttributeError("_lock")), *FULL]
)
def test_what_was_finished_stays_where_a_run_of_other_settings_stops(
    slides: list[SlideEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture, stop: BaseException
) -> None:
    folder = tmp_path / "s03"

    def stopping(_: SlideEntry) -> None:
        assert not (folder / "sum.txt").exists()  # nothing old beside what is being made
        (folder / "sum.txt").write_text("half")
        raise stop

    (row,) = run_cohort(SumWork(tmp_path), slides[3:4], isolate=False)
    before = left(folder)
    if stop not in FULL:
        with pytest.raises(KeyboardInterrupt):
            run_cohort(Kilos(tmp_path, during=stopping), slides[3:4], isolate=False)
        assert f"{tmp_path}: stopped; the same command goes on" in caplog.text
    else:
        (failed,) = run_cohort(Kilos(tmp_path, during=stopping), slides[3:4], isolate=False)
        assert failed.status == "failed"
    assert left(folder) == before and gather(Sums(tmp_path)) == [row]
    assert run_cohort(Kilos(tmp_path), slides[3:4], isolate=False)[0].status == "ok"
    assert set(left(folder)) == set(before) and left(folder)["record.json"] != before["record.json"]


def test_what_a_killed_run_had_set_aside_is_brought_back_by_the_next(slides: list[SlideEntry], tmp_path: Path) -> None:
    """Of the slide's own fault it goes all the same: no old output stands beside a new status."""
    folder = tmp_path / "s03"
    run_cohort(SumWork(tmp_path), slides[3:4], isolate=False)
    before, aside = left(folder), Before(folder / "record.json", [folder / "sum.txt"])
    aside.set_aside()
    (folder / "sum.txt").write_text("half")
    assert not (folder / "record.json").exists() and aside.folder.is_dir()

    def failing(error: Exception) -> Callable[[SlideEntry], None]:
        def fail(_: SlideEntry) -> None:
            raise error

        return fail

    run_cohort(Kilos(tmp_path, during=failing(OutputError("full"))), slides[3:4], isolate=False)
    assert left(folder) == before
    run_cohort(Kilos(tmp_path, during=failing(SlideError("damaged"))), slides[3:4], isolate=False)
    assert set(left(folder)) == {"record.json"}


def test_what_stands_aside_comes_back_before_anything_else_is_asked(slides: list[SlideEntry], tmp_path: Path) -> None:
    """Of the settings of before it is kept as it is; where the slide is out of reach, too; another slide is refused."""
    place, folder = tmp_path / "s03.png", tmp_path / "out" / "s03"
    place.write_bytes(slides[3].path.read_bytes())
    entry, work = SlideEntry("s03", place, mpp=0.5), tmp_path / "out"
    run_cohort(SumWork(work), [entry], isolate=False)
    before, aside = left(folder), Before(folder / "record.json", [folder / "sum.txt"])

    def unreachable(_: SlideEntry) -> None:
        place.rename(tmp_path / "away.png")
        raise SlideError("gone")

    run_cohort(Kilos(work, during=unreachable), [entry], isolate=False)
    assert left(folder) == before
    aside.set_aside()  # and killed
    run_cohort(Kilos(work), [entry], isolate=False)
    assert left(folder) == before
    aside.set_aside()
    (other,) = run_cohort(SumWork(work), [replace(slides[4], name="s03")], isolate=False)
    assert other.status == "failed" and "another slide of this name" in other.reason and left(folder) == before
    (tmp_path / "away.png").rename(place)
    aside.set_aside()
    run_cohort(SumWork(work), [entry], isolate=False)
    assert left(folder) == before and (work / "made.txt").read_text() == "s03\n"
    shutil.copytree(folder, aside.folder)  # killed once the new record stood
    run_cohort(SumWork(work), [entry], isolate=False)
    assert left(folder) == before and not aside.folder.exists()


@pytest.mark.parametrize("step", [Before.set_aside, Before.bring_back])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_moving_that_was_stopped_halfway_is_brought_back(
    step: Callable[[Before], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in outputs:
        path.write_text(path.name)
    write_record(tmp_path / "record.json", {}, [path.name for path in outputs], status="ok")
    whole, before = left(tmp_path), Before(tmp_path / "record.json", [*outputs, tmp_path / "c.txt"])
    if step is Before.bring_back:
        before.set_aside()
    moves, move = iter(range(9)), Path.replace

    def stopping(path: Path, target: Path) -> Path:
        if next(moves) == number:
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        step(before)
    monkeypatch.undo()
    (tmp_path / "c.txt").write_text("half of what was being made")
    before.bring_back()
    assert {name: text for name, text in left(tmp_path).items() if name != "c.txt"} == whole
    assert not before.folder.exists()


def test_a_claim_that_is_stopped_while_it_is_taken_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(claims, "Claim", stopped)
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / ".claim"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_slide_that_another_run_has_in_hand_comes_last(slides: list[SlideEntry], tmp_path: Path) -> None:
    held = claimed(tmp_path / "s01/.record.json.claim")
    held.__enter__()
    seen: list[str] = []

    def during(entry: SlideEntry) -> None:
        seen.append(entry.name)
        if len(seen) == 2:  # the other run did it
            run_cohort(SumWork(tmp_path / "other"), slides[1:2], isolate=False)
            os.rename(tmp_path / "other/s01/record.json", tmp_path / "s01/record.json")
            os.rename(tmp_path / "other/s01/sum.txt", tmp_path / "s01/sum.txt")
            held.__exit__(None, None, None)

    found = run_cohort(SumWork(tmp_path, during=during), slides[:3], isolate=False)
    assert seen == ["s00", "s02"] and [row.slide for row in found] == ["s00", "s01", "s02"]


def test_claims_of_the_dead_are_taken_over_and_those_of_the_living_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_EMPTY_S", 0.05)
    path, dead = tmp_path / "claim", subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for holder, old, free in (
        (f"{MACHINE} {dead.pid} x", False, True),
        (f"{MACHINE} {os.getppid()} x", False, False),
        (f"{MACHINE} {os.getppid()} x", True, True),  # another process may have its number now
        (f"elsewhere {dead.pid} x", False, False),
        (f"elsewhere {dead.pid} x", True, True),
        ("", False, True),  # killed before it wrote
    ):
        path.write_text(holder)
        if old:
            os.utime(path, (1, 1))
        with claimed(path) as claim:
            assert (claim is not None) == free
        assert path.exists() == (not free)
        path.write_text(holder)
        if old:
            os.utime(path, (1, 1))
        forget_abandoned(path)
        assert path.exists() == (not free or not holder)
        path.unlink(missing_ok=True)
    monkeypatch.setattr(claims, "_HEARTBEAT_S", 0.01)
    with claimed(path) as claim:
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claim is not None and path.stat().st_mtime > 2
        path.write_text("taken over")
        with pytest.raises(OutputError, match="another run took over while this one stood still"):
            claim.check()
    assert path.read_text() == "taken over" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [TILES, FEATURES])
def test_a_folder_holds_outputs_of_one_kind(slides: list[SlideEntry], tmp_path: Path, place: str) -> None:
    write_record(tmp_path / place.format("s00"), {}, [], status="ok", result={"slide": "s00"})
    with pytest.raises(DatasetError, match="holds outputs of another verb, whose table would be replaced"):
        run_cohort(SumWork(tmp_path), slides[:1], isolate=False)
    assert not (tmp_path / "slides.csv").exists() and not (tmp_path / "s00").exists()


@pytest.mark.parametrize("name", ["records", "record"])
def test_a_slide_may_be_called_as_what_another_kind_keeps(slides: list[SlideEntry], tmp_path: Path, name: str) -> None:
    entries = [SlideEntry(name, slides[1].path, mpp=slides[1].mpp)]
    for _ in range(2):
        (row,) = run_cohort(SumWork(tmp_path), entries, isolate=False)
        assert row.status == "ok"
    assert (tmp_path / "made.txt").read_text() == f"{name}\n"
