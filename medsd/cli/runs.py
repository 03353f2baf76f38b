"""Verbs of finished runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from medsd.cli.app import app


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
        images = run.measures["held_out_images"]
        told = "" if math.isnan(images) else f", on {images:.0f} held-out images"
        print(f"{run.label}: effective rank {rank:.1f} of {dimensions} dimensions{told}")
    print(f"see {out / 'spectrum.md'} and {out / 'spectrum.png'}")


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
