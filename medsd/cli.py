"""The `medsd` command: thin verbs over the same functions that the bundles call."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import medsd
from medsd.errors import MedsdError
from medsd.logs import log_to_file, log_to_terminal

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

_LISTED = 20

MppOption = Annotated[
    float | None,
    typer.Option("--mpp", help="Micrometres per level-0 pixel, where the file's own is missing or wrong."),
]
ShardOption = Annotated[
    str | None, typer.Option(help="This process's share of the slides, such as 3/40; 'medsd gather OUT' comes last.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the network runs: cpu or cuda; the GPU where there is one.")
]


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 1."""
    log_to_terminal()
    warnings.filterwarnings("ignore", module="PIL")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8
    try:
        app()
    except MedsdError as error:
        print(f"medsd: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ImportError as error:
        if "cannot open shared object" not in str(error):
            raise
        print(f"medsd: {error}; 'medsd doctor' names the fix", file=sys.stderr)
        raise SystemExit(1) from error


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


def _computing_on(device: str | None) -> torch.device:
    """The device, which is said."""
    import torch

    from medsd.networks.modes import usable_device

    place = usable_device(device)
    print(f"computing on {torch.cuda.get_device_name(place) if place.type == 'cuda' else place.type}")
    return place


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
    print(f"{len(files)} files in {out}; try: python -m monai.bundle run --config_file {out}/bundles/camelyon.json")


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
    from medsd.heatmap.tiff import is_value_map, read_ome_tiff
    from medsd.segment.label_tiff import is_label_map, label_map_words
    from medsd.slides.slide import open_slide

    if is_value_map(slide):
        return print(read_ome_tiff(slide).in_words())
    if is_label_map(slide):
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
    slides: Annotated[int, typer.Option(help="How many slides, training and testing together.")] = 6,
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


@app.command()
def tiles(
    source: Annotated[Path, typer.Argument(help="A folder searched for slides, a slide, or a manifest (.csv).")],
    out: Annotated[Path, typer.Option(help="Folder to write; a run into it goes on where another one ended.")],
    manifest: Annotated[
        Path | None,
        typer.Option(help="Table of the slides in SOURCE: slide,mpp,label,annotation; empty cells are fine."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="Folder of annotations named as the slides: ASAP XML, GeoJSON, NCRF JSON, mask TIFF."),
    ] = None,
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
    if partly_outlined:
        entries = [replace(entry, exhaustive=entry.annotation is None) for entry in entries]
    if shard is not None and not (entries := shard_of(entries, shard)):
        return print(f"no slide in {shard}")
    sharing = Sharing(rename=True, gather=shard is None)
    cohort = tile_slides(entries, out, tiling, workers, progress=progress_bar("tiles"), sharing=sharing)
    where = f"{out / 'slides.csv'} and {out / 'thumbnails'}"
    _end(cohort.slides, f"{len(cohort.index)} tiles; {_see(where, out, shard)}")


def _see(where: str, out: Path, shard: str | None) -> str:
    return f"see {where}" if shard is None else f"'medsd gather {out}' makes the tables"


def _end(rows: Sequence[SlideRow], words: str, empty_is_failure: bool = False) -> None:
    """Tell what became of slides; exit code 1 when one failed, or none has anything that is wanted."""
    from medsd.cohort.kept import count_by_status

    counts = count_by_status(rows)
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items() if count)}; {words}")
    if counts["failed"] or (empty_is_failure and not counts["ok"]):
        raise typer.Exit(1)


