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
    says = hostile["doors"].SAYS_ELSE
    door = hostile["doors"].Door("a table", Path("a.csv"), lambda path: reads(), (), lambda path: says)
    assert hostile["torture"].attempt(door, "truth").outcome == outcome


@pytest.mark.parametrize(("others", "outcome"), [(40, "as stored"), (41 + 8, "wrong"), (None, "wrong")])
def test_other_pixels_are_wrong_unless_others_show_them(hostile: Any, others: int | None, outcome: str) -> None:
    truth = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool)
    found = np.full((8, 8, 3), 40, np.uint8), truth[1]
    shown = None if others is None else np.full((8, 8, 3), others, np.int16)
    door = hostile["doors"].Door(
        "a slide", Path("a.tif"), lambda path: found, (), lambda path: shown, lambda path: found
    )
    assert hostile["torture"].attempt(door, truth).outcome == outcome
    lost = found[0], np.zeros((8, 8), bool)
    door = hostile["doors"].Door("a slide", Path("a.tif"), lambda path: lost, (), lambda path: shown, lambda path: lost)
    assert hostile["torture"].attempt(door, truth).outcome == "marked"


def test_damage_is_the_same_each_time_and_is_damage(hostile: Any) -> None:
    data = b'{"a": [1, 2.5], "name": "x"}\n' * 50
    for mutation in (*hostile["mutations"].BYTES, hostile["mutations"].text):
        made = [mutation(data, np.random.default_rng(seed)) for seed in range(20)]
        assert made == [mutation(data, np.random.default_rng(seed)) for seed in range(20)]
        assert sum(one != data for one in made) > 10, mutation.__name__
