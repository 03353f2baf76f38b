#!/usr/bin/env python
"""Damaged and hostile files by the thousand, each read as medsd reads it, in a child process with limits.

python scripts/torture.py --tries 10000 --data DATA

Each try takes the undamaged file of a door (`hostile/doors.py`), damages it in one way (`hostile/mutations.py`), and
says what came of it; the same seed, number and data give the same try. Bad are the last five
outcomes: the exit code is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile.child import Result, in_child
from hostile.doors import Door, make_doors
from tqdm import tqdm

from medsd.errors import MedsdError
from medsd.files import write_json

# What came of a try, in the order of the table.
OUTCOMES = {
    "right": "as the undamaged file",
    "marked": "what is lost is said to be, the rest is right",
    "as stored": "the file says something else now, to other software, too",
    "refused": "one line that names the file",
    "traceback": "any other exception",
    "crash": "the process died",
    "hang": "over the limit of time",
    "memory": "over the limit of memory",
    "wrong": "accepted, and neither the undamaged file nor what others read",
}
BAD = tuple(OUTCOMES)[4:]
_CPU_S, _PRODUCT_S = 15, 60


def main() -> None:
    """Try, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="Number of the first try.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="A folder that holds 'wsi': vendors' slides besides our own.")
    parser.add_argument("--door", default="", help="Only the tries of doors whose name holds this.")
    parser.add_argument("--keep", type=Path, help="Folder for the files of bad outcomes.")
    parser.add_argument("--json", type=Path, help="Counts and the first line of each refusal and bad outcome.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for stop in (signal.SIGINT, signal.SIGTERM):  # in the background, too, where a shell has the first one ignored
        signal.signal(stop, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        doors = make_doors(Path(folder), arguments.data)
        counts, slowest, bad = run(doors, arguments)
    print_table(doors, counts, slowest)
    for line in bad:
        print(line)
    if arguments.json:
        write_json(arguments.json, {"counts": {name: dict(found) for name, found in counts.items()}, "bad": bad})
    sys.exit(bool(bad))


def run(
    doors: list[Door], arguments: argparse.Namespace
) -> tuple[dict[str, Counter[str]], dict[str, tuple[float, int]], list[str]]:
    """Outcomes by door, the longest processor time with the number of its try, and a line for each bad outcome."""
    counts: dict[str, Counter[str]] = {door.name: Counter() for door in doors}
    slowest = dict.fromkeys(counts, (0.0, 0))
    truths = {door.name: door.read(door.path) for door in doors}
    bad = []
    for number in tqdm(range(arguments.first, arguments.first + arguments.tries), unit="try"):
        door = doors[number % len(doors)]
        if arguments.door not in door.name:
            continue
        random = np.random.default_rng([arguments.seed, number])
        path, whole = pick(door.path, random)
        mutation = door.mutations[random.integers(len(door.mutations))]
        try:
            damaged = mutation(whole, random)
            path.write_bytes(damaged)
            result = attempt(door, truths[door.name])
        except KeyboardInterrupt:
            break  # with the table of what was tried
        finally:
            path.write_bytes(whole)
        counts[door.name][result.outcome] += 1
        slowest[door.name] = max(slowest[door.name], (result.cpu_s, number))
        if result.outcome in BAD:
            bad.append(f"{number} {door.name}, {path.name}, {mutation.__name__}: {result.outcome}: {result.words}")
            tqdm.write(bad[-1])
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{number}-{result.outcome}-{path.name}").write_bytes(damaged)
    return counts, slowest, bad


def pick(path: Path, random: np.random.Generator) -> tuple[Path, bytes]:
    """The file, or one of the folder, and what it holds."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        path = files[random.integers(len(files))]
    return path, path.read_bytes()


def attempt(door: Door, truth: Any) -> Result:
    """What comes of the damaged file: read in a child, and, where that goes wrong, as the commands read it."""
    result = in_child(lambda judging: _judge(door, door.read, truth, judging), _CPU_S)
    if result.outcome in BAD[:-1] and door.product is not None:
        product = door.product
        told = in_child(lambda judging: _judge(door, product, truth, judging), _PRODUCT_S)
        result = Result(told.outcome, f"{result.outcome} of the reader, then: {told.words}", told.cpu_s)
    return result


def _judge(door: Door, read: Callable[[Path], Any], truth: Any, judging: Callable[[], Any]) -> tuple[str, str]:
    try:
        found = read(door.path)
    except MedsdError as error:
        words = str(error)
        named = "\n" not in words and any(part.name in words for part in (door.path, door.path.parent))
        return "refused" if named else "traceback", words
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is counted
        return "traceback", f"{type(error).__name__}: {error}"
    if door.product is None:
        same, marked = found == truth, False
    else:
        pixels, seen = found
        whole = truth[0]
        same = pixels.shape == whole.shape and not ((pixels != whole).any(axis=2) & seen).any()
        marked = not seen.all()
    if same:
        return ("marked" if marked else "right"), ""
    judging()
    try:
        return ("as stored" if door.elsewhere(door.path, found, truth) else "wrong"), ""
    except Exception as error:  # noqa: BLE001 - others' exceptions say that they do not read it
        return "wrong", f"others: {type(error).__name__}: {error}"


def print_table(doors: list[Door], counts: dict[str, Counter[str]], slowest: dict[str, tuple[float, int]]) -> None:
    """Tries by door and outcome, and the longest processor time with the number of its try."""
    print(f"| door | tries | {' | '.join(OUTCOMES)} | longest, s (try) |")
    print("|---|" + "--:|" * (len(OUTCOMES) + 2))
    total: Counter[str] = Counter()
    for door in doors:
        found = counts[door.name]
        total += found
        _print_row(door.name, found, slowest[door.name])
    _print_row("all", total, max(slowest.values()))
    print("\n" + "\n".join(f"{name}: {words}" for name, words in OUTCOMES.items()))


def _print_row(name: str, found: Counter[str], longest: tuple[float, int]) -> None:
    words = "{:.1f} ({})".format(*longest)
    cells = [f"{found.total():,}", *(f"{found[outcome]:,}" for outcome in OUTCOMES), words]
    print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
