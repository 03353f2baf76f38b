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

_REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*(?:::\w+)*)")
# Keys that MONAI itself looks up or adds (metadata, experiment tracking).
_SEPARATOR = "::"
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
            # A DataLoader worker's error comes with its traceback; the last line is the message.
            line = (
                str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            )
            raise SystemExit(f"medsd: {line}") from error

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
    workflow = _running_workflow()
    config = workflow.parser.get()
    used = {reference for text in _strings(config) for reference in _REFERENCE.findall(text)}
    known = (
        _MONAI_KEYS | set(_keys(_load(base_file), "")) | used | {reference.split(_SEPARATOR)[0] for reference in used}
    )
    if workflow.run_id not in config:
        stages = [key for key, value in config.items() if isinstance(value, list)]
        raise ConfigError(
            f"stage '{workflow.run_id}': this bundle has none of that name{nearest(workflow.run_id, stages)}"
        )
    for key in _keys(config, ""):
        if key not in known:
            raise ConfigError(f"config key '{key}': nothing uses it{nearest(key, known)}")
    for key, component in _components(config, ""):
        _check_arguments(key, component, workflow.parser)


def _running_workflow() -> ConfigWorkflow:
    """The workflow that is evaluating us; MONAI hands its expressions no reference to it."""
    frame = inspect.currentframe()
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
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


def _keys(config: Any, key: str) -> Iterator[str]:
    """Keys of plain dictionaries at any depth, full ids; a component's arguments are judged by its signature."""
    if isinstance(config, dict) and "_target_" not in config:
        for name, value in config.items():
            full = f"{key}{_SEPARATOR}{name}" if key else name
            yield full
            if name not in ("_meta_", "settings", "stain_target"):
                yield from _keys(value, full)


def _components(config: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every `{"_target_": ...}` with its key."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield key, config
        for name, value in config.items():
            yield from _components(value, f"{key}::{name}" if key else name)
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _components(value, f"{key}::{number}")


def _check_arguments(key: str, component: dict[str, Any], parser: ConfigParser) -> None:
    target = str(component["_target_"])
    found = target if "." in target else f"{parser.locator.get_component_module_name(target)}.{target}"
    factory = pydoc.locate(found)
    if not callable(factory):
        raise ConfigError(f"config key '{key}': there is no '{target}'")
    taken = inspect.signature(factory).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for argument in component:
        if not argument.startswith("_") and argument not in taken:
            raise ConfigError(
                f"config key '{key}::{argument}': {target} takes no such argument{nearest(argument, taken)}"
            )
