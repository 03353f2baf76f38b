"""Methods by name: each is what its card says, and a misspelt one is answered with the nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mypy.api
import pytest
import torch
from torch import nn

from medsd.errors import ConfigError, NetworkError
from medsd.saliency.registry import METHODS, make_method, table

NAMES = (
    "gradient gradient_x_activation deeplift integrated_gradients gradcam smoothgrad eigencam eigencam_reference "
    "multivec_eigencam tsm mtsm mtsm_b mean_map channel_energy"
)
CLASS_METHODS = [name for name, card in METHODS.items() if card.needs_label]


ROOT = Path(__file__).parents[2]
USER = """
from torch import Tensor, nn

from medsd.saliency.deeplift import DeepLift
from medsd.saliency.method import ClassMethod
from medsd.saliency.registry import make_method


def attributions(network: nn.Module, images: Tensor) -> Tensor:
    method = make_method("deeplift", network)
    assert isinstance(method, ClassMethod)
    return method.attribute(images) + DeepLift(network).explain(images).logits
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_the_names_are_these() -> None:
    assert list(METHODS) == NAMES.split()
    assert all(name == card.name for name, card in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_for_its_network_layer_and_output(name: str) -> None:
    made = network()
    method = make_method(name, made, "0", "evidence")
    assert method.network is made
    assert method.layer == "0"
    assert getattr(method, "output", "evidence") == "evidence"


@pytest.mark.parametrize("name", METHODS)
def test_the_card_tells_what_the_method_needs(name: str) -> None:
    """Logits or any output; backward passes; both signs; the number of forward passes."""
    card, made = METHODS[name], network()
    x = torch.randn(2, 3, 8, 8)
    forward: list[int] = []
    backward: list[int] = []
    with (
        made.register_forward_pre_hook(lambda _module, inputs: forward.append(len(inputs[0]))),
        made[1].register_forward_pre_hook(lambda _module, inputs: counted(inputs[0], backward)),
    ):
        maps = make_method(name, made, "0")(x, 1)
    words = card.cost.replace(",", "").split()
    assert sum(forward) == int(words[0]) * len(x)
    assert sum(backward) == (int(words[2]) * len(x) if card.needs_gradient else 0)
    assert bool((maps < 0).any()) == card.signed
    encoder = made[:2]
    if card.needs_label:
        with pytest.raises(NetworkError, match="class methods need logits"):
            make_method(name, encoder, "0")(x)
    else:
        assert torch.equal(make_method(name, encoder, "0")(x), make_method(name, made, "0")(x, 2))


def counted(x: torch.Tensor, backward: list[int]) -> tuple[torch.Tensor] | None:
    """Counts the images whose gradient comes by."""
    if not x.requires_grad:
        return None
    x = x.view_as(x)
    x.register_hook(lambda gradient: backward.append(int((gradient.flatten(1) != 0).any(dim=1).sum())))
    return (x,)


@pytest.mark.parametrize("name", CLASS_METHODS)
def test_the_output_is_handed_on(name: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    logit, evidence = (make_method(name, network(), "0", output)(x, 1) for output in ("logit", "evidence"))
    assert not torch.allclose(logit, evidence)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_can_explain_the_input_goes_without_a_layer(name: str) -> None:
    if METHODS[name].at_input:
        assert make_method(name, network())(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8)
    else:
        with pytest.raises(ConfigError, match=f"layer: method '{name}' needs a hidden layer"):
            make_method(name, network())


def test_options_reach_the_method() -> None:
    x = torch.randn(1, 3, 8, 8)
    assert make_method("smoothgrad", network(), "0", options={"samples": 3}).samples == 3
    halved, whole = (make_method("mtsm", network(), "0", options=options)(x) for options in ({"ranks": "half"}, None))
    assert not torch.allclose(halved, whole)
    with pytest.raises(ConfigError, match="method 'mtsm': no option 'rank'; did you mean 'ranks'"):
        make_method("mtsm", network(), "0", options={"rank": "half"})
    with pytest.raises(ConfigError, match="method 'gradient': no option 'steps'; it has none"):
        make_method("gradient", network(), options={"steps": 3})


def test_what_is_not_known_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"method 'grad_cam': use one of .*; did you mean 'gradcam'") as error:
        make_method("grad_cam", network(), "0")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"output='logits': .*did you mean 'logit'"):
        make_method("mean_map", network(), "0", "logits")  # type: ignore[arg-type]


def test_type_checkers_know_what_the_docstring_says(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    cache = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    said, errors, status = mypy.api.run([*cache, str(tmp_path / "user.py")])
    assert not status, said + errors


def test_the_table_has_a_row_a_method() -> None:
    head, *rows = table()
    assert [row[0] for row in rows] == list(METHODS)
    assert {len(row) for row in rows} == {len(head)}
    assert all(all(cell for cell in row) for row in rows)


def test_the_table_is_there_at_once() -> None:
    code = "import sys; from medsd.saliency.registry import table; table(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
