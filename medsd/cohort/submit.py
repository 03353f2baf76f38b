"""A verb's slides as jobs of a cluster, a shard each, through submitit (extra `cluster`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError, nearest
from medsd.files import make_folder

if TYPE_CHECKING:
    from submitit import AutoExecutor, Executor, Job

CLUSTERS = ("slurm", "local")
VERBS = ("tiles", "heatmap", "segment", "features")
LOGS = ".jobs"
"""Folder in the outputs' with what jobs were asked and what they said."""

_COMMAND = "from medsd.cli import main; main()"
_TEXT = ("partition", "account", "qos", "constraint", "gres", "mem")
_NUMBERS = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "array_parallelism")
# submitit's own is five minutes.
_TIMEOUT_MIN = 24 * 60
_MOST_JOBS = 10_000


@dataclass(frozen=True)
class Verb:
    """A `medsd` command in a process of its own; what it prints goes to the job's log.

    Attributes:
        words: behind `medsd`.
    """

    words: tuple[str, ...]

    def __call__(self) -> int:
        """The exit code."""
        return subprocess.run([sys.executable, "-P", "-c", _COMMAND, *self.words]).returncode

    def checkpoint(self) -> Any:
        """What submitit queues again when the job is preempted or out of time: the same, which goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def out_of(words: Sequence[str]) -> Path:
    """The folder of outputs of a command that may be cut into shards.

    Raises:
        ConfigError: another verb, no `--out`, or a shard of its own.
    """
    if not words:
        raise ConfigError(f"submit: no verb; behind its own options give one of {', '.join(VERBS)} with its own")
    if words[0] not in VERBS:
        raise ConfigError(
            f"submit: {words[0]!r} has no shards{nearest(words[0], VERBS)}; give one of {', '.join(VERBS)}"
        )
    named = _options(words)
    if "--shard" in named:
        raise ConfigError("submit: --shard is given by --jobs; leave it out")
    if not named.get("--out"):
        raise ConfigError(f"submit: {words[0]} needs --out FOLDER, which all jobs can see")
    return Path(named["--out"])


def _options(words: Sequence[str]) -> dict[str, str]:
    """The value behind each word, and behind `=` of options."""
    return dict(zip(words, [*words[1:], ""], strict=True)) | {
        word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--") and "=" in word
    }


def check_inputs(words: Sequence[str]) -> None:
    """What every job would end with is told before any is queued.

    Raises:
        ConfigError: weights or a manifest that are not there.
    """
    named = _options(words)
    for option in ("--weights", "--manifest"):
        if (file := named.get(option)) and not Path(file).is_file():
            raise ConfigError(f"submit: {option} {file}: no such file, so every job would fail; check the path")


def make_executor(on: str, out: Path, slurm: str | None = None) -> AutoExecutor:
    """submitit's executor, whose logs go to `out`/.jobs.

    Args:
        on: "slurm", or "local" for processes of this machine.
        out: the folder of outputs.
        slurm: settings `name=value`, by commas: submitit's (`timeout_min`, a day when not given, `gpus_per_node`,
            `cpus_per_task`, `mem_gb`, `array_parallelism`) and of sbatch `partition`, `account`, `qos`, `constraint`,
            `gres`, `mem`.

    Raises:
        ConfigError: another cluster or setting, submitit is not installed, or there is no sbatch.
    """
    check_choice("on", on, CLUSTERS)
    settings = _settings(slurm or "")
    if settings and on != "slurm":
        raise ConfigError(f"slurm={slurm!r}: of no use with --on {on}; leave it out")
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        raise ConfigError("submit: submitit is not installed; pip install 'medsd[cluster]'") from error
    try:
        executor = AutoExecutor(folder=make_folder(out) / LOGS, cluster=on)
    except RuntimeError as error:
        raise ConfigError(
            f"submit: {' '.join(str(error).split())}; use --on local, or a node that has sbatch"
        ) from error
    executor.update_parameters(**({"timeout_min": _TIMEOUT_MIN} | settings))
    return executor


def _settings(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if name in _NUMBERS and value.isascii() and value.isdigit():
            found["slurm_array_parallelism" if name == "array_parallelism" else name] = int(value)
        elif name in _TEXT and sign and value:
            found[f"slurm_{name}"] = value
        else:
            known = (*_TEXT, *_NUMBERS)
            raise ConfigError(
                f"slurm={part!r}: no such setting, or no value for it{nearest(name, known)}; give name=value, by "
                f"commas, of {', '.join(known)}"
            )
    return found


def submit_shards(executor: Executor, words: Sequence[str], jobs: int) -> list[Job[int]]:
    """Queue a verb in shards, on Slurm as one array; each gives the verb's exit code.

    Args:
        executor: any of submitit's.
        words: the verb and its arguments.
        jobs: how many.

    Raises:
        ConfigError: as `out_of`, or `jobs` below 1 or above 10,000.
    """
    check_number("jobs", jobs, f"[1, {_MOST_JOBS}]", whole=True)
    out_of(words)
    shards = [Verb((*words, "--shard", f"{number}/{jobs}")) for number in range(1, jobs + 1)]
    with executor.batch():
        return [executor.submit(shard) for shard in shards]


def submit_gather(executor: AutoExecutor, jobs: Sequence[Job[int]], out: Path) -> Job[int]:
    """Queue `medsd gather` behind jobs, however they end (Slurm)."""
    array = jobs[0].job_id.partition("_")[0]
    executor.update_parameters(gpus_per_node=0, slurm_dependency=f"afterany:{array}")
    job: Job[int] = executor.submit(Verb(("gather", str(out))))
    return job
