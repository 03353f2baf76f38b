"""ONNX files: exported by torch, compared with the network by ONNX Runtime, with a description inside."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsd.errors import ConfigError, NetworkError
from medsd.export.portable import DESCRIPTION, INPUT, Portable, Sizes, differences
from medsd.files import atomic_path

logger = logging.getLogger(__name__)

OPSET = 18
_TOLERANCE = 1e-4
_MOST_CELLS = 4096
# Above it protobuf takes no file; weights would lie in a second one.
_MOST_BYTES = 2**31 - 2**20


def check_onnx() -> None:
    """Raises ConfigError: a package that the export needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"ONNX: {package} is missing; pip install 'medsd[export]'") from error


def write_onnx(path: str | Path, network: Portable) -> None:
    """Write a network as ONNX (opset 18), atomically; its description is in the file's metadata under "medsd".

    The batch is of any number; images are of any size, of segmentation networks of sides that are multiples of 32 px,
    or, where the network cannot be exported so, of the size it was trained on; the description and the file's own
    shapes say which. Answers are compared by ONNX Runtime with the network's, at sizes of which one was not exported.

    Raises:
        ConfigError: a package of the extra `export` is missing.
        NetworkError: the network cannot be exported, or the file gives answers that differ by more than 1e-4.
        OutputError: the file cannot be written.
    """
    check_onnx()
    if sum(tensor.numel() * tensor.element_size() for tensor in network.module.state_dict().values()) > _MOST_BYTES:
        raise NetworkError("ONNX: the network has more than 2 GiB of weights, which one file does not take")
    with atomic_path(path) as temporary:
        sizes: Sizes = network.sizes
        try:
            _export(temporary, network, sizes)
        except _Unexported as reason:
            logger.warning("ONNX: images of %d px only (%s)", network.side_px, reason)
            sizes = "as given"
            _export(temporary, network, sizes)


class _Unexported(NetworkError):
    """The network did not become ONNX, or another one."""


def _export(path: Path, network: Portable, sizes: Sizes) -> None:
    examples = network.examples(sizes)
    with _quiet_torch(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's, of its own insides
        try:
            program = torch.onnx.export(
                network.module,
                (examples[0],),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(network.outputs),
                dynamic_shapes=({0: torch.export.Dim("batch"), **_axes(sizes)},),
                verbose=False,
            )
        # Of its own, and whatever Python in the network is stopped by.
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reason = f"{type(error).__name__} {error}".partition("\n")[0][:200]
            raise _Unexported(f"ONNX: torch cannot export this network ({reason})") from error
    assert program is not None
    inside = [node for function in program.model.functions.values() for node in function]
    for node in (*program.model.graph.all_nodes(), *inside):
        node.metadata_props.clear()  # where the sources lie on this machine
    program.model.metadata_props[DESCRIPTION] = json.dumps(network.described(sizes))
    program.model.producer_name = "medsd"
    program.save(path)
    _check(path, network, examples)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without what torch's exporter logs of its own steps; the level is put back."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _axes(sizes: Sizes) -> dict[int, Any]:
    if sizes == "as given":
        return {}
    if sizes == "any":
        return {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    return {axis: 32 * torch.export.Dim(name, min=1, max=_MOST_CELLS) for axis, name in ((2, "rows"), (3, "columns"))}


def _check(path: Path, network: Portable, examples: Sequence[Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for images in examples:
        with torch.inference_mode():
            expected = network.module(images)
        answers = session.run(list(network.outputs), {INPUT: images.numpy()})
        apart = differences([torch.from_numpy(answer) for answer in answers], expected)
        if not apart <= _TOLERANCE:
            raise _Unexported(f"ONNX: on images {tuple(images.shape)} its answers differ by {apart:.1g}")
