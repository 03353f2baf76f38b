"""Training of the surrogates of Smooth Deep Saliency, variant A (arXiv 2404.02282)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import DatasetError, NetworkError, TrainingError
from medsd.networks.modes import evaluating, uncompiled
from medsd.progress import Progress, no_progress
from medsd.saliency.method import check_images
from medsd.saliency.smooth.bilinear import Surrogate
from medsd.saliency.smooth.points import Also, strided_points

_Visit = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class PointError:
    """How far a surrogate is from the module it stands in for.

    Attributes:
        l1: mean absolute difference of the outputs.
        relative_l1: the same as a share of the module's mean absolute output. The part of the input that alternates
            from pixel to pixel cannot be followed, so it does not go to 0.
    """

    l1: float
    relative_l1: float


@dataclass(frozen=True)
class SurrogateReport:
    """What came of a training.

    Attributes:
        points: the error at each strided module by its name.
        loss: of each epoch, the mean over its batches of the sum over the modules of their `l1`.
    """

    points: dict[str, PointError]
    loss: tuple[float, ...]


def train_surrogate(
    network: nn.Module,
    batches: Iterable[Tensor],
    epochs: int = 10,
    lr: float = 1e-3,
    held_out: Iterable[Tensor] | None = None,
    also: Sequence[Also] = (),
    seed: int = 0,
    channels_last: bool = False,
    progress: Progress = no_progress,
) -> tuple[Surrogate, SurrogateReport]:
    """Train surrogates for the strided modules of a network, on its own inputs to them; it is not changed itself.

    As in the authors' released code: Adam with its defaults, the sum of the modules' mean absolute errors, every
    surrogate fed with what the network feeds the module (never with another surrogate's output), before any norm. Each
    surrogate's gradient is taken while the network runs, so that no more than one module's tensors are held at a time
    (our choice; the gradients are the same).

    Args:
        network: run in eval mode and without a graph, on the device of its first parameter.
        batches: (B, C, H, W) float images, as the network takes them; gone through once an epoch, so a list or a
            loader and no generator.
        epochs: 10 in the released code; 0 gives the surrogates as they start.
        lr: of Adam.
        held_out: batches that the errors are measured on; None measures them on `batches`.
        also: kinds of modules beside convolutions of stride 2, see `strided_points`.
        seed: draws the starting weights; torch's own generator is left alone.
        channels_last: keep the surrogates' weights as NHWC.
        progress: shows the batches of an epoch.

    Returns:
        The surrogates, frozen, on the network's device, and how well they do.

    Raises:
        ConfigError: no such kind, or `epochs` or `lr` is not possible.
        NetworkError: the network has no strided module, or does not run one.
        DatasetError: there are no batches, they are no images, or come from a generator.
        TrainingError: a loss is not finite.
    """
    check_number("epochs", epochs, "[0, inf)", whole=True)
    check_number("lr", lr, "(0, inf)")
    if isinstance(batches, Iterator):
        raise DatasetError("batches: a generator is used up after one epoch; give a list or a loader")
    surrogate = _untrained(network, batches, also, seed)
    if channels_last:
        surrogate = surrogate.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=lr)
    loss = tuple(_epoch(network, surrogate, optimizer, batches, progress) for _ in range(epochs))
    surrogate.requires_grad_(False)
    errors = measure_surrogate(network, surrogate, batches if held_out is None else held_out)
    return surrogate, SurrogateReport(errors, loss)


def measure_surrogate(network: nn.Module, surrogate: Surrogate, batches: Iterable[Tensor]) -> dict[str, PointError]:
    """The error of each surrogate, by the module's name, when it is fed with what the network feeds the module.

    Args:
        network, batches: as in `train_surrogate`.

    Raises:
        NetworkError: the surrogate is another network's.
        DatasetError: there are no batches, or they are no images.
    """
    names = [point.name for point in surrogate.points_of(network)]
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}

    def measure(name: str, x: Tensor, output: Tensor) -> None:
        difference = (surrogate(name, x, output.shape[2:]) - output).abs()
        seen = difference.sum(dtype=torch.float64), output.abs().sum(dtype=torch.float64)
        sums[name] += torch.tensor([*seen, output.numel()], dtype=torch.float64)

    with _visited(network, surrogate.also, measure), torch.no_grad():
        for batch in _images(network, batches):
            network(batch)
    return {
        name: PointError(float(wrong / count), float(wrong / total)) for name, (wrong, total, count) in sums.items()
    }


def _untrained(network: nn.Module, batches: Iterable[Tensor], also: Sequence[Also], seed: int) -> Surrogate:
    channels: dict[str, tuple[int, int]] = {}

    def probe(name: str, x: Tensor, output: Tensor) -> None:
        channels[name] = (x.shape[1], output.shape[1])

    with _visited(network, also, probe), torch.no_grad():
        network(next(_images(network, batches))[:1])
    names = [point.name for point in strided_points(network, also)]
    for name in names:
        if name not in channels:
            raise NetworkError(f"layer '{name}': not reached by the forward pass; give the part of the network that is")
    parameter = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not the CUDA ones, which are not put back
        surrogate = Surrogate({name: channels[name] for name in names}, also)
    return surrogate.to(parameter.device, parameter.dtype)


def _epoch(
    network: nn.Module,
    surrogate: Surrogate,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    progress: Progress,
) -> float:
    """Train once through the batches; the mean loss."""
    losses: dict[str, Tensor] = {}

    def learn(name: str, x: Tensor, output: Tensor) -> None:
        with torch.enable_grad():
            error = (surrogate(name, x, output.shape[2:]) - output).abs().mean()
            error.backward()
        losses[name] = losses.get(name, 0) + error.detach()

    total, count = 0.0, 0
    with _visited(network, surrogate.also, learn), torch.no_grad():
        for batch in progress(_images(network, batches), len(batches) if isinstance(batches, Sized) else 0, "batch"):
            losses.clear()
            optimizer.zero_grad()
            network(batch)
            for name, loss in losses.items():
                if not torch.isfinite(loss):
                    raise TrainingError(f"surrogate of '{name}': the loss is {float(loss)}; check weights and images")
            optimizer.step()
            total, count = total + float(sum(losses.values())), count + 1
    return total / count


@contextmanager
def _visited(network: nn.Module, also: Sequence[Also], visit: _Visit) -> Iterator[None]:
    """Inside the block the network is in eval mode and each strided module's name, input and output are shown."""

    with evaluating(network), uncompiled(), ExitStack() as stack:
        for point in strided_points(network, also):
            stack.callback(point.after(partial(visit, point.name)).remove)
        yield


def _images(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches on the network's device."""
    device = next(network.parameters()).device
    empty = True
    for batch in batches:
        check_images(batch)
        empty = False
        yield batch.to(device)
    if empty:
        raise DatasetError("no batches of images; give at least one")
