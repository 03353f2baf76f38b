"""Do maps change when the network forgets what it has learnt? The cascade of Adebayo et al. 2018 (arXiv 1810.03292).

Compare the stages' maps with the first by `agreement`. Label-free maps must change too; that they do not change with
the class is another matter, which this test does not see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import ConfigError, NetworkError
from medsd.networks.modes import layer_named
from medsd.saliency.method import Method, Target
from medsd.saliency.metrics.scoring import held_target

_NONE, _ALL = "none", "all"
# What timm's modules start those weights with that they cannot draw: layer scales, GRN, StarReLU, a temperature.
_STARTS = {
    "ConvNeXtBlock": {"gamma": 1e-6},
    "ConvBlock": {"gamma": 1e-6},
    "SplitTransposeBlock": {"gamma": 1e-6, "gamma_xca": 1e-6},
    "CrossCovarianceAttn": {"temperature": 1.0},
    "GlobalResponseNorm": {"weight": 0.0, "bias": 0.0},
    "Scale": {"scale": 1.0},
    "StarReLU": {"scale": 1.0, "bias": 0.0},
}


@dataclass(frozen=True)
class CascadeStage:
    """Maps after the weights of a stage, and of all before it, were drawn anew.

    Attributes:
        name: "none" (nothing is random yet), a module's name, or "all".
        maps: (B, h, w), float32, signed.
    """

    name: str
    maps: Tensor


def randomised_cascade(
    network: nn.Module,
    method_builder: Callable[[nn.Module], Method],
    x: Tensor,
    target: Target = None,
    stages: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[CascadeStage, ...]:
    """Maps of the network as it is, then as its stages are randomised one after the other, from the top down.

    Weights are drawn by each module's own `reset_parameters`: torch's default, whatever scheme its library starts a new
    network with; what a module without it owns (a transformer's class token and places) by its `init_weights`, timm's,
    or, where that is no draw (layer scales, GRN), what timm starts it with. Buffers (running statistics of BatchNorm)
    are kept until the last stage, "all", which draws every module anew together with them: the order of Smooth Deep
    Saliency (arXiv 2404.02282). The classes are those of the network as it is, in every stage.

    A copy is randomised, on the CPU, so that a seed means the same on every device; the network and the state of
    torch's generators are left alone.

    Args:
        network: gives logits (B, K), or for label-free methods anything.
        method_builder: makes the method for a network, such as `lambda copy: Gradient(copy, "layer2")`.
        x: (B, C, H, W) float images, as the network takes them.
        target: class numbers; None is the class that the network predicts for each image.
        stages: names of modules, from the top; the network's children that have weights, last first, when None. Of a
            network of encoder and head give finer ones: `("head", "encoder.layer4", "encoder.layer3", ...)`.
        seed: of the weights.

    Raises:
        ConfigError: no stages, one named twice, or a seed below 0.
        NetworkError: no such module, one without weights, or weights that their module cannot draw anew.
    """
    names = _default_stages(network) if stages is None else tuple(stages)
    check_number("seed", seed, "[0, inf)", whole=True)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"stages={names}: name at least one module, none of them twice")
    for name in names:
        _check_resets(layer_named(network, name), name)
    _check_resets(network, "")
    target = held_target(network, x, target)
    random = copy.deepcopy(network)
    cascade = [CascadeStage(_NONE, method_builder(random)(x, target))]
    for number, name in enumerate((*names, _ALL)):
        last = name == _ALL and number == len(names)
        _randomise(random, random if last else layer_named(random, name), seed + number, keep_buffers=not last)
        cascade.append(CascadeStage(name, method_builder(random)(x, target)))
    return tuple(cascade)


def _default_stages(network: nn.Module) -> tuple[str, ...]:
    """Names of the children that have weights, from the last to the first."""
    return tuple(name for name, child in reversed(list(network.named_children())) if _has_any(child.parameters()))


def _check_resets(part: nn.Module, name: str) -> None:
    """Raises NetworkError: no weights, or a module that cannot draw its own anew."""
    if not _has_any(part.parameters()):
        raise NetworkError(f"stage '{name}': has no weights to randomise; leave it out")
    for inner, module in part.named_modules(prefix=name):
        if _has_any(module.parameters(recurse=False)) and _reset_of(module) is None:
            raise NetworkError(
                f"'{inner}' ({type(module).__name__}): has weights but no reset_parameters(); give it one that draws "
                "them anew"
            )


def _randomise(network: nn.Module, part: nn.Module, seed: int, keep_buffers: bool) -> None:
    """Draw the weights of `part` anew, in place; `network` holds it."""
    device = next(network.parameters()).device
    network.cpu()
    kept = {name: buffer.clone() for name, buffer in part.named_buffers()}
    # Only the CPU's generator is used and put back: torch.manual_seed would seed the other devices for good.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in part.modules():
            if (reset := _reset_of(module)) is not None:
                reset()
        if keep_buffers:
            for name, buffer in part.named_buffers():
                buffer.copy_(kept[name])
    network.to(device)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """What draws a module's weights anew; of parents that draw their children's, too, those come after them."""
    own = _has_any(module.parameters(recurse=False))
    for name in ("reset_parameters", *(["init_weights"] if own else [])):
        reset = getattr(module, name, None)
        if callable(reset):
            return cast("Callable[[], object]", reset)
    return _start_of(module)


def _start_of(module: nn.Module) -> Callable[[], object] | None:
    """What puts a module of timm's back to the numbers that it starts with; None where they are not known."""
    starts = _STARTS.get(type(module).__name__, {}) if type(module).__module__.startswith("timm.") else {}
    own = dict(module.named_parameters(recurse=False))
    if not own or own.keys() - starts.keys():
        return None

    def reset() -> None:
        for name, parameter in own.items():
            parameter.fill_(starts[name])

    return reset


def _has_any(parameters: Iterable[nn.Parameter]) -> bool:
    return next(iter(parameters), None) is not None