@app.command("gather")
def gather_folder(
    out: Annotated[Path, typer.Argument(help="Folder that tiles, heatmap or segment wrote to, in shares.")],
) -> None:
    """Make the tables and index of all slides in a folder, however many processes wrote them."""
    rows: Sequence[SlideRow]
    if any(out.glob("slides/*.json")):
        from medsd.cohort.tiling import gather_tiles

        rows = gather_tiles(out)
    else:
        from medsd.heatmap.cohort import gather_maps
        from medsd.segment.slides import gather_segmented, is_segmented

        rows = gather_segmented(out) if is_segmented(out) else gather_maps(out)
    _end(rows, f"see {out / 'slides.csv'}")


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
    """Run 'tiles ...', 'heatmap ...' or 'segment ...', given behind the options, as jobs of a cluster; then gather.

    On Slurm: an array, and a job behind it that gathers. Preempted jobs are queued again and go on.
    """
    from medsd.cohort.submit import LOGS, make_executor, out_of, submit_gather, submit_shards

    out = out_of(context.args)
    executor = make_executor(on, out, slurm)
    queued = submit_shards(executor, context.args, jobs)
    print(f"{jobs} jobs: {queued[0].job_id} to {queued[-1].job_id}; they say what they do in {out / LOGS}")
    if on == "slurm":
        return print(f"job {submit_gather(executor, queued, out).job_id} gathers when they have ended")
    codes = [job.result() for job in queued]
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
    from typing import cast

    from medsd.checks import check_choice
    from medsd.files import write_json
    from medsd.slides.slide import open_slide
    from medsd.slides.stain import METHODS, Method
    from medsd.slides.stain.slide import fit_slide

    check_choice("method", method, METHODS)
    with open_slide(slide, mpp) as opened:
        write_json(out, {"stain_target": asdict(fit_slide(opened, cast(Method, method)))})
    print(f"{method} stain of {slide.name} in {out}; use it with --stain_target {out}")


@app.command()
def heatmap(
    slides: Annotated[list[Path], typer.Argument(help="Slides, folders searched for them, or manifests (.csv).")],
    weights: Annotated[Path, typer.Option(help="A calibrated classifier, or an encoder alone (.safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder to write; a folder a slide in it.")],
    mpp: MppOption = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Saliency methods, the option once for each; the weights' own when not given."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Name of the class to map; the second of the weights' classes when not given.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer of an encoder alone, such as layer3; its last stage when not given.")
    ] = None,
    network_mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel that an encoder alone takes; a classifier says it.")
    ] = None,
    block_px: Annotated[
        int | None,
        typer.Option(help="Side of what is computed at once, in pixels; as large as memory allows when not given."),
    ] = None,
    overlay_tif: Annotated[
        bool, typer.Option("--overlay-tif", help="Leave overlay.tif too, a pyramid that viewers of slides open.")
    ] = False,
    tiles_geojson: Annotated[
        bool, typer.Option("--tiles-geojson", help="Leave tiles.geojson too, QuPath detections with the maps' values.")
    ] = False,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Leave the maps and regions as DICOM too; needs pip install 'medsd[dicom]'.")
    ] = False,
    faithful_tiles: Annotated[
        int, typer.Option(help="Tiles at most on which is measured how far the answer follows the map; 0: not.")
    ] = 64,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read a slide at once; where the network waits for them, more help."),
    ] = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
) -> None:
    """Map slides: saliency, probability, contours, overlay, report. Exit code 1 when one failed or none has tissue.

    Of an encoder alone: label-free maps, overlay, report.
    """
    from dataclasses import replace

    from medsd.cohort.manifest import find_slides_at
    from medsd.cohort.owner import shard_of
    from medsd.cohort.runner import Sharing
    from medsd.heatmap.cohort import map_slides
    from medsd.heatmap.model import ALSO, MapRequest
    from medsd.progress import progress_bar

    entries = [replace(entry, mpp=entry.mpp or mpp) for entry in find_slides_at(slides, leave_out=out)]
    if shard is not None and not (entries := shard_of(entries, shard)):
        return print(f"no slide in {shard}")
    sharing = Sharing(rename=True, gather=shard is None)
    also = [name for name, wanted in zip(ALSO, (overlay_tif, tiles_geojson, dicom), strict=True) if wanted]
    request = MapRequest(
        methods or (),
        layer,
        network_mpp,
        block_px,
        also=also,
        faithful_tiles=faithful_tiles,
        target=target,
        workers=workers,
    )
    place, progress = _computing_on(device), progress_bar("heatmap")
    results = map_slides(entries, weights, out, request, place, progress, sharing=sharing)
    for words in dict.fromkeys(result.model for result in results if result.model):
        print(words)
    for result in results:
        if result.misfit:
            typer.secho(f"medsd: {result.slide}: {result.misfit}", fg="red", err=True)
        if result.status != "ok":
            print(f"medsd: {result.slide}: {result.status}: {result.reason}", file=sys.stderr)
        elif result.score is not None and len(results) <= _LISTED:
            area = f"{result.region_area_mm2:.2f} mm2"
            print(f"{result.slide}: score {result.score:.3f}, {result.regions} regions, {area}. {result.verdict}")
    _end(results, _see(str(out / "index.html"), out, shard), empty_is_failure=True)


