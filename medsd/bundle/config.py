"""Mistakes in a configuration, found before anything runs, and mistakes of any kind told in one line."""

from __future__ import annotations

import inspect
import logging
import pydoc
import re
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any

import fire
import monai.bundle
from monai.bundle import ConfigParser

from medsd.checks import check_number
from medsd.errors import ConfigError, MedsdError, nearest

logger = logging.getLogger(__name__)

_REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*(?:::\w+)*)")
# Keys that MONAI itself looks up or adds (metadata, experiment tracking).
_MONAI_KEYS = {"_meta_", "imports", "bundle_root", "initialize", "run", "finalize", "tracking_uri", "experiment_name"}
_MONAI_KEYS |= {"run_name", "save_execute_config", "is_not_rank0", "_desc_"}
# Dictionaries of plain values, whose names are checked by what takes them; in words how they come about.
_PLAIN = {"stain_target": ", as medsd stain writes them", "encoder_options": ""}


def check(seed: int = 0) -> None:
    """First of a bundle's `initialize`: check the command line's configuration, then tell any mistake in one line.

    The seed is the bundle's, of which numpy takes no negative one.

    MONAI hands its expressions no reference to the running workflow. `python -m monai.bundle run` leaves its arguments
    in `sys.argv`, so they are read once more, by the parser and the merging that MONAI uses. In a process that runs a
    workflow by itself there is no such command line: it calls `check_config` with what it gives the workflow, and finds
    a mistake in a chain of MONAI's exceptions with `mistake`.

    Raises:
        ConfigError: see `check_config`; or a seed outside 0 to 1e18.
    """
    given = _command_line()
    if given is not None:
        sys.excepthook = _tell  # of a process of MONAI's own; anybody else's stays
        check_config(given.pop("config_file"), given.pop("run_id", "run"), **given)
    check_number("seed", seed, "[0, 1e18]", whole=True)


def command_config() -> dict[str, Any] | None:
    """The configuration of the command line: its files merged, with what was set; None where there is none.

    References and expressions are as they were written.
    """
    given = _command_line()
    if given is None:
        return None
    given.pop("run_id", None)
    parser = ConfigParser()
    parser.read_config(given.pop("config_file"))
    parser.update(given)
    return {name: value for name, value in deepcopy(parser.get()).items() if name != "_meta_"}


