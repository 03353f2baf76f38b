"""What a bundle's configuration would run, read without running any of it.

MONAI evaluates every text that begins with `$` and calls every `_target_`; Python's logging evaluates parts of its
configuration; pickles run code when they are loaded. What is here not known to be harmless is unknown, not bad.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from medsd.errors import ConfigError
from medsd.files import json_of

_CONFIGS, _LOGGING = (".json", ".yaml", ".yml"), (".conf", ".ini")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".ts")
_MOST_BYTES, _MOST_VALUES, _MOST_FILES = 10 * 2**20, 100_000, 10_000

# What MONAI gives expressions by itself.
_GIVEN = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}
_MODULES = {"medsd.bundle", "medsd.explain.settings", "ignite.distributed", "torch", "numpy", "monai"}
_CALLS = {
    "ignite.distributed.finalize",
    "ignite.distributed.get_rank",
    "monai.handlers.from_engine",
    "monai.utils.set_determinism",
    "torch.cuda.is_available",
    "torch.device",
    "torch.nn.functional.one_hot",
}
_BUILTINS = {
    "abs",
    "bool",
    "dict",
    "float",
    "int",
    "len",
    "list",
    "max",
    "min",
    "print",
    "range",
    "round",
    "str",
    "sum",
}
# Of values, which may be anything: no attribute that leads to a module or to a frame.
_ATTRIBUTES = {"metrics", "network", "parameters", "part", "requires_grad", "run", "softmax", "state", "tiles"}
_ATTRIBUTES |= {"unlabelled"}
_TARGETS = re.compile(
    r"torch\.optim\.[A-Z]\w*|torch\.optim\.lr_scheduler\.[A-Z]\w*|torch\.utils\.data\.DataLoader|torch\.nn\.[A-Z]\w*"
    r"|ignite\.handlers\.EarlyStopping|AsDiscreted|ClassificationSaver|Compose|DiceCELoss"
    r"|LrScheduleHandler|MLFlowHandler|MeanDice|ROCAUC|SimpleInferer|StatsHandler|SupervisedEvaluator"
    r"|SupervisedTrainer|TensorBoardStatsHandler|ValidationHandler"
)
# Of medsd all classes, whose making leaves no trace, and these; others write files where they are told to.
_FUNCTIONS = {
    "medsd.bundle.inference.filled",
    "medsd.training.distributed.start_processes",
    "medsd.training.network.on_device",
    "medsd.training.network.parameter_groups",
    "medsd.training.network.ready_to_train",
}
_REFERENCE = re.compile(r"@[A-Za-z_]\w*(?:(?:::|#)\w+)*")
_HANDLERS = {"StreamHandler", "FileHandler", "logging.StreamHandler", "logging.FileHandler"}
_STREAMS = {"(sys.stdout,)", "(sys.stderr,)"}
_PLAIN = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Call, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.List, ast.Tuple, ast.Dict, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.comprehension),
    *(ast.Lambda, ast.arguments, ast.arg, ast.expr_context),
)


@dataclass(frozen=True)
class Finding:
    """Something that a configuration would run.

    Attributes:
        path: the file.
        key: where in it, as MONAI writes keys (`train::step`); of logging, section and option.
        text: what would be run.
        unknown: why it is not known to be harmless; empty where it is.
    """

    path: Path
    key: str
    text: str
    unknown: str = ""


def audit(places: Iterable[str | Path]) -> list[Finding]:
    """All that configurations would run, file by file; nothing of it is run, and no module is imported.

    Known are expressions of references, constants, operators and a few functions, components of medsd, and the classes
    of torch, ignite and MONAI that medsd's own bundles use. Aliases are those of all `imports` given together.

    Args:
        places: files (JSON, YAML, logging's .conf), and folders, in which also pickles and Python files are found.

    Raises:
        ConfigError: a place does not exist, or holds nothing to look at.
    """
    files = list(_files(places))
    configs = {path: _content(path) for path in files if path.suffix.lower() in _CONFIGS}
    aliases = dict(_GIVEN)
    for content in configs.values():
        if isinstance(content, dict):
            aliases |= dict(_aliases(content.get("imports")))
    found: list[Finding] = []
    for path in files:
        if path in configs:
            found += _of_config(path, configs[path], aliases)
        else:
            found += _of_file(path)
    return found


def _files(places: Iterable[str | Path]) -> Iterator[Path]:
    wanted = (*_CONFIGS, *_LOGGING, *_PICKLES, ".py")
    count = 0
    for place in map(Path, places):
        if not place.exists():
            raise ConfigError(f"{place}: no such file or folder; name a bundle's folder or its configuration")
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        chosen = [path for path in inside if path.is_file() and (path == place or path.suffix.lower() in wanted)]
        count += len(chosen)
        if count > _MOST_FILES:
            raise ConfigError(f"{place}: more than {_MOST_FILES:,} files; name the bundle's folder alone")
        if not chosen:
            raise ConfigError(f"{place}: no configuration in it; name a bundle's folder")
        yield from chosen


def _content(path: Path) -> Any:
    """The values of a configuration; of one that cannot be read the reason, as a ValueError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return ValueError("larger than any configuration")
        text = path.read_text("utf-8")
        return json_of(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return ValueError(f"cannot be read ({' '.join(str(error).split())[:100]})")


def _aliases(imports: Any) -> Iterator[tuple[str, str]]:
    for text in imports if isinstance(imports, list) else [imports]:
        node = _import_of(text)
        if isinstance(node, ast.Import):
            yield node.names[0].asname or node.names[0].name, node.names[0].name


def _import_of(text: Any) -> ast.stmt | None:
    if not (isinstance(text, str) and text.startswith("$")):
        return None
    try:
        body = ast.parse(text[1:]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body[0] if body and isinstance(body[0], ast.Import | ast.ImportFrom) else None


def _of_config(path: Path, content: Any, aliases: dict[str, str]) -> Iterator[Finding]:
    if isinstance(content, ValueError):
        yield Finding(path, "", path.name, str(content))
        return
    for number, (key, value) in enumerate(_values(content)):
        if number > _MOST_VALUES:
            yield Finding(path, "", path.name, f"more than {_MOST_VALUES:,} values")
            return
        name = key.rpartition("::")[2]
        if name == "_target_":
            yield Finding(path, key, str(value), "" if _is_target(value) else "calls what is not on the list")
        elif name == "_mode_" and value != "default":
            yield Finding(path, key, str(value), "changes how a component is called; 'debug' opens a debugger")
        if isinstance(value, str) and value.startswith("$"):
            yield Finding(path, key, value, _unknown(value, aliases))
        elif isinstance(value, str) and value.startswith("%") and "::" in value and "." in value.partition("::")[0]:
            yield Finding(path, key, value, "takes a value from another file; look at that one, too")


def _values(content: Any) -> Iterator[tuple[str, Any]]:
    """Every plain value with its key, in order, without recursion: a file may be nested as deep as it likes."""
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{key}::{name}".removeprefix("::"), inner) for name, inner in pairs][::-1]
            yield key, None
        else:
            yield key, value


def _unknown(text: str, aliases: dict[str, str]) -> str:
    """Why an expression is not known to be harmless; empty where it is."""
    imported = _import_of(text)
    if imported is not None:
        if isinstance(imported, ast.Import) and all(name.name in _MODULES for name in imported.names):
            return ""
        return "imports what is not on the list"
    try:
        tree = ast.parse(_REFERENCE.sub("_given", text[1:]).strip(), mode="eval")
        return _first_unknown(tree, aliases)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "cannot be parsed"


def _first_unknown(tree: ast.Expression, aliases: dict[str, str]) -> str:
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {"_given"}
    bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    called = {id(node.func): node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inside: set[int] = set()  # of a function's name, which is judged as a whole
    for node in ast.walk(tree):
        if not isinstance(node, _PLAIN):
            return f"{type(node).__name__} is not on the list"
        if id(node) in inside:
            continue
        name = _dotted(node, aliases, bound)
        if name is not None:
            if id(node) not in called or not _is_function(name):
                return f"{name} is not on the list"
            inside |= {id(part) for part in ast.walk(node)}
        elif isinstance(node, ast.Attribute) and node.attr not in _ATTRIBUTES:
            return f"the attribute {node.attr} is not on the list"
        elif isinstance(node, ast.Name) and node.id not in bound and not (id(node) in called and node.id in _BUILTINS):
            return f"the name {node.id} is not on the list"
        elif id(node) in called and not isinstance(node, ast.Name | ast.Attribute):
            return "calls a value"
    return ""


def _dotted(node: ast.AST, aliases: dict[str, str], bound: set[str]) -> str | None:
    """The full name of what begins with a module; None for everything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id in bound or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


def _is_function(name: str) -> bool:
    module, _, function = name.rpartition(".")
    return name in _CALLS or (module in ("medsd.bundle", "medsd.explain.settings") and function in _defined(module))


def _is_target(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    module, _, name = value.rpartition(".")
    ours = value in _FUNCTIONS or (name[:1].isupper() and value.startswith("medsd."))
    return bool(_TARGETS.fullmatch(value)) or (ours and name in _defined(module))


@cache
def _defined(module: str) -> frozenset[str]:
    """Public functions and classes that a module of medsd defines or lists in `__all__`; none of what it imports."""
    package = importlib.util.find_spec("medsd")
    if package is None or not package.submodule_search_locations or not re.fullmatch(r"medsd(\.[a-z_]\w*)*", module):
        return frozenset()
    place = Path(package.submodule_search_locations[0], *module.split(".")[1:])
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        return frozenset()
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and any(
            isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets
        ):
            names |= set(ast.literal_eval(node.value))
    return frozenset(name for name in names if not name.startswith("_"))


def _of_file(path: Path) -> Iterator[Finding]:
    kind = path.suffix.lower()
    if kind in _LOGGING:
        yield from _of_logging(path)
    elif kind in _PICKLES:
        yield Finding(path, "", path.name, "may be a pickle or hold code, which runs when it is loaded carelessly")
    else:
        yield Finding(path, "", path.name, "Python code; a run from its folder may import it")


def _of_logging(path: Path) -> Iterator[Finding]:
    """Handlers and formatters, whose class and arguments Python's logging evaluates."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text("utf-8"))
    except (OSError, ValueError, configparser.Error) as error:
        yield Finding(path, "", path.name, f"cannot be read ({' '.join(str(error).split())[:100]})")
        return
    for section in parser.sections():
        for option in ("class", "args", "kwargs"):
            text = parser.get(section, option, fallback=None)
            if text is not None:
                known = text in _HANDLERS if option == "class" else text in _STREAMS or _is_literal(text)
                yield Finding(path, f"{section}::{option}", text, "" if known else "logging would evaluate it")


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """A line a finding: `ok` or `??`, file, key, what would be run, and why it is unknown."""
    return [
        f"{'??' if finding.unknown else 'ok'}  {finding.path}  {finding.key}  {finding.text}"
        + (f"  ({finding.unknown})" if finding.unknown else "")
        for finding in findings
    ]
