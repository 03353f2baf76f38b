"""Verbs that look at the machine, a slide or a configuration, or make something to try."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, cast

import typer

from medsd.cli.app import MppOption, app


@app.command()
def doctor(
    out: Annotated[Path | None, typer.Argument(help="Where outputs shall go; the working directory.")] = None,
) -> None:
    """Check versions, libraries, devices and disk; name what is missing and its fix. Exit code 1 when something is."""
    from medsd.doctor import examine

    findings = examine(out)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FIX '} {finding.subject:<{width}}  {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def bundle(out: Annotated[Path, typer.Argument(help="Folder to copy them into; made when missing.")]) -> None:
    """Copy the bundles and their configurations into a folder, to be run and changed there."""
    from medsd.shipped import copy_bundles

    files = copy_bundles(out)
    config = quote(f"{out}/bundles/camelyon.json")
    print(f"{len(files)} files in {out}; try: python -m monai.bundle run --config_file {config}")


@app.command()
def audit(
    places: Annotated[list[Path], typer.Argument(help="Configurations, or bundles' folders.")],
) -> None:
    """List what configurations would run, without running it. Exit code 1 unless all of it is known."""
    from medsd.audit import audit as found_in
    from medsd.audit import lines_of

    findings = found_in(places)
    print("\n".join(lines_of(findings)))
    unknown = sum(bool(finding.unknown) for finding in findings)
    print(f"{len(findings)} thing(s) would be run or loaded, {unknown} of them unknown")
    if unknown:
        raise typer.Exit(1)


@app.command()
def info(slide: Annotated[Path, typer.Argument(help="A slide file.")], mpp: MppOption = None) -> None:
    """Show a slide's size, scale (and where that comes from), levels and reader; or what a map (.ome.tif) holds."""
    from medsd.heatmap.tiff import is_map, read_ome_tiff
    from medsd.segment.label_tiff import NAMESPACE, label_map_words
    from medsd.slides.readers.base import check_file
    from medsd.slides.slide import open_slide

    if not slide.is_dir():
        check_file(slide)
    if is_map(slide):
        return print(read_ome_tiff(slide).in_words())
    if is_map(slide, NAMESPACE):
        return print(label_map_words(slide))
    with open_slide(slide, mpp) as opened:
        width, height = opened.dimensions
        print(f"file        {opened.path}")
        print(f"reader      {opened.reader}")
        print(
            f"dimensions  {width} x {height} px, {width * opened.mpp / 1000:.2f} x {height * opened.mpp / 1000:.2f} mm"
        )
        print(f"mpp         {opened.mpp:g} um per pixel ({opened.mpp_source})")
        if opened.bounds != (0, 0, width, height):
            x, y, across, down = opened.bounds
            print(f"scanned     {across} x {down} px from ({x}, {y}); the rest of the canvas is empty")
        for number, level in enumerate(opened.levels):
            level_mpp = opened.mpp * level.downsample_x
            print(f"level {number}     {level.width} x {level.height} px, {level_mpp:g} um per pixel")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; made when missing.")],
    slides: Annotated[int, typer.Option(help="How many slides, training and testing together; 4 or more.")] = 6,
    seed: Annotated[int, typer.Option(help="Start of the random draw.")] = 0,
    size_px: Annotated[int, typer.Option("--size", help="Side of a slide in level-0 pixels.")] = 4096,
    mpp: Annotated[float, typer.Option(help="Micrometres per level-0 pixel.")] = 0.5,
    difficulty: Annotated[float, typer.Option(help="0: tumour nuclei plainly larger; 1: as the normal ones.")] = 0.3,
    shortcut: Annotated[str, typer.Option(help="A cue with the label: none, tint or ink.")] = "none",
) -> None:
    """Draw phantom slides into a folder laid out like CAMELYON16."""
    from medsd.phantom import Shortcut, write_phantom_dataset

    write_phantom_dataset(out, slides, seed, size_px, mpp, difficulty, cast(Shortcut, shortcut), progress=True)
    print(f"{slides} phantom slides in {out}")
