"""How a network is run and looked into: device, mode, uncompiled, and a layer by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError, nearest
from medsd.networks.symmetry import upright
from medsd.networks.tokens import TokenGrid, token_grid


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, tried out; None for the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: it cannot be used here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device '{device}': cannot be used here ({reason}); try 'cpu', see medsd doctor") from error


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is as it was (frozen BatchNorms stay frozen).

    Raises:
        NetworkError: it has no such mode.
    """
    training = [module for module in network.modules() if module.training]
    try:
        try:
            network.eval()
        except NotImplementedError as error:
            raise NetworkError(
                f"{type(network).__name__}: takes no eval mode, as programs of torch.export; give the network itself"
            ) from error
        yield
    finally:
        for module in training:
            module.training = True


def training(network: nn.Module) -> None:
    """Put the network into training mode, its frozen parts into eval mode.

    A part is frozen when it has parameters and none of them requires a gradient. All of it goes into eval mode (our
    choice): its BatchNorms keep their running statistics and use them, its dropout is off, so that it stays the very
    function it was.
    """
    network.train()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


@contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Inside the block passes leave the network's running statistics as they are, to the bit.

    For passes beside the one that serves images later: what normalises by its batch in training mode does so here, too,
    but what it adds to running averages goes to copies, whatever the kind of module (BatchNorm, also of all processes
    or fused with an activation, whitening). The graph keeps the copies; backward may come after the block.
    """
    kept = [
        (module, name, buffer)
        for module in network.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block, what `torch.compile` compiled runs uncompiled, in the whole process: hooks are seen."""
    # Asking for it takes seconds the first time, and nothing is compiled without that module.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def layer_named(network: nn.Module, name: str) -> nn.Module:
    """The module of that name, as in `named_modules`."""
    modules: dict[str, nn.Module] = dict(network.named_modules())  # scripted networks have no get_submodule
    return modules[full_name(network, name)]


def full_name(network: nn.Module, name: str, inside: str = "", also: Iterable[str] = ()) -> str:
    """A layer's name in the network, given so or, where there is no such one, as its name in the part `inside`.

    Args:
        network: any module.
        name: as in `named_modules`; the network itself is no layer of it.
        inside: the name of a part; "" is the network.
        also: what else could have been meant, for the message.

    Raises:
        NetworkError: there is no such layer, or it is no name; the message names the nearest.
    """
    known = [layer for layer, _ in network.named_modules() if layer]
    if not isinstance(name, str):
        raise NetworkError(f"layer: {type(name).__name__}; give its name, such as '{_name_of(network, name)}'")
    below = f"{inside}." if inside else ""
    for wanted in (name, below + name):
        if wanted in known:
            return wanted
    shown = [layer.removeprefix(below) for layer in known if layer.startswith(below)]
    ends = [layer for layer in shown if name and layer.endswith(f".{name}")]  # of compiled and parallel networks
    hint = f"; did you mean '{ends[0]}'?" if len(ends) == 1 else nearest(name, [*shown, *known, *also])
    raise NetworkError(f"layer '{name}': {type(network).__name__} has no such layer{hint}")


def _name_of(network: nn.Module, module: object) -> str:
    """The module's name in the network, or, as an example, another's."""
    names: list[str] = [name for name, _ in network.named_modules() if name]
    its: list[str] = [name for name, part in network.named_modules() if name and part is module]
    return (its or names[len(names) // 2 :] or ["layer4"])[0]


def map_of_layer(layer: str, output: object, images: Tensor | None = None, grid: TokenGrid | None = None) -> Tensor:
    """A layer's output, if it is a map (B, C, h, w) of a floating type, or tokens (B, N, C) on a grid.

    Swin-like layers give (B, h, w, C). With the images that the network was given they are recognised, as the only
    ones whose second and third axis have the images' proportions and whose third and fourth have not (our choice).
    """
    if grid is not None and isinstance(output, Tensor) and output.ndim == 3 and output.is_floating_point():
        return grid.map_of(layer, output)
    if isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point():
        if images is None or not channels_last(output, images):
            return output
        reason = f"its channels come last, {tuple(output.shape)}"
    else:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        reason = f"it gives {given}"
    raise NetworkError(f"layer '{layer}': {reason}, no map (B, C, h, w); choose a convolutional layer")


def encoded_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """What a timm encoder without pooling gives of its input (B, 3, H, W): a map (B, d, h, w), of tokens or not.

    Raises:
        NetworkError: no map, or a vision transformer that takes images of another size.
    """
    try:
        features = encoder(images)
    except AssertionError as error:  # timm's
        raise NetworkError(f"{type(encoder).__name__}: {' '.join(str(error).split())}") from error
    return map_of_layer("output", features, images, token_grid(encoder, "", images))


def channels_last(output: Tensor, images: Tensor) -> bool:
    """Whether maps of images (B, 3, H, W) are (B, h, w, C); never so where they may be (B, C, h, w) as well."""

    def in_proportion(height: int, width: int) -> bool:
        # Both sides are the images' by one stride, but for a cell of rounding.
        return abs(height * images.shape[3] - width * images.shape[2]) <= images.shape[2] + images.shape[3]

    _, *axes = output.shape
    return images.ndim == 4 and in_proportion(*axes[:2]) and not in_proportion(*axes[1:])


@contextmanager
def recorded(network: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Inside the block the list holds what a layer gave last, (B, C, h, w), with its graph; nothing before it ran.

    A symmetric network sees images as they are there.
    """
    outputs: list[Tensor] = []
    grid: list[TokenGrid | None] = [None]

    def start(_module: nn.Module, inputs: tuple[object, ...]) -> None:
        grid[0] = token_grid(network, layer, inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        outputs[:] = [map_of_layer(layer, output, grid=grid[0])]

    handles = [network.register_forward_pre_hook(start), layer_named(network, layer).register_forward_hook(record)]
    try:
        with upright(network):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise NetworkError(f"layer '{layer}': not reached by the forward pass; choose another layer")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no memory left for a tensor."""
    # For the machine's own memory torch has no class.
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
