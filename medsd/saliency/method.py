"""What every saliency method is: built once for a network and a layer, called on batches; and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from reprlib import repr as brief
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from medsd.checks import check_choice
from medsd.errors import ChannelsCancelError, ConfigError, DatasetError, NetworkError
from medsd.networks.modes import evaluating, layer_named

Target = Tensor | int | None
"""Class numbers (B,), one for all images, or None: the class that the network predicts for each image."""

Output = Literal["logit", "evidence"]
"""What is explained: the target's logit, or that logit above the mean of the others, since softmax ignores what all
logits share (for two classes the log-odds; a network with one logit has no others, and its logit is the evidence)."""

# Of the channels' mean size (our choice). Where a LayerNorm reads the layer, rounding leaves 3e-8 (float32) and its eps
# up to 3e-6, of ConvNeXt, EdgeNeXt and ViT; other layers have 5e-2 and more.
_CANCELLED = 1e-4


class Method(Protocol):
    """A saliency method for one network and layer.

    Attributes:
        network: gives logits (B, K), or for label-free methods anything; run in eval mode and left as it was.
        layer: name of a module of it, as in `named_modules`; None is the input.
    """

    @property
    def network(self) -> nn.Module: ...
    @property
    def layer(self) -> str | None: ...

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w), float32, signed, not normalised, at the size of the layer; on the device of `x`.

        An image's map does not depend on the others of its batch.

        Args:
            x: (B, C, H, W) float images, as the network takes them.
            target: the class that is explained; label-free methods do not look at it.

        Raises:
            DatasetError: an empty batch, or not (B, C, H, W) float.
            ConfigError: a target outside the classes, or no number.
            NetworkError: the output is no logits (B, K), the layer was not reached or gives no map (B, C, h, w), or
                the map is not finite.
            ChannelsCancelError: the map is the mean of channels, and they cancel.
        """
        ...


@dataclass(frozen=True)
class Attribution:
    """What a class method found in one call, detached.

    Attributes:
        values: (B, C, h, w) at the layer, before channels become one.
        logits: (B, K) of the images.
        target: (B,) class numbers that were explained.
    """

    values: Tensor
    logits: Tensor
    target: Tensor


@dataclass(frozen=True)
class Explanation:
    """Maps (B, h, w) as a `Method` gives them, logits (B, K) of the same call, and the class numbers (B,) explained."""

    maps: Tensor
    logits: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class ClassMethod(ABC):
    """A `Method` that explains a class.

    Args:
        network: gives logits (B, K); any module. It runs in eval mode and is left as it was.
        layer: a module's name, explained at its output; None is the input.
        output: what is explained, see `Output`.

    Raises:
        NetworkError: no such layer.
        ConfigError: no such output.
    """

    network: nn.Module
    layer: str | None = None
    output: Output = "logit"

    def __post_init__(self) -> None:
        check_output(self.output)
        _ = self.module

    @property
    def module(self) -> nn.Module | None:
        """The module named `layer`; None for the input."""
        return None if self.layer is None else layer_named(self.network, self.layer)

    @property
    def title(self) -> str:
        """What the method is called in messages."""
        return type(self).__name__

    @abstractmethod
    def attributed(self, images: Tensor, target: Target) -> Attribution:
        """The method itself, for images that have been checked; called in eval mode, with gradients on."""

    def logits(self, images: Tensor) -> Tensor:
        """The network's logits (B, K) of images, checked."""
        return check_logits(self.network(images), len(images))

    def explained(self, logits: Tensor, target: Tensor) -> Tensor:
        """What is explained, (B,), of logits (B, K) and class numbers (B,)."""
        return explained_output(logits, target, self.output)

    def over_channels(self, values: Tensor) -> Tensor:
        """Attributions (B, C, h, w) as maps (B, h, w): the plain signed mean, as in arXiv 2404.02282's code."""
        if cancelled(values):
            raise ChannelsCancelError(
                f"{self.title} at '{self.layer or 'input'}': its channels cancel (as where a LayerNorm reads it), so "
                "the map is rounding; use gradcam or deeplift, or another layer"
            )
        return values.mean(dim=1)

    def attribute(self, x: Tensor, target: Target = None) -> Tensor:
        """Attributions (B, C, h, w) at the layer, before channels become one; arguments and errors as `Method`."""
        return self._attributed(x, target).values

    def explain(self, x: Tensor, target: Target = None) -> Explanation:
        """Maps with the logits that they explain; arguments and errors as `Method`."""
        found = self._attributed(x, target)
        if len(found.values) != len(x):
            given = f"{len(found.values)} maps for {len(x)} images"
            raise NetworkError(f"layer '{self.layer}': gives {given}; choose another")
        return Explanation(finite(self.over_channels(found.values), self.layer), found.logits, found.target)

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Maps (B, h, w), see `Method`."""
        return self.explain(x, target).maps

    def _attributed(self, x: Tensor, target: Target) -> Attribution:
        check_images(x)
        check_target(target, self.network)
        if any(tensor.is_inference() for tensor in chain(self.network.parameters(), self.network.buffers())):
            raise NetworkError(f"{type(self.network).__name__} was made under torch.inference_mode; make it outside")
        with differentiable(self.network):
            return self.attributed(x.clone() if x.is_inference() else x.detach(), target)


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Inside: eval mode, and gradients whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad(), evaluating(network):
        yield


def cancelled(values: Tensor) -> bool:
    """Whether of any image nothing but rounding is left of the means over channels (B, h, w) of values (B, C, h, w).

    No LayerNorm's output changes with the mean of what it reads, so that the channels of the gradient there sum to
    nothing, and nearly so those of gradient times activation. Values that are all 0 have nothing to lose.
    """
    left, size = (
        part.float().abs().amax(dim=(1, 2)) for part in (values.float().mean(dim=1), values.abs().mean(dim=1))
    )
    # Rounding of half precision, of C channels that have nothing to do with each other.
    rounding = 2 * torch.finfo(values.dtype).eps / values.shape[1] ** 0.5
    return bool((left < max(_CANCELLED, rounding) * size).any())


def check_images(x: Tensor) -> None:
    """Raises DatasetError: not (B, C, H, W) of a floating type, or empty."""
    if not isinstance(x, Tensor):
        raise DatasetError(f"images: {type(x).__name__}; give a tensor (B, C, H, W), without labels")
    if x.ndim != 4 or not x.is_floating_point():
        raise DatasetError(f"images: shape {tuple(x.shape)}, {x.dtype}; give (B, C, H, W) float, as the network takes")
    if not x.numel():
        raise DatasetError(f"images: shape {tuple(x.shape)}, an empty batch; give at least one image")


def check_target(target: Target, network: nn.Module) -> None:
    """Raises ConfigError: no number, such as a class's name; the message numbers the classes that a network names."""
    try:
        torch.as_tensor(0 if target is None else target)
    except (TypeError, ValueError, RuntimeError) as error:
        names = getattr(network, "classes", None)
        known = [f"{number} {name}" for number, name in enumerate(names if isinstance(names, list | tuple) else ())]
        classes = f": {', '.join(known)}" if known else ""
        raise ConfigError(f"target={brief(target)}: give one class number, or one for each image{classes}") from error


