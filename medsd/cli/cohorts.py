"""Verbs of many slides: tiles, shares, clusters, one stain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from medsd.cli.app import MppOption, ShardOption, app, end, see

if TYPE_CHECKING:
    from medsd.cohort.kept import Kept


@app.command()
def tiles(
    source: Annotated[Path, typer.Argument(help="A folder searched for slides, a slide, or a manifest (.csv).")],
    out: Annotated[Path, typer.Option(help="Folder to write; a run into it goes on where another one ended.")],
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Table of the slides in SOURCE: slide, perhaps label, annotation, mpp, part, patient, or empty cells."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="Folder of annotations named as the slides: ASAP XML, GeoJSON, NCRF JSON, mask TIFF."),
    ] = None,
    mpp: MppOption = None,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels at --tile-mpp.")] = 256,
    stride_px: Annotated[
        int | None, typer.Option(help="Step between tiles in pixels at --tile-mpp; a tile's side when not given.")
    ] = None,
    tile_mpp: Annotated[float, typer.Option(help="Micrometres per pixel of a tile.")] = 0.5,
    min_tissue: Annotated[float, typer.Option(help="Least share of a tile that is tissue, 0 to 1.")] = 0.5,
    tissue: Annotated[
        str, typer.Option(help="How tissue is found: saturation, tiatoolbox-otsu or tiatoolbox-morphological.")
    ] = "saturation",
    force_tissue: Annotated[
        bool, typer.Option("--force-tissue", help="Take slides that are no stained tissue on bright glass, too.")
    ] = False,
    classes: Annotated[
        str, typer.Option(help="Names of the classes with commas between them, that of normal tissue first.")
    ] = "normal,tumour",
    partly_outlined: Annotated[
        bool, typer.Option("--partly-outlined", help="Tissue outside all outlines of an annotated slide has no label.")
    ] = False,
    max_unseen: Annotated[float, typer.Option(help="Share of undecodable tiles beyond which a slide fails.")] = 0.05,
    workers: Annotated[
        int | None, typer.Option(help="Slides at work at once; as many as processors when not given.")
    ] = None,
    shard: ShardOption = None,
) -> None:
    """Cut a cohort of slides into tiles: tile index, tissue thumbnails, slides.csv. Exit code 1 when a slide failed."""
    from dataclasses import replace

    from medsd.cohort.index import TileGrid
    from medsd.cohort.manifest import find_cohort
    from medsd.cohort.owner import shard_of
    from medsd.cohort.runner import Sharing
    from medsd.cohort.tiling import Tiling, tile_slides
    from medsd.progress import progress_bar

    grid = TileGrid(tile_px, tile_px if stride_px is None else stride_px, tile_mpp, min_tissue)
    tiling = Tiling(grid, tissue, force_tissue, max_unseen=max_unseen, classes=classes.split(","))
    entries = find_cohort(source, manifest, annotations, leave_out=out, classes=tiling.classes)
    entries = [replace(entry, mpp=entry.mpp or mpp) for entry in entries]
    if partly_outlined:
        entries = [replace(entry, exhaustive=entry.annotation is None) for entry in entries]
    if shard is not None and not (entries := shard_of(entries, shard)):
        return print(f"no slide in {shard}")
    sharing = Sharing(rename=True, gather=shard is None)
    cohort = tile_slides(entries, out, tiling, workers, progress=progress_bar("tiles"), sharing=sharing)
    where = f"{out / 'slides.csv'} and {out / 'thumbnails'}"
    end(cohort.slides, f"{len(cohort.index)} tiles; {see(where, out, shard)}")


@app.command("gather")
def gather_folder(
    out: Annotated[Path, typer.Argument(help="Folder that tiles, heatmap, segment or features wrote to, in shares.")],
) -> None:
    """Make the tables and index of all slides in a folder, however many processes wrote them."""
    from medsd.cohort.kept import FEATURES, TILES, gather, holds

    kept: Kept[Any]
    if holds(out, TILES):
        from medsd.cohort.tiling import Tiles

        kept = Tiles(out)
    elif holds(out, FEATURES):
        from medsd.features.slides import Features

        kept = Features(out)
    else:
        from medsd.heatmap.cohort import Maps
        from medsd.heatmap.folder import holds_classes
        from medsd.segment.slides import Segmented

        kept = (Segmented if holds_classes(out) else Maps)(out)
    end(gather(cast("Kept[Any]", kept)), f"see {out / 'slides.csv'}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def submit(
    context: typer.Context,
    jobs: Annotated[int, typer.Option(help="How many jobs share the slides.")],
    on: Annotated[str, typer.Option(help="slurm, or local for processes of this machine.")] = "slurm",
    slurm: Annotated[
        str | None, typer.Option(help="Settings by commas, such as partition=gpu,gpus_per_node=1,timeout_min=240.")
    ] = None,
) -> None:
    """Run 'tiles ...', 'heatmap ...', 'segment ...' or 'features ...', given last, as jobs of a cluster; then gather.

    Such as: medsd submit --jobs 40 heatmap SLIDES --weights model.safetensors --out maps

    On Slurm: an array, and a job behind it that gathers. Preempted jobs are queued again and go on.
    """
    from medsd.cohort.submit import LOGS, check_inputs, make_executor, out_of, submit_gather, submit_shards

    out = out_of(context.args)
    check_inputs(context.args)
    executor = make_executor(on, out, slurm)
    queued = submit_shards(executor, context.args, jobs)
    print(f"{jobs} jobs: {queued[0].job_id} to {queued[-1].job_id}; they say what they do in {out / LOGS}")
    if on == "slurm":
        return print(f"job {submit_gather(executor, queued, out).job_id} gathers when they have ended")
    codes = [job.result() for job in queued]
    for job, code in zip(queued, codes, strict=True):
        if code and (said := (job.stderr() or "").strip()):  # why, also where nothing is left to gather
            typer.secho(f"job {job.job_id}: {said.splitlines()[-1]}", fg="red", err=True)
    gather_folder(out)
    if any(codes):
        raise typer.Exit(1)


@app.command()
def stain(
    slide: Annotated[Path, typer.Argument(help="A slide whose stain others are to be normalised to.")],
    out: Annotated[Path, typer.Option(help="File to write (.json), which a bundle takes as --stain_target.")],
    method: Annotated[str, typer.Option(help="macenko, vahadane or reinhard.")] = "macenko",
    mpp: MppOption = None,
) -> None:
    """Fit the stain of a slide, as the target that a bundle normalises every slide to."""
    from dataclasses import asdict

    from medsd.checks import check_choice
    from medsd.files import check_new, make_folder, write_json
    from medsd.slides.slide import open_slide
    from medsd.slides.stain import METHODS, Method
    from medsd.slides.stain.slide import fit_slide

    check_choice("method", method, METHODS)
    check_new(out)
    with open_slide(slide, mpp) as opened:
        make_folder(out.parent)  # before the fit, which takes a while
        write_json(out, {"stain_target": asdict(fit_slide(opened, cast(Method, method)))})
    print(f"{method} stain of {slide.name} in {out}; use it with --stain_target {out}")
