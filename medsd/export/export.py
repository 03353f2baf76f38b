"""One door to all kinds of exports: what is written follows from the name that it gets."""

from __future__ import annotations

from pathlib import Path

from medsd.errors import ConfigError
from medsd.export.onnx import check_onnx, write_onnx
from medsd.export.portable import portable
from medsd.export.source import TrainedClassifier, open_trained
from medsd.export.torchscript import write_torchscript
from medsd.export.wsinfer import write_wsinfer
from medsd.export.zoo import write_zoo
from medsd.files import check_new

_WRITERS = {".onnx": write_onnx, ".ts": write_torchscript}


def export_run(run: str | Path, out: str | Path, wsinfer: bool = False, license_file: str | Path | None = None) -> str:
    """Write what a run trained, for others to run.

    Args:
        run: a run's output folder, see `open_trained`, or one weights file.
        out: `.zip` for a bundle (`write_zoo`), `.onnx` (`write_onnx`), `.ts` for TorchScript (`write_torchscript`).
        wsinfer: `out` is a folder for WSInfer instead, see `write_wsinfer`.
        license_file: licence of the weights, for a bundle.

    Returns:
        what was made, in words.

    Raises:
        ConfigError: an unknown ending, a licence for what has no place for it, or weights that cannot become this.
        OutputError: there is something at `out`, which is left as it is, or it cannot be written to.
        WeightsError, NetworkError: weights that cannot be used, or a network that cannot become this.
    """
    run, out = Path(run), Path(out)
    kind = "wsinfer" if wsinfer else out.suffix.lower()
    if kind not in ("wsinfer", ".zip", *_WRITERS):
        raise ConfigError(f"{out}: what to write? Let it end in .zip (a bundle), .onnx or .ts, or add --wsinfer")
    if license_file is not None and kind != ".zip":
        raise ConfigError("license: only a bundle (.zip) has a place for it; leave it out")
    check_new(out)
    if kind == ".onnx":
        check_onnx()
    trained = open_trained(run)
    made = f"{trained.path} in {out}"
    if kind == "wsinfer":
        write_wsinfer(out, trained)
        return f"{made}: torchscript_model.pt and config.json, for WSInfer; see docs/qupath.md"
    if kind == ".zip":
        license_path = None if license_file is None else Path(license_file)
        names = write_zoo(out, trained, run if run.is_dir() else None, license_path)
        without = "" if "configs/train.json" in names else "; without configs/train.json, which the run did not keep"
        return f"{made}: a MONAI bundle of {len(names)} files{without}"
    _WRITERS[kind](out, portable(trained))
    stain = isinstance(trained, TrainedClassifier) and trained.card.stain_target is not None
    return f"{made}{'; normalise tiles to the stain in its description first' if stain else ''}"
