"""Verbs that run a network on slides or images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

import typer

from medsd.cli.app import (
    DeviceOption,
    MppOption,
    ShardOption,
    SlidesArgument,
    SlidesOut,
    WorkersOption,
    app,
    computing_on,
    end,
    see,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medsd.cohort.entry import SlideEntry
    from medsd.heatmap.report import ReportedSlide, SlideResult
    from medsd.segment.slides import SegmentedSlide

EncoderMppOption = Annotated[
    float | None, typer.Option(help="Micrometres per pixel that an encoder alone takes; a classifier says it.")
]

_LISTED = 20

Row = TypeVar("Row", bound="ReportedSlide")


@app.command()
def heatmap(
    slides: SlidesArgument,
    weights: Annotated[
        Path, typer.Option(help="A calibrated classifier, or an encoder alone that medsd wrote (.safetensors).")
    ],
    out: SlidesOut,
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
    network_mpp: EncoderMppOption = None,
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
        bool,
        typer.Option("--dicom", help=r"Leave the maps and regions as DICOM too; needs pip install 'medsd\[dicom]'."),
    ] = False,
    faithful_tiles: Annotated[
        int, typer.Option(help="Tiles at most on which is measured how far the answer follows the map; 0: not.")
    ] = 64,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
) -> None:
    """Map slides: saliency, probability, contours, overlay, report. Exit code 1 when one failed or none has tissue.

    Of an encoder alone: label-free maps, overlay, report.
    """
    from medsd.cohort.runner import Sharing
    from medsd.heatmap.cohort import map_slides
    from medsd.heatmap.model import ALSO, MapRequest
    from medsd.progress import progress_bar

    entries = _entries(slides, out, mpp, shard)
    sharing = Sharing(rename=True, gather=shard is None)
    also = [name for name, wanted in zip(ALSO, (overlay_tif, tiles_geojson, dicom), strict=True) if wanted]
    choice = methods or (), layer, network_mpp, block_px
    request = MapRequest(*choice, also=also, faithful_tiles=faithful_tiles, target=target, workers=workers)
    place, progress = computing_on(device), progress_bar("heatmap")
    results = map_slides(entries, weights, out, request, place, progress, sharing=sharing)
    _finish(results, _of_map, out / "index.html", shard)


def _of_map(result: SlideResult) -> str:
    if result.score is None or result.region_area_mm2 is None:
        return ""
    from medsd.heatmap.numbers import score_texts

    area = f"{result.region_area_mm2:.2f} mm2"
    score, _ = score_texts(result.score, result.cut_off)
    return f"score {score}, {result.regions} regions, {area}. {result.verdict}"


@app.command()
def segment(
    slides: SlidesArgument,
    weights: Annotated[Path, typer.Option(help="A segmentation network (segmentation.safetensors).")],
    out: SlidesOut,
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
        bool, typer.Option("--dicom", help=r"Leave a DICOM Segmentation too; needs pip install 'medsd\[dicom]'.")
    ] = False,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
) -> None:
    """Segment slides: class of each pixel, contours, areas, overlay, report.

    Exit code 1 when one failed or none has tissue.
    """
    from medsd.cohort.runner import Sharing
    from medsd.progress import progress_bar
    from medsd.segment.slides import SegmentRequest, segment_slides

    entries = _entries(slides, out, mpp, shard)
    request = SegmentRequest(network_mpp, overlap, probabilities, dicom, workers=workers)
    sharing, place = Sharing(rename=True, gather=shard is None), computing_on(device)
    results = segment_slides(entries, weights, out, request, place, progress_bar("segment"), sharing)
    _finish(results, _of_segmentation, out / "index.html", shard)


def _of_segmentation(result: SegmentedSlide) -> str:
    areas = ", ".join(f"{name} {area:.2f} mm2" for name, area in result.areas_mm2.items())
    return f"{areas}; {result.regions} outlines"


@app.command()
def features(
    slides: SlidesArgument,
    weights: Annotated[
        Path, typer.Option(help="A classifier or an encoder of medsd; with --encoder any weights under timm's names.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: a file SLIDE.h5 a slide, and slides.csv.")],
    mpp: MppOption = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="timm's name of the encoder, such as vit_large_patch16_224, where --weights has none."),
    ] = None,
    encoder_options: Annotated[
        str | None,
        typer.Option(help='What timm makes it with, JSON: \'{"init_values": 1e-5, "dynamic_img_size": true}\' of UNI.'),
    ] = None,
    input_mean: Annotated[
        str | None, typer.Option(help="Three numbers with commas that its weights take; ImageNet's when not given.")
    ] = None,
    input_std: Annotated[str | None, typer.Option(help="As --input-mean.")] = None,
    network_mpp: EncoderMppOption = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Side of a tile in those pixels, where the weights do not say it.")
    ] = None,
    stride_px: Annotated[int | None, typer.Option(help="Step between tiles; a tile's side when not given.")] = None,
    min_tissue: Annotated[float, typer.Option(help="Least share of a tile that is tissue, 0 to 1.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Tiles computed at once.")] = 32,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
) -> None:
    """Features of slides' tiles, a SLIDE.h5 a slide in TRIDENT's layout.

    Exit code 1 when one failed or none has tissue.
    """
    from medsd.cohort.runner import Sharing
    from medsd.features.encoder import FeatureRequest
    from medsd.features.slides import write_features
    from medsd.progress import progress_bar

    entries = _entries(slides, out, mpp, shard)
    request = FeatureRequest(
        encoder,
        _options(encoder_options),
        _numbers("input_mean", input_mean),
        _numbers("input_std", input_std),
        network_mpp,
        tile_px,
        stride_px,
        min_tissue,
        batch=batch,
        workers=workers,
    )
    sharing, place = Sharing(rename=True, gather=shard is None), computing_on(device)
    results = write_features(entries, weights, out, request, place, progress_bar("features"), sharing)
    _finish(results, lambda result: f"{result.tiles} tiles", out / "slides.csv", shard)


def _options(text: str | None) -> dict[str, Any]:
    """The options that a command line gives as JSON."""
    from medsd.errors import ConfigError
    from medsd.files import json_of

    try:
        found = json_of(text or "{}")
    except ValueError as error:
        raise ConfigError(f"encoder_options={text!r}: no JSON ({error}); write '{{\"img_size\": 224}}'") from error
    if not isinstance(found, dict):
        raise ConfigError(f"encoder_options={text!r}: must be names with values; write '{{\"img_size\": 224}}'")
    return found


def _numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them."""
    from medsd.errors import ConfigError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: must be three numbers with commas, such as 0.5,0.5,0.5") from error


