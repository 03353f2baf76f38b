"""What would be submitted, by an sbatch that only notes it, and two local jobs that really run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medsd import cli
from medsd.cohort.submit import Verb, check_inputs, make_executor, out_of, submit_shards
from medsd.errors import ConfigError
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.phantom.files import write_pyramid
from medsd.tables import read_table

pytest.importorskip("submitit", reason="needs submitit, the extra 'cluster'")

SBATCH = """#!/bin/sh
cat "$1" >> {seen}
echo "--- end" >> {seen}
n=$(grep -c -- "--- end" {seen})
echo "Submitted batch job $((700 + n))"
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what was handed to sbatch."""
    seen, place = tmp_path / "seen", tmp_path / "bin"
    place.mkdir()
    for name in ("sbatch", "srun"):
        (place / name).write_text(SBATCH.format(seen=seen))
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=":")
    return seen


def medsd(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["medsd", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_an_array_and_a_gathering_job_behind_it(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = "partition=gpu,gpus_per_node=1,timeout_min=240,array_parallelism=8"
    (tmp_path / "w.safetensors").touch()
    verb = [
        "heatmap",
        "slides",
        "--weights",
        tmp_path / "w.safetensors",
        "--out",
        tmp_path / "out",
        "--method",
        "deeplift",
    ]
    assert medsd(monkeypatch, "submit", "--jobs", 40, "--slurm", slurm, *verb) == 0
    array, gathering, _ = sbatch.read_text().split("--- end\n")
    for line in ("--array=0-39%8", "--partition=gpu", "--gpus-per-node=1", "--time=240"):
        assert f"#SBATCH {line}\n" in array, line
    assert "#SBATCH --dependency=afterany:701\n" in gathering and "gpus-per-node=1" not in gathering
    said = capsys.readouterr().out
    assert "40 jobs: 701_0 to 701_39" in said and "job 702 gathers" in said


def test_a_job_is_its_share_and_is_queued_again_as_it_was(tmp_path: Path) -> None:
    verb = Verb(("heatmap", "a.svs", "--shard", "3/40"))
    again = verb.checkpoint()
    assert again.function == verb and again.args == () and again.kwargs == {}


def test_local_jobs_share_slides_and_the_tables_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    (tmp_path / "slides").mkdir()
    for number in range(3):
        image = draw_phantom(PhantomSpec(number, False, 512, 0.5)).image
        write_pyramid(tmp_path / "slides" / f"s{number}.tif", image, 0.5, 1)
    verb = ["tiles", tmp_path / "slides", "--out", tmp_path / "out", "--tile-px", 64, "--workers", 1]
    assert medsd(monkeypatch, "submit", "--on", "local", "--jobs", 2, *verb) == 0
    assert read_table(tmp_path / "out" / "slides.csv")["slide"].tolist() == ["s0", "s1", "s2"]
    assert "3 ok" in capsys.readouterr().out
    logs = [path.read_text() for path in (tmp_path / "out" / ".jobs").glob("*_log.out")]
    assert len(logs) == 2 and all("medsd gather" in text or "no slide in" in text for text in logs)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "submit: no verb; behind its own options give one of tiles, heatmap"),
        (["explain", "a"], "'explain' has no shards; give one of tiles, heatmap, segment, features"),
        (["heatmp", "a"], "did you mean 'heatmap'"),
        (["tiles", "a"], "tiles needs --out FOLDER"),
        (["tiles", "a", "--out"], "tiles needs --out FOLDER"),
        (["tiles", "a", "--out=o", "--shard=1/2"], "--shard is given by --jobs"),
    ],
)
def test_commands_without_shards_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        out_of(words)


@pytest.mark.parametrize("words", [["--weights", "none.safetensors"], ["--manifest=none.csv"]])
def test_what_every_job_would_end_with_is_told_before_any_is_queued(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"submit: --(weights|manifest) none\.\w+: no such file"):
        check_inputs(["heatmap", "a", *words, "--out", "o"])


def test_settings_and_clusters_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert out_of(["tiles", "a", "--out=o"]) == out_of(["tiles", "--out", "o", "a"]) == Path("o")
    for on, slurm, told in (
        ("lsf", None, "on='lsf'"),
        ("local", "partition=a", "of no use with --on local"),
        ("slurm", "partitoin=a", "did you mean 'partition'"),
        ("slurm", "timeout_min=soon", "no value for it"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_executor(on, tmp_path / "out", slurm)
    with pytest.raises(ConfigError, match="jobs=1000000000: must be a whole number from 1 to 10000"):
        submit_shards(make_executor("local", tmp_path / "out"), ["tiles", "a", "--out", "o"], 10**9)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="use --on local, or a node that has sbatch"):
        make_executor("slurm", tmp_path / "out")
