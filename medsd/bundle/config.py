"""Mistakes in a configuration, found before anything runs and told in one line."""

from __future__ import annotations

import functools
import inspect
import json
import pydoc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from monai.bundle import ConfigParser, ConfigWorkflow

from medsd.errors import ConfigError, MedsdError, nearest

P = ParamSpec("P")
T = TypeVar("T")

_REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*)")
# Keys that MONAI itself looks up or adds (metadata, experiment tracking).
_MONAI_KEYS = {
    "_meta_",
    "imports",
    "bundle_root",
    "initialize",
    "run",
    "finalize",
    "tracking_uri",
    "experiment_name",
    "run_name",
    "save_execute_config",
    "is_not_rank0",
}


def boundary(function: Callable[P, T]) -> Callable[P, T]:
    """End the program with one line and exit code 1 when `function` raises a `MedsdError`.

    MONAI wraps every exception in others of its own; only `SystemExit` passes through it untouched.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except MedsdError as error:
            raise SystemExit(f"medsd: {error}") from error

    return guarded


@boundary
def check_config(base_file: str) -> None:
    """Refuse keys that nothing uses and arguments that a factory does not take; name the nearest known one.

    MONAI adds a misspelt key silently. Called from a bundle's `initialize`, it looks at the merged configuration of
    the running workflow.

    Args:
        base_file: the bundle's own file, whose keys are known.

    Raises:
        SystemExit: a key or argument is unknown (the message is a `ConfigError`'s).
    """
    config = _running_parser().get()
    known = set(_MONAI_KEYS) | set(_load(base_file))
    for text in _strings(config):
        known.update(_REFERENCE.findall(text))
    for key in config:
        if key not in known:
            raise ConfigError(f"config key '{key}': nothing uses it{nearest(key, known)}")
    for key, component in _components(config, ""):
        _check_arguments(key, component)


def _running_parser() -> ConfigParser:
    """The parser of the workflow that is evaluating us; MONAI hands its expressions no reference to it."""
    frame = inspect.currentframe()
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow.parser
        frame = frame.f_back
    raise ConfigError("check_config was called outside a MONAI workflow; call it from 'initialize'")


def _load(path: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; run from the repository or set bundle_root to it") from error
    return content


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _strings(value)


def _components(config: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every `{"_target_": "medsd..."}` with its key."""
    if isinstance(config, dict):
        if str(config.get("_target_", "")).startswith("medsd."):
            yield key, config
        for name, value in config.items():
            yield from _components(value, f"{key}::{name}" if key else name)
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _components(value, f"{key}::{number}")


def _check_arguments(key: str, component: dict[str, Any]) -> None:
    target = component["_target_"]
    factory = pydoc.locate(target)
    if not callable(factory):
        raise ConfigError(f"config key '{key}': medsd has no '{target}'")
    taken = inspect.signature(factory).parameters
    for argument in component:
        if not argument.startswith("_") and argument not in taken:
            raise ConfigError(
                f"config key '{key}::{argument}': {target} takes no such argument{nearest(argument, taken)}"
            )