def _entries(slides: list[Path], out: Path, mpp: float | None, shard: str | None) -> list[SlideEntry]:
    """The slides asked for; a share without any ends the command."""
    from dataclasses import replace

    from medsd.cohort.manifest import find_slides_at
    from medsd.cohort.owner import shard_of

    entries = [replace(entry, mpp=entry.mpp or mpp) for entry in find_slides_at(slides, leave_out=out)]
    if shard is None:
        return entries
    if not (entries := shard_of(entries, shard)):
        print(f"no slide in {shard}")
        raise typer.Exit
    return entries


def _finish(results: Sequence[Row], found: Callable[[Row], str], page: Path, shard: str | None) -> None:
    """What the network is, what does not fit or failed, of a few slides what was found on each, and how it ended."""
    for words in dict.fromkeys(result.model for result in results if result.model):
        print(words)
    for result in results:
        if result.misfit:
            typer.secho(f"medsd: {result.slide}: {result.misfit}", fg="red", err=True)
        if result.status != "ok":
            print(f"medsd: {result.slide}: {result.status}: {result.reason}", file=sys.stderr)
        elif len(results) <= _LISTED and (words := found(result)):
            print(f"{result.slide}: {words}")
    end(results, see(str(page), page.parent, shard), empty_is_failure=True)


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
    print("captum.NAME: captum's attributions of a layer or an image, such as captum.LayerGradCam")
    print("mask: the masks of a network that masks itself (AIM)")


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Image files (PNG, JPEG, TIFF, WebP), or folders of them.")],
    weights: Annotated[Path, typer.Option(help="A classifier or an encoder that medsd wrote (.safetensors).")],
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
    explained: Annotated[
        str, typer.Option(help="What is explained: evidence for the class above the others, or its logit.")
    ] = "evidence",
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
    from medsd.checks import check_choice
    from medsd.explain.explain import explain_images
    from medsd.explain.settings import ExplainSettings, ImageSmoothing, method_names
    from medsd.progress import progress_bar
    from medsd.saliency.method import Output

    check_choice("explained", explained, get_args(Output))  # a bundle calls it 'output'
    kind, output = cast(ImageSmoothing, smoothing), cast(Output, explained)
    trained = str(surrogate) if surrogate else None
    settings = ExplainSettings(method_names(methods), layer, target, kind, trained, output, measured)
    summary = explain_images(images, weights, out, settings, masks, computing_on(device), progress_bar("explain"))
    if words := summary.in_words():
        print(words)
    failed = f", {len(summary.failed)} failed" if summary.failed else ""
    print(f"{summary.images} image(s){failed}; see {out}")
    if summary.failed:
        raise typer.Exit(1)
