#!/usr/bin/env python
"""Long studies behind docs/evidence.md. Each training is one file of results: a stopped study goes on where it was.

python scripts/evidence.py finetune PATCHES --out runs/evidence --seeds 5 --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

from studies import finetune
from tqdm import tqdm

from medsd.errors import MedsdError
from medsd.files import make_folder, write_json, write_text


def main() -> None:
    """Run what is missing, then write tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=["finetune"])
    parser.add_argument("patches", type=Path, help="Folder of PatchCamelyon patches with labels.csv.")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="Train nothing; tables of what is there.")
    parser.add_argument("--part", choices=finetune.PARTS, nargs="+", default=list(finetune.PARTS))
    arguments = parser.parse_args()
    try:
        folder = make_folder(arguments.out / arguments.study)
        jobs = [
            finetune.Job(part, method, seed, str(arguments.patches), str(folder))
            for seed in range(arguments.seeds)
            for part in arguments.part
            for method in finetune.methods_of(part)
        ]
        if not arguments.tables:
            finetune.prepare(folder)
            run([job for job in jobs if not is_done(job, folder)], folder, arguments.processes)
        done = [job for job in jobs if is_done(job, folder)]
        results = {(job.part, job.method, job.seed): read(job, folder)["scores"] for job in done}
        text = finetune.tables(results)
        write_text(folder / "tables.md", text)
        finetune.draw(results, folder / "finetune.png")
    except MedsdError as error:
        sys.exit(f"evidence: {error}")
    print(text)


def path_of(job: finetune.Job, folder: Path) -> Path:
    return folder / job.part / f"{job.method}-{job.seed}.json"


def read(job: finetune.Job, folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path_of(job, folder).read_text("utf-8"))
    return content


def is_done(job: finetune.Job, folder: Path) -> bool:
    """Whether the job's results are there, of the same recipe."""
    return path_of(job, folder).is_file() and read(job, folder)["recipe"] == finetune.recipe_of(job)


def run(jobs: list[finetune.Job], folder: Path, processes: int) -> None:
    """Run the jobs, one thread each."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, finetune.start_worker) as pool:
        for job, scores in tqdm(pool.imap_unordered(finetune.run_job, jobs), total=len(jobs), unit="training"):
            write_json(path_of(job, folder), {"recipe": finetune.recipe_of(job), "scores": scores})


if __name__ == "__main__":
    main()
