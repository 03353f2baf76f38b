#!/usr/bin/env python
"""Long studies behind docs/evidence.md. Each job is one file of results: a stopped study goes on where it was.

python scripts/evidence.py objectives DATA --part pcam
python scripts/evidence.py finetune DATA --seeds 5
python scripts/evidence.py saliency PATCHES --weights SQUEEZENET.npz --runs runs
python scripts/evidence.py label_free DATA
python scripts/evidence.py maps DATA --run runs/pcam
python scripts/evidence.py ways DATA --run runs/pcam
python scripts/evidence.py appearance DATA
python scripts/evidence.py pretrain DATA --device cuda --processes 12
python scripts/evidence.py segment DATA
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import re
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from studies.redealt import RATIOS
from tqdm import tqdm

from medsd.errors import MedsdError
from medsd.files import make_folder, write_json, write_text

STUDIES = ("objectives", "finetune", "saliency", "label_free", "maps", "ways", "appearance", "pretrain", "segment")


class Job(Protocol):
    """A part of a study whose results are one file."""

    @property
    def part(self) -> str: ...

    @property
    def name(self) -> str: ...


def main() -> None:
    """Run what is missing, then write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    # Each alone, for their packages differ.
    name = parser.parse_args(sys.argv[1:2]).study
    study = import_module(f"studies.{name}")
    parser = argparse.ArgumentParser(f"{Path(sys.argv[0]).name} {name}", description=study.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="Compute nothing; tables of what is there.")
    parser.add_argument("--part", choices=study.PARTS, nargs="+", default=list(study.PARTS))
    study.add_arguments(parser)
    arguments = parser.parse_args(sys.argv[2:])
    try:
        folder = make_folder(arguments.out / name)
        jobs: list[Job] = study.jobs_of(arguments, folder)
        if not arguments.tables:
            study.prepare(arguments, folder)
            run(study, [job for job in jobs if not is_done(study, job, folder)], folder, arguments.processes)
        results = {study.key_of(job): scores_of(study, job, folder) for job in jobs if is_done(study, job, folder)}
        text = study.tables(results)
        write_text(folder / "tables.md", text)
        for name, table in csv_tables(text).items():
            write_text(make_folder(folder / "tables") / f"{name}.csv", table)
        study.draw(results, folder)
    except MedsdError as error:
        sys.exit(f"evidence: {error}")
    print(text)


def csv_tables(text: str) -> dict[str, str]:
    """Every Markdown table of a text as CSV, by number and the heading above it."""
    tables: list[tuple[str, list[list[str]]]] = []
    heading, inside = "", False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")[:60]
        if line.startswith("|") and not inside:
            tables.append(("-".join(filter(None, (str(len(tables) + 1), heading))), []))
        inside = line.startswith("|")
        if inside and not line.startswith("|---"):
            tables[-1][1].append([cell.strip().replace("*", "") for cell in line.strip().strip("|").split(" |")])
    found = {}
    for name, rows in tables:
        csv.writer(file := io.StringIO(), lineterminator="\n").writerows(rows)
        found[name] = file.getvalue()
    return found


def path_of(job: Job, folder: Path) -> Path:
    """The file of a job's results."""
    return folder / job.part / f"{job.name}.json"


def read(job: Job, folder: Path) -> dict[str, Any]:
    """A job's results with the recipe they follow."""
    content: dict[str, Any] = json.loads(path_of(job, folder).read_text("utf-8"))
    return content


def scores_of(study: ModuleType, job: Job, folder: Path) -> dict[str, Any]:
    """A job's results; of studies that deal the same groups anew with what their intervals must know of the deal."""
    scores: dict[str, Any] = read(job, folder)["scores"]
    return scores | ({RATIOS: study.dealt(job)} if hasattr(study, "dealt") else {})


def is_done(study: ModuleType, job: Job, folder: Path) -> bool:
    """Whether the job's results are there, of the same recipe."""
    # Through JSON, as the file's went: tuples are lists there.
    recipe = json.loads(json.dumps(study.recipe_of(job)))
    return path_of(job, folder).is_file() and read(job, folder)["recipe"] == recipe


def run(study: ModuleType, jobs: list[Job], folder: Path, processes: int) -> None:
    """Run the jobs, one thread each."""
    context = multiprocessing.get_context("spawn")
    # As by Ctrl-C: the pool ends its processes, which else work on to the end of their jobs, for nobody.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with context.Pool(processes, torch.set_num_threads, (1,)) as pool:
        for job, scores in tqdm(pool.imap_unordered(study.run_job, jobs), total=len(jobs), unit="job"):
            write_json(path_of(job, folder), {"recipe": study.recipe_of(job), "scores": scores})


if __name__ == "__main__":
    main()