@app.command()
def segment(
    slides: Annotated[list[Path], typer.Argument(help="Slides, folders searched for them, or manifests (.csv).")],
    weights: Annotated[Path, typer.Option(help="A segmentation network (segmentation.safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder to write; a folder a slide in it.")],
    mpp: MppOption = None,
    network_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per pixel that the network takes, where its weights say none."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Of neighbouring tiles, a share of their side, 0 to 0.5: less is quicker.")
    ] = 0.5,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Leave probabilities.ome.tif too, a channel a class.")
    ] = False,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Leave a DICOM Segmentation too; needs pip install 'medsd[dicom]'.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read a slide at once; where the network waits for them, more help."),
    ] = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
) -> None:
    """Segment slides: class of each pixel, contours, areas, overlay, report. Exit code 1 when one failed."""
    from dataclasses import replace

    from medsd.cohort.manifest import find_slides_at
    from medsd.cohort.owner import shard_of
    from medsd.cohort.runner import Sharing
    from medsd.progress import progress_bar
    from medsd.segment.slides import SegmentRequest, segment_slides

    entries = [replace(entry, mpp=entry.mpp or mpp) for entry in find_slides_at(slides, leave_out=out)]
    if shard is not None and not (entries := shard_of(entries, shard)):
        return print(f"no slide in {shard}")
    request = SegmentRequest(network_mpp, overlap, probabilities, dicom, workers=workers)
    sharing, place = Sharing(rename=True, gather=shard is None), _computing_on(device)
    results = segment_slides(entries, weights, out, request, place, progress_bar("segment"), sharing)
    for words in dict.fromkeys(result.model for result in results if result.model):
        print(words)
    for result in results:
        if result.misfit:
            typer.secho(f"medsd: {result.slide}: {result.misfit}", fg="red", err=True)
        if result.status != "ok":
            print(f"medsd: {result.slide}: {result.status}: {result.reason}", file=sys.stderr)
        elif len(results) <= _LISTED:
            areas = ", ".join(f"{name} {area:.2f} mm2" for name, area in result.areas_mm2.items())
            print(f"{result.slide}: {areas}; {result.regions} outlines")
    _end(results, _see(str(out / "index.html"), out, shard), empty_is_failure=True)


