"""The script that damages files: does it see what goes wrong, and does each way of damage do what it says?"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsd.errors import DatasetError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def hostile() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import torture
        from hostile import child, doors, mutations
    finally:
        sys.path.remove(str(SCRIPTS))
    return {"torture": torture, "child": child, "doors": doors, "mutations": mutations}


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("reads", "outcome"),
    [
        (lambda: "truth", "right"),
        (lambda: "another", "as stored"),
        (lambda: (_ for _ in ()).throw(DatasetError("a.csv: no rows; give some")), "refused"),
        (lambda: (_ for _ in ()).throw(DatasetError("no rows\nat all")), "traceback"),
        (lambda: [][0], "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (endless, "hang"),
        (lambda: bytearray(2**33), "memory"),
    ],
)
def test_every_outcome_is_seen(hostile: Any, monkeypatch: pytest.MonkeyPatch, reads: Any, outcome: str) -> None:
    monkeypatch.setattr(hostile["torture"], "_CPU_S", 1)
    door = hostile["doors"].Door("a table", Path("a.csv"), lambda path: reads(), (), lambda *_: True)
    assert hostile["torture"].attempt(door, "truth").outcome == outcome


@pytest.mark.parametrize(("others", "outcome"), [(40, "as stored"), (49, "wrong"), (None, "wrong")])
def test_other_pixels_are_wrong_unless_others_show_them(
    hostile: Any, monkeypatch: pytest.MonkeyPatch, others: int | None, outcome: str
) -> None:
    truth = np.zeros((80, 80, 3), np.uint8), np.ones((80, 80), bool)
    found, lost = (truth[0].copy(), truth[1]), (truth[0].copy(), truth[1].copy())
    found[0][40:, 40:] = lost[0][40:, 40:] = 40
    lost[1][40:, 40:] = False
    asked = []

    def show(x: int, y: int, width: int, height: int) -> Any:
        asked.append((x, y))
        return None if others is None else np.where(truth[0], 0, others)[y : y + height, x : x + width]

    doors = hostile["doors"]
    monkeypatch.setattr(doors, "_another_reader", lambda path: show)
    for pixels, wanted in ((found, outcome), (lost, "marked")):

        def read(path: Path, pixels: Any = pixels) -> Any:
            return pixels

        door = doors.Door("a slide", Path("a.tif"), read, (), doors._shown_elsewhere, read)
        assert hostile["torture"].attempt(door, truth).outcome == wanted
    assert doors._shown_elsewhere(Path("a.tif"), found, truth) == (outcome == "as stored")
    assert min(asked) == (32, 32)  # only where something changed


def test_damage_is_the_same_each_time_and_is_damage(hostile: Any) -> None:
    data = b'{"a": [1, 2.5], "name": "x"}\n' * 50
    for mutation in (*hostile["mutations"].BYTES, hostile["mutations"].text):
        made = [mutation(data, np.random.default_rng(seed)) for seed in range(20)]
        assert made == [mutation(data, np.random.default_rng(seed)) for seed in range(20)]
        assert sum(one != data for one in made) > 10, mutation.__name__
