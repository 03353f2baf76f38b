"""TorchScript files: traced, compared with the network, with a description inside."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.export.portable import DESCRIPTION, Portable, differences
from medsd.files import atomic_path

_TOLERANCE = 1e-5


def write_torchscript(path: str | Path, network: Portable) -> None:
    """Write a network as TorchScript, atomically; its description is the extra file "medsd.json".

    Raises:
        NetworkError: traced, the network gives other answers.
        OutputError: the file cannot be written.
    """
    examples = network.examples(network.sizes)
    traced, sizes = trace(network.module, examples), network.sizes
    try:
        check_traced(traced, network.module, examples)
    except (NetworkError, RuntimeError):  # what a trace made of one size may not fit another
        sizes, examples = "as given", network.examples("as given")
        traced = trace(network.module, examples)
        check_traced(traced, network.module, examples)
    description = json.dumps(network.described(sizes), indent=2)
    with atomic_path(path) as temporary:
        temporary.write_bytes(torchscript_bytes(traced, {f"{DESCRIPTION}.json": description}))


def trace(module: nn.Module, examples: Sequence[Tensor]) -> torch.jit.ScriptModule:
    """The module in TorchScript, traced with the first batch."""
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is what QuPath, WSInfer and MONAI's bundles run, deprecated or not; that a trace keeps what
        # Python decided is looked into by `check_traced`.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit")
        warnings.filterwarnings("ignore", message=".*might not generalize|.*trace")
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            module, examples[0], check_trace=False
        )
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def check_traced(traced: torch.jit.ScriptModule, module: nn.Module, examples: Sequence[Tensor]) -> None:
    """Raises NetworkError: on one of the batches the two give answers that differ by more than 1e-5."""
    for images in examples:
        with torch.inference_mode():
            answers, expected = traced(images), module(images)
        if isinstance(expected, Tensor):
            answers, expected = (answers,), (expected,)
        apart = differences(answers, expected)
        if not apart <= _TOLERANCE:
            raise NetworkError(f"TorchScript: on images {tuple(images.shape)} its answers differ by {apart:.1g}")


def torchscript_bytes(traced: torch.jit.ScriptModule, extra_files: Mapping[str, str]) -> bytes:
    """The file, as bytes; without the places of sources on this machine, which torch keeps for its error messages."""
    first, bare, last = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit")
        torch.jit.save(traced, first)
        with zipfile.ZipFile(first) as written, zipfile.ZipFile(bare, "w") as kept:
            for name in written.namelist():
                if not name.endswith(".debug_pkl"):
                    kept.writestr(name, written.read(name))
        bare.seek(0)
        loaded = torch.jit.load(bare)  # type: ignore[no-untyped-call]
        torch.jit.save(loaded, last, dict(extra_files))
    return last.getvalue()