def _command_line() -> dict[str, Any] | None:
    """What `python -m monai.bundle run` was given: config_file, run_id, and overrides by key."""
    command = sys.argv[1:]
    if Path(sys.argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or command[:1] != ["run"]:
        return None
    given: dict[str, Any] = {}

    def run(*words: Any, **named: Any) -> None:
        given.update(inspect.signature(monai.bundle.run).bind(*words, **named).arguments)

    fire.Fire({"run": run}, command=command)
    overrides = given.pop("override", {})
    given = monai.bundle.update_kwargs(given.pop("args_file", None), **given, **overrides)
    # MONAI has left these out, see `_check_kind`.
    given |= {key: None for key, value in overrides.items() if value is None}
    for name in inspect.signature(monai.bundle.run).parameters.keys() - {"config_file", "run_id", "override"}:
        given.pop(name, None)
    return given


def check_config(files: str | list[str], stage: str = "run", **overrides: Any) -> None:
    """Refuse keys that nothing uses, arguments that a component does not take, and values of the wrong kind.

    MONAI adds a misspelt key silently. A key that a laid file sets in vain, since what used it is not in this bundle or
    was replaced, is told in a warning.

    Args:
        files: the bundle's file and what is laid on it.
        stage: the run list.
        overrides: values by key, as on the command line.

    Raises:
        ConfigError: a key, argument or stage is unknown (the nearest is named), or a value is of another kind than the
            one it replaces.

    Example:
        >>> check_config("bundles/camelyon.json", max_epoch=3)
        Traceback (most recent call last):
        medsd.errors.ConfigError: config key 'max_epoch': nothing uses it; did you mean 'max_epochs'?
    """
    parser = ConfigParser()
    parser.read_config(files)
    written = deepcopy(parser.get())
    overrides = {key.replace("#", "::"): value for key, value in overrides.items()}
    parser.update(overrides)
    config = parser.get()
    stages = [key for key, value in config.items() if isinstance(value, list)]
    if stage not in config:
        raise ConfigError(f"stage '{stage}': this bundle has none of that name{nearest(stage, stages)}")
    used = {reference for text in _strings(config) for reference in _REFERENCE.findall(text)}
    used |= {reference.split("::")[0] for reference in used} | _MONAI_KEYS
    base = ConfigParser.load_config_file(files if isinstance(files, str) else files[0])
    known = used | set(_keys(base))
    for key in _keys(config):
        if key not in known:
            raise ConfigError(f"config key '{key}': nothing uses it{nearest(key, known)}")
    for file in [] if isinstance(files, str) else files[1:]:
        for key in ConfigParser.load_config_file(file):
            if re.fullmatch(r"\w+", key) and key not in used and key not in stages:
                logger.warning("%s: its '%s' does nothing here, nothing that is left uses it", file, key)
    for key, value in overrides.items():
        if "::" not in key and key not in used and key not in stages:
            raise ConfigError(f"config key '{key}': what used it was replaced by another file; leave it out")
        _check_kind(key, ConfigParser(written).get(key), value)
    for name, words in _PLAIN.items():
        for key, text in _evaluated(config.get(name), name):
            raise ConfigError(f"config key '{key}': {text!r} would be run; give plain values{words}")
    for key, component in _components(config):
        _check_arguments(key, component, parser)


def mistake(error: BaseException | None) -> str | None:
    """The line that tells a user's mistake, wherever it is in the chain of exceptions; None where there is none.

    Also what torch, MONAI or ignite say of a value that a component was given, or of a package that it lacks.
    """
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for found in chain:
        if isinstance(found, MedsdError):
            # A DataLoader worker's error comes with its traceback; the last line is the message.
            last = str(found).strip().splitlines()[-1]
            return last.removeprefix(f"{type(found).__module__}.{type(found).__name__}: ")
    failed = r"Failed to instantiate component '([\w.]+)' with keywords: ([\w,]*)"
    built = re.match(failed, str(chain[-2])) if len(chain) > 1 else None
    # MONAI's parts tell of a package that is not there by a RuntimeError, which from our own would be a bug.
    told = (ValueError, TypeError, ImportError, *([] if not built or built[1].startswith("medsd.") else [RuntimeError]))
    if built and isinstance(chain[-1], told):
        # Of a value of another kind Python does not say whose it is.
        given = f"; check {built[2].replace(',', ', ')}" if isinstance(chain[-1], TypeError) else ""
        return f"{built[1]}: {' '.join(str(chain[-1]).split())}{given}"
    return None


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    line = mistake(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"medsd: {line}\n")


def _check_kind(key: str, before: Any, value: Any) -> None:
    """Fire reads 2024_05 as a number and 0,5 as a pair; `false` stays a text, which is true; MONAI drops None."""
    if value is None and before is not None:
        raise ConfigError(f"{key}=None: MONAI takes that for not given; write --{key} '$None'")
    if isinstance(value, str) and value[:1] in ("@", "$", "%"):
        return
    path = key.endswith(("_dir", "_root", "_weights")) and value is not None
    if path or (isinstance(before, str) and before[:1] not in ("@", "$", "%")):
        kinds: tuple[type, ...] = (str,)
        words = f"text; a name like a number is put in quotes twice, --{key} \"'2024'\""
    elif isinstance(before, bool):
        kinds, words = (bool,), "True or False"
    elif isinstance(before, int):
        kinds, words = (int,), "a whole number"
    elif isinstance(before, float):
        kinds, words = (int, float), "a number, with a point before decimals"
    elif isinstance(before, list):
        kinds, words = (list, tuple), "a list, such as \"['a','b']\""
    elif isinstance(before, dict):
        kinds, words = (dict,), "a dictionary, such as \"{'a': 1}\""
    else:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{key}={value!r}: must be {words}")


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _strings(value)


def _evaluated(config: Any, key: str) -> Iterator[tuple[str, str]]:
    """Where a value is anything that MONAI resolves, and what."""
    if isinstance(config, str) and config[:1] in ("$", "@", "%"):
        yield key, config
    elif isinstance(config, dict | list):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            if name == "_target_":
                yield f"{key}::{name}", str(value)
            yield from _evaluated(value, f"{key}::{name}")


def _keys(config: Any, within: str = "") -> Iterator[str]:
    """Keys of plain dictionaries at any depth, full ids; a component's arguments are judged by its signature."""
    if isinstance(config, dict) and "_target_" not in config:
        for name, value in config.items():
            yield f"{within}{name}"
            if name not in ("_meta_", *_PLAIN):
                yield from _keys(value, f"{within}{name}::")


def _components(config: Any, within: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every `{"_target_": ...}` with its key."""
    if isinstance(config, dict) and "_target_" in config:
        yield within.removesuffix("::"), config
    if isinstance(config, dict | list):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from _components(value, f"{within}{name}::")


def _check_arguments(key: str, component: Mapping[str, Any], parser: ConfigParser) -> None:
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
