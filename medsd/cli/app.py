"""The `medsd` command: what its verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import medsd
from medsd.logs import log_to_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from medsd.cohort.kept import SlideRow

# Heavy packages are imported inside the verbs that need them, so that help answers at once.

app = typer.Typer(
    help="Tumour classifiers on whole-slide images whose explanations can be trusted and seen. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SlidesArgument = Annotated[list[Path], typer.Argument(help="Slides, folders searched for them, or manifests (.csv).")]
SlidesOut = Annotated[Path, typer.Option("--out", help="Folder to write; a folder a slide in it.")]
MppOption = Annotated[
    float | None,
    typer.Option("--mpp", help="Micrometres per level-0 pixel, where the file's own is missing or wrong."),
]
ShardOption = Annotated[
    str | None, typer.Option(help="This process's share of the slides, such as 3/40; 'medsd gather OUT' comes last.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Processes that read a slide at once, one when not given; more help where the network waits."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the network runs: cpu or cuda; when not given, the GPU where there is one.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(medsd.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    log: Annotated[Path | None, typer.Option(help="File to append the log to; before the verb.")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="The log's file has a JSON object a line.")] = False,
) -> None:
    """Tumour classifiers on whole-slide images whose explanations can be trusted and seen. Research use only."""
    if log is not None:
        log_to_file(log, log_json)


def computing_on(device: str | None) -> torch.device:
    """The device, which is said."""
    import torch

    from medsd.networks.modes import usable_device

    place = usable_device(device)
    print(f"computing on {torch.cuda.get_device_name(place) if place.type == 'cuda' else place.type}")
    return place


def see(where: str, out: Path, shard: str | None) -> str:
    return f"see {where}" if shard is None else f"'medsd gather {out}' makes the tables"


def end(rows: Sequence[SlideRow], words: str, empty_is_failure: bool = False) -> None:
    """Tell what became of slides; exit code 1 when one failed, or none has anything that is wanted."""
    from medsd.cohort.kept import count_by_status

    counts = count_by_status(rows)
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items() if count)}; {words}")
    if counts["failed"] or (empty_is_failure and not counts["ok"]):
        raise typer.Exit(1)