def baseline_images(x: Tensor, baseline: Tensor | None) -> Tensor:
    """The images that attributions compare with, (B, C, H, W), type and device of `x`.

    Args:
        x: (B, C, H, W) images.
        baseline: (C, H, W), (B, C, H, W) or a colour (C, 1, 1), in the network's input space; None is zeros, the mean
            colour where inputs are normalised (arXiv 2404.02282's code).
    """
    if baseline is None:
        return torch.zeros_like(x)
    if not isinstance(baseline, Tensor):
        raise DatasetError(
            f"baseline: {type(baseline).__name__}; give a tensor {tuple(x.shape[1:])}, or None for zeros"
        )
    if baseline.shape not in (x.shape, x.shape[1:], (x.shape[1], 1, 1)):
        raise DatasetError(f"baseline: shape {tuple(baseline.shape)}; give {tuple(x.shape[1:])} or {tuple(x.shape)}")
    return (baseline.clone() if baseline.is_inference() else baseline.detach()).to(x).expand_as(x)


def check_logits(output: object, batch: int) -> Tensor:
    """Logits (B, K) of a network's output for a batch of B, which may have sides of 1 behind them."""
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[2:].numel() != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        wrap = "; wrap it so that it returns .logits" if hasattr(output, "logits") else ""
        needed = "class methods need logits (B, K), label-free ones do not"
        raise NetworkError(f"the network's output is {shape}; {needed}{wrap}")
    if len(output) != batch:
        raise NetworkError(f"the network's output is {tuple(output.shape)} for {batch} images; give one row an image")
    if not torch.isfinite(output).all():
        raise NetworkError("the network's logits are not finite; check its weights, or run it in float32")
    return output.flatten(1)


def targets_of(logits: Tensor, target: Target) -> Tensor:
    """Class numbers (B,) on the device of logits (B, K), a tensor that autograd may keep."""
    batch, classes = logits.shape
    if target is None:
        return logits.detach().argmax(dim=1).clone()
    labels = torch.as_tensor(target)  # where it is: a number is not sent to a GPU to be looked at
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (batch,)):
        raise ConfigError(f"target: {labels.dtype} {tuple(labels.shape)}; give one class number, or one for each image")
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ConfigError(f"target={int(outside[0])}: the network has {classes} classes, 0 to {classes - 1}")
    return labels.to(logits.device, torch.int64, non_blocking=True).expand(batch).clone()


def explained_output(logits: Tensor, target: Tensor, output: Output) -> Tensor:
    """What is explained, (B,), of logits (B, K) and class numbers (B,)."""
    if output == "evidence":
        logits = evidence(logits)
    return logits.gather(1, target[:, None])[:, 0]


def evidence(logits: Tensor) -> Tensor:
    """Each class's logit above the mean of the others, (B, K); of a single logit itself. The one home of this choice.

    It is the deviation from the mean of all, times K / (K - 1).
    """
    classes = logits.shape[1]
    return logits if classes == 1 else (logits - logits.mean(dim=1, keepdim=True)) * (classes / (classes - 1))


def check_output(output: Output) -> Output:
    """Raises ConfigError: neither "logit" nor "evidence"."""
    check_choice("output", output, get_args(Output))
    return output


def finite(maps: Tensor, layer: str | None) -> Tensor:
    """The maps as detached float32."""
    maps = maps.detach().float()
    if not torch.isfinite(maps).all():
        raise NetworkError(
            f"layer '{layer or 'input'}': the map is not finite; check images and weights, or run in float32"
        )
    return maps
