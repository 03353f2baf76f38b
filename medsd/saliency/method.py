"""What every saliency method is: built once for a network and a layer, called on batches; and the checks they share."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, NetworkError, nearest

Target = Tensor | int | None
"""Class numbers (B,), one for all images, or None: the class that the network predicts for each image."""

Output = Literal["logit", "evidence"]
"""What is explained: the target's logit, or that logit above the mean of the others, since softmax ignores what all
logits share (for two classes the log-odds; a network with one logit has no others, and its logit is the evidence)."""


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
            ConfigError: a target outside the classes.
            NetworkError: the output is no logits (B, K), the layer was not reached or gives no map (B, C, h, w), or
                the map is not finite.
        """
        ...


def layer_named(network: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        NetworkError: there is none; the message names the nearest.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if not name or name not in modules:
        raise NetworkError(f"layer '{name}': {type(network).__name__} has no such layer{nearest(name, modules)}")
    return modules[name]


def check_images(x: Tensor) -> None:
    """Raises DatasetError: not (B, C, H, W) of a floating type, or empty."""
    if not isinstance(x, Tensor):
        raise DatasetError(f"images: {type(x).__name__}; give a tensor (B, C, H, W), without labels")
    if x.ndim != 4 or not x.is_floating_point():
        raise DatasetError(f"images: shape {tuple(x.shape)}, {x.dtype}; give (B, C, H, W) float, as the network takes")
    if not x.numel():
        raise DatasetError(f"images: shape {tuple(x.shape)}, an empty batch; give at least one image")


def check_logits(output: object, batch: int) -> Tensor:
    """Logits (B, K) of a network's output for a batch of B, which may have sides of 1 behind them.

    Raises:
        NetworkError: it is something else, or not finite.
    """
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[2:].numel() != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NetworkError(f"the network's output is {shape}; class methods need logits (B, K), label-free ones do not")
    if len(output) != batch:
        raise NetworkError(f"the network's output is {tuple(output.shape)} for {batch} images; give one row an image")
    if not torch.isfinite(output).all():
        raise NetworkError("the network's logits are not finite; check its weights, or run it in float32")
    return output.flatten(1)


def targets_of(logits: Tensor, target: Target) -> Tensor:
    """Class numbers (B,) on the device of logits (B, K).

    Raises:
        ConfigError: outside the classes, or not one an image.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.detach().argmax(dim=1)
    labels = torch.as_tensor(target, device=logits.device)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (batch,)):
        raise ConfigError(f"target: {labels.dtype} {tuple(labels.shape)}; give one class number, or one for each image")
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ConfigError(f"target={int(outside[0])}: the network has {classes} classes, 0 to {classes - 1}")
    return labels.long().expand(batch)


def explained_output(logits: Tensor, target: Tensor, output: Output) -> Tensor:
    """What is explained, (B,), of logits (B, K) and class numbers (B,)."""
    classes = logits.shape[1]
    if output == "evidence" and classes > 1:
        # The target's above the mean of the others is its deviation from the mean of all, times K / (K - 1).
        logits = (logits - logits.mean(dim=1, keepdim=True)) * (classes / (classes - 1))
    return logits.gather(1, target[:, None])[:, 0]


def check_output(output: Output) -> Output:
    """Raises ConfigError: neither "logit" nor "evidence"."""
    if output not in ("logit", "evidence"):
        raise ConfigError(f"output='{output}': use 'logit' or 'evidence'{nearest(output, ('logit', 'evidence'))}")
    return output


def finite(maps: Tensor, layer: str | None) -> Tensor:
    """The maps as detached float32.

    Raises:
        NetworkError: they are not finite.
    """
    maps = maps.detach().float()
    if not torch.isfinite(maps).all():
        raise NetworkError(
            f"layer '{layer or 'input'}': the map is not finite; check images and weights, or run in float32"
        )
    return maps
