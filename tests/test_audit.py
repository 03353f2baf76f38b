"""What configurations would run: ours are known, and what attacks have tried is not; nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medsd.audit import audit, lines_of
from medsd.errors import ConfigError

ROOT = Path(__file__).parents[1]


def unknown(tmp_path: Path, **config: Any) -> list[tuple[str, str]]:
    (tmp_path / "a.json").write_text(json.dumps(config))
    return [(finding.key, finding.unknown) for finding in audit([tmp_path]) if finding.unknown]


def test_our_own_bundles_are_known() -> None:
    found = audit([ROOT / "bundles", ROOT / "configs"])
    assert [line for line, finding in zip(lines_of(found), found, strict=True) if finding.unknown] == []
    assert sum(finding.text.startswith("$") for finding in found) > 70
    assert sum(finding.key.endswith("_target_") for finding in found) > 40
    assert any(finding.key == "handler_console::args" for finding in found)


@pytest.mark.parametrize(
    "expression",
    [
        "$__import__('os').system('true')",
        "$import os",
        "$import os as torch",
        "$from os import system",
        "$torch.os.system('true')",
        "$monai.bundle.run('a')",
        "$torch.load('a.pt')",
        "$torch.hub.load('a', 'b')",
        "$bundle.stages.json",
        "$bundle.prepare.__globals__",
        "$(lambda: 0).__code__",
        "$(x for x in ()).gi_frame.f_back.f_builtins['eval']('1')",
        "$'{0.__class__}'.format(@data)",
        "$f'{@data!r}'",
        "$[c for c in ().__class__.__base__.__subclasses__()]",
        "$eval('1')",
        "$[eval][0]('1')",
        "$@data.network.os.system('true')",
        "$[print][0]('a')",
        "$@network.load_state_dict(1)",
        "$(x := 1)",
        "$1 +",
        "$" + "(" * 5000 + ")" * 5000,
        "$open('a', 'w')",
        "$lambda output: output.__class__",
        "$np.load('a.npy', allow_pickle=True)",
    ],
)
def test_an_expression_that_could_do_anything_is_listed(tmp_path: Path, expression: str) -> None:
    imports = ["$import medsd.bundle as bundle"]
    assert [key for key, _ in unknown(tmp_path, imports=imports, a={"b": [expression]})] == ["a::b::0"]


def test_an_alias_is_what_was_imported(tmp_path: Path) -> None:
    found = unknown(tmp_path, imports=["$import os as bundle"], run=["$bundle.prepare(@data)"])
    assert found == [
        ("imports::0", "imports what is not on the list"), ("run::0", "os.prepare is not on the list")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "medsd.files.os.system",
        "medsd.files.hashlib",
        "medsd.files.write_text",
        "medsd.cli.sys.exit",
        "medsd.._x.y",
        "torch.hub.load",
        "torch.load",
        "torch.utils.data.DataLoader.x",
        "builtins.eval",
        "CheckpointLoader",
        "$eval",
        7,
    ],
)
def test_a_component_that_is_not_on_the_list_is_listed(tmp_path: Path, target: Any) -> None:
    assert unknown(tmp_path, a={"_target_": target})[0][0] == "a::_target_"


def test_other_doors_are_listed(tmp_path: Path) -> None:
    assert unknown(tmp_path, a={"_target_": "ROCAUC", "_mode_": "debug"})[0][0] == "a::_mode_"
    assert unknown(tmp_path, a="%other.json::key")[0][0] == "a"
    for name in ("model.pt", "torch.py", "index.npz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    (tmp_path / "d.conf").write_text(
        "[handler_a]\nclass=__import__('os').system('true')\nargs=(open('x'),)\n[handler_b]\nargs=('a.log', 'w')\n"
    )
    found = {(finding.path.name, finding.key) for finding in audit([tmp_path]) if finding.unknown}
    assert found == {
        ("a.json", "a"), ("model.pt", ""), ("torch.py", ""), ("index.npz", ""), ("b.json", ""), ("c.yaml", ""),
        ("d.conf", "handler_a::class"), ("d.conf", "handler_a::args"),
    }  # fmt: skip


def test_nothing_to_look_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration in it"):
        audit([tmp_path])
    with pytest.raises(ConfigError, match="no such file"):
        audit([tmp_path / "nowhere"])


def test_a_bomb_of_aliases_ends(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (tmp_path / "a.yaml").write_text(text)
    assert audit([tmp_path])[-1].unknown == "more than 100,000 values"