@app.command()
def view(
    out: Annotated[Path, typer.Argument(help="Folder of 'medsd heatmap' or 'medsd segment', or of one slide in it.")],
    port: Annotated[int, typer.Option(help="Port to listen at; any that is free when not given.")] = 0,
) -> None:
    """Show reports with all of their slides in a browser on this machine, until Ctrl-C."""
    from medsd.heatmap.view import ViewServer

    with ViewServer(out, port) as server:
        print(
            f"{server.address} shows {len(server.slides)} slide(s) to browsers on this machine; Ctrl-C ends it",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


@app.command()
def methods() -> None:
    """List the saliency methods: what each shows, what it needs, what it costs, whether its parts add up."""
    from medsd.saliency.registry import table

    for number, (name, words, label, gradient, complete, cost) in enumerate(table()):
        print(f"{name:<23}{label:<7}{gradient:<10}{cost:<25}{complete}")
        if number:
            print(f"    {words}")


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Image files (PNG, JPEG, TIFF, WebP), or folders of them.")],
    weights: Annotated[Path, typer.Option(help="A classifier or an encoder (.safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder to write: sheets, metrics.csv, metrics.json, maps.safetensors.")],
    methods: Annotated[
        str | None,
        typer.Option(help="Names with commas between them, see 'medsd methods'; a usual choice when not given."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer such as layer3, or input; the calibrated or last one when not given.")
    ] = None,
    target: Annotated[str, typer.Option(help="Class to explain: name, number, or predicted.")] = "predicted",
    smoothing: Annotated[
        str, typer.Option(help="At strided convolutions: none, backward_hook, forward_hook or surrogate.")
    ] = "none",
    surrogate: Annotated[
        Path | None, typer.Option(help="Trained networks (.safetensors) for --smoothing surrogate.")
    ] = None,
    explained: Annotated[str, typer.Option(help="Of the class: evidence (above others) or logit.")] = "evidence",
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of PNG masks named as the images, 0 is background, to measure localisation."),
    ] = None,
    measured: Annotated[
        bool, typer.Option("--metrics/--no-metrics", help="Measure the maps, which takes most of the time.")
    ] = True,
    device: DeviceOption = None,
) -> None:
    """Lay saliency methods side by side on images, with their measures. Exit code 1 when an image failed."""
    from medsd.explain.explain import explain_images
    from medsd.explain.settings import ExplainSettings, ImageSmoothing, method_names
    from medsd.progress import progress_bar
    from medsd.saliency.method import Output

    kind, output = cast(ImageSmoothing, smoothing), cast(Output, explained)
    trained = str(surrogate) if surrogate else None
    settings = ExplainSettings(method_names(methods), layer, target, kind, trained, output, measured)
    summary = explain_images(images, weights, out, settings, masks, _computing_on(device), progress_bar("explain"))
    print(summary.in_words())
    failed = f", {len(summary.failed)} failed" if summary.failed else ""
    print(f"{summary.images} image(s){failed}; see {out}")
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output folder of a bundle's run, or weights (.safetensors).")],
    out: Annotated[Path, typer.Argument(help="What to write: .zip (a bundle of MONAI's zoo), .onnx or .ts.")],
    wsinfer: Annotated[
        bool, typer.Option("--wsinfer", help="Write a folder OUT for WSInfer and its QuPath extension.")
    ] = False,
    license_file: Annotated[
        Path | None, typer.Option("--license", help="Licence of the weights, a text file, for a bundle.")
    ] = None,
) -> None:
    """Write what was trained so that others can run it: a MONAI bundle, ONNX, TorchScript, or for WSInfer and QuPath.

    ONNX and TorchScript take images as they are read (uint8) and give calibrated probabilities.
    """
    from medsd.export.export import export_run

    print(export_run(run, out, wsinfer, license_file))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of bundle runs on the same test set.")],
    out: Annotated[Path, typer.Option(help="Folder to write: compare.md, compare.csv, compare.png.")],
) -> None:
    """Lay runs side by side: accuracy, calibration, faithfulness of explanations, features, cost."""
    from medsd.evaluate.compare import compare_runs

    compared = compare_runs(runs, out)
    for run in compared:
        print(f"{run.folder}: {run.label}")
    print(f"{len(compared)} runs; see {out / 'compare.md'} and {out / 'compare.png'}")


@app.command()
def spectrum(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs with the stage pretrain.")],
    out: Annotated[Path, typer.Option(help="Folder to write: spectrum.md, spectrum.csv, spectrum.png.")],
) -> None:
    """Show how many directions pre-trained features use, runs in one figure: dimensional collapse made visible."""
    from medsd.evaluate.spectra import compare_spectra

    for run in compare_spectra(runs, out):
        rank, dimensions = run.measures["effective_rank"], len(run.singular_values["features"])
        print(f"{run.label}: effective rank {rank:.1f} of {dimensions}")
    print(f"see {out / 'spectrum.md'} and {out / 'spectrum.png'}")
