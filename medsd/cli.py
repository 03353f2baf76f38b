"""The `medsd` command: thin verbs over the same functions that the bundles call."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

import medsd
from medsd.errors import MedsdError

# Heavy packages are imported inside the verbs that need them, so that help answers at once.

app = typer.Typer(
    help="Tumour classifiers on whole-slide images whose explanations can be trusted and seen. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LISTED = 20

MppOption = Annotated[
    Optional[float],  # noqa: UP045 (typer reads this form)
    typer.Option("--mpp", help="Micrometres per level-0 pixel, where the file's own is missing or wrong."),
]


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("medsd").setLevel(logging.INFO)
    try:
        app()
    except MedsdError as error:
        print(f"medsd: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _version(wanted: bool) -> None:
    if wanted:
        print(medsd.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Tumour classifiers on whole-slide images whose explanations can be trusted and seen. Research use only."""


@app.command()
def doctor() -> None:
    """Check versions, slide readers and devices; name what is missing and its fix. Exit code 1 when something is."""
    from medsd.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FIX '} {finding.subject:<{width}}  {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def info(slide: Annotated[Path, typer.Argument(help="A slide file.")], mpp: MppOption = None) -> None:
    """Show a slide's size, scale (and where that comes from), levels and reader."""
    from medsd.slides.slide import open_slide

    with open_slide(slide, mpp) as opened:
        width, height = opened.dimensions
        print(f"file        {opened.path}")
        print(f"reader      {opened.reader}")
        print(
            f"dimensions  {width} x {height} px, {width * opened.mpp / 1000:.2f} x {height * opened.mpp / 1000:.2f} mm"
        )
        print(f"mpp         {opened.mpp:g} um per pixel ({opened.mpp_source})")
        for number, level in enumerate(opened.levels):
            level_mpp = opened.mpp * level.downsample_x
            print(f"level {number}     {level.width} x {level.height} px, {level_mpp:g} um per pixel")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; made when missing.")],
    slides: Annotated[int, typer.Option(help="How many slides, training and testing together.")] = 6,
    seed: Annotated[int, typer.Option(help="Start of the random draw.")] = 0,
    size_px: Annotated[int, typer.Option("--size", help="Side of a slide in level-0 pixels.")] = 4096,
    mpp: Annotated[float, typer.Option(help="Micrometres per level-0 pixel.")] = 0.5,
    difficulty: Annotated[float, typer.Option(help="0: tumour nuclei plainly larger; 1: as the normal ones.")] = 0.3,
    shortcut: Annotated[str, typer.Option(help="A cue with the label: none, tint or ink.")] = "none",
) -> None:
    """Draw phantom slides into a folder laid out like CAMELYON16."""
    from typing import cast

    from medsd.slides.phantom import Shortcut, write_phantom_dataset

    write_phantom_dataset(out, slides, seed, size_px, mpp, difficulty, cast(Shortcut, shortcut), progress=True)
    print(f"{slides} phantom slides in {out}")


@app.command()
def heatmap(
    slides: Annotated[list[Path], typer.Argument(help="Slide files.")],
    weights: Annotated[Path, typer.Option(help="A calibrated classifier (.safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder to write; a folder a slide in it.")],
    mpp: MppOption = None,
    block_px: Annotated[
        int, typer.Option(help="Side of the blocks computed at once; smaller needs less memory.")
    ] = 2048,
    device: Annotated[str, typer.Option(help="Where the network runs: cpu or cuda.")] = "cpu",
) -> None:
    """Map slides: saliency, probability, contours, overlay, report. Exit code 1 when one failed or none has tissue."""
    from medsd.heatmap.cohort import SlideJob, map_slides
    from medsd.progress import progress_bar

    jobs = [SlideJob(slide, mpp) for slide in slides]
    results = map_slides(jobs, weights, out, block_px, device, progress_bar("heatmap"))
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "empty", "failed")}
    for result in results:
        if result.score is None:
            print(f"medsd: {result.slide}: {result.status}: {result.reason}", file=sys.stderr)
        elif len(results) <= _LISTED:
            area = f"{result.region_area_mm2:.2f} mm2"
            print(f"{result.slide}: score {result.score:.3f}, {result.regions} regions, {area}")
    total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"{total}; see {out / 'index.html'}")
    if counts["failed"] or not counts["ok"]:
        raise typer.Exit(1)
