"""A network made ready to train: where it starts and runs, what of it is trained, and how fast."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import ignite.distributed as idist
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from medsd.checks import check_number
from medsd.errors import ConfigError, NetworkError, nearest
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier
from medsd.networks.modes import usable_device
from medsd.networks.start import load_encoder
from medsd.networks.whitening import WhitenedHead

logger = logging.getLogger(__name__)

_STEM, _BATCHNORM, _ENCODER = "stem", "batchnorm", "encoder"
# More would let a usual batch be whitened into anything.
_WHITENED_TOGETHER = 32


OneNetwork = TypeVar("OneNetwork", bound=nn.Module)


class Encoded(Protocol):
    """A network with a timm encoder: `Classifier`, `SegmentationNetwork`."""

    encoder_name: str

    @property
    def encoder(self) -> nn.Module:
        """The network below everything else."""
        ...

    def encoder_layers(self) -> dict[str, int] | None:
        """The layer of each of the encoder's parameters, by name, the stem's being 0; None where timm does not know."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All of them."""
        ...


def ready_to_train(
    network: Classifier,
    device: torch.device,
    encoder_weights: str | None = None,
    whitening: bool = False,
    group_size: int | None = None,
    channels_last: bool = False,
    compiled: bool = False,
) -> Classifier:
    """The network with the weights that it starts from, on its device.

    Args:
        network: as it was made; changed in place.
        device: where it runs.
        encoder_weights: file of a pre-trained encoder, see `load_encoder`; None leaves the encoder as it is.
        whitening: whiten the features before the head in training (SaliencyDecor's mode "layer"); folded into the head
            when the weights are written.
        group_size: channels whitened together, best at most half the batch; None takes 32.
        channels_last: keep weights as NHWC, which half-precision convolutions on GPUs want.
        compiled: compile the encoder at its first run (torch.compile; not AIM's); names of the weights stay.

    Raises:
        WeightsError: the file holds no weights of this encoder, or of other input.
        ConfigError: `whitening` of an AIM network, or a device that cannot be used here.
    """
    if encoder_weights is not None:
        load_encoder(network.encoder, encoder_weights, network.normalise)
        network.encoder_weights = encoder_weights
    if whitening:
        if isinstance(network, AimClassifier):
            raise ConfigError("whitening: AIM's head sees masked features and is not whitened; leave it false")
        network.head = WhitenedHead(network.feature_dim, len(network.classes), group_size or _WHITENED_TOGETHER)
    if compiled and isinstance(network, AimClassifier):
        logger.warning("compiled: torch.compile does not reach the stages that AIM takes from its encoder")
        compiled = False
    return on_device(network, device, channels_last, compiled)


def on_device(
    network: OneNetwork, device: torch.device, channels_last: bool = False, compiled: bool = False
) -> OneNetwork:
    """The network where it is trained; other arguments as in `ready_to_train`.

    Raises:
        ConfigError: the device cannot be used here.
    """
    if idist.get_world_size() > 1 and device.type == "cuda":
        # timm's: torch's own would replace timm's BatchNorms that hold an activation, and lose it.
        network = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    network = network.to(usable_device(device))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        cast(Encoded, network).encoder.compile()
    return network


def parameter_groups(
    network: Encoded,
    lr: float,
    weight_decay: float,
    frozen: Sequence[str] = (),
    layer_decay: float = 1.0,
    head_lr: float | None = None,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Freeze stages of the encoder and group the other parameters for a torch optimiser.

    A layer of the encoder learns at lr * layer_decay ** depth, as in BEiT (arXiv 2106.08254): depth 1 is the
    encoder's last layer, and its layers are timm's (a residual block each, the stem, a final norm). What is not the
    encoder (the head, AIM's branches) has depth 0. With the defaults there is one group of all parameters.

    A learning-rate schedule that sets rates of its own must be told them group by group:
    `OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups])`.

    Args:
        network: its parameters of frozen stages get requires_grad False; put it into training mode with
            `medsd.networks.modes.training`, which keeps their BatchNorms as they are, too.
        lr: the full learning rate.
        weight_decay: of all parameters, see `decay_vectors`.
        frozen: modules of the encoder such as "layer1" or "stages.0"; "stem" is timm's lowest layer, "batchnorm" every
            BatchNorm, which then keeps what it learnt from more images than a small data set has. "encoder" is all of
            it, which leaves the head or decoder to train (linear probing).
        layer_decay: in 0 to 1, 0 excluded; 1 for one rate.
        head_lr: rate of what is not the encoder; None for `lr`.
        decay_vectors: False for no weight decay on parameters of one dimension (norms, biases, layer scales), which
            is timm's rule.

    Returns:
        Groups {"params", "lr", "weight_decay"}, the parameters of each in the network's order.

    Raises:
        ConfigError: a rate or `weight_decay` is negative, or `layer_decay` lies outside 0 to 1.
        NetworkError: the encoder has no such stage, timm does not know its layers, or nothing is left to train.
    """
    for key, value in (("lr", lr), ("weight_decay", weight_decay)):
        check_number(key, value, "[0, inf)")
    if head_lr is not None:
        check_number("head_lr", head_lr, "[0, inf)", hint="of a segmentation the key is decoder_lr")
    check_number("layer_decay", layer_decay, "(0, 1]", hint="1 is one rate for all layers")
    for name in frozen:
        for parameter in _stage(network, name):
            parameter.requires_grad = False
    rates = _encoder_rates(network, lr, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            rate = rates.get(parameter, lr if head_lr is None else head_lr)
            decay = weight_decay if decay_vectors or parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise NetworkError(f"frozen: nothing of {network.encoder_name} and its head is left to train; freeze less")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _encoder_rates(network: Encoded, lr: float, layer_decay: float) -> dict[nn.Parameter, float]:
    parameters = dict(network.encoder.named_parameters())
    if layer_decay == 1:
        return dict.fromkeys(parameters.values(), lr)
    layers = _layers(network, f"layer_decay={layer_decay}")
    depth_of_stem = max(layers.values()) + 1
    return {parameters[name]: lr * layer_decay ** (depth_of_stem - layer) for name, layer in layers.items()}


def _layers(network: Encoded, key: str) -> dict[str, int]:
    layers = network.encoder_layers()
    if layers is None:
        raise NetworkError(f"{key}: timm does not know the layers of {network.encoder_name}; leave this option out")
    return layers


def _stage(network: Encoded, name: str) -> list[nn.Parameter]:
    encoder = network.encoder
    if name == _ENCODER:
        return list(encoder.parameters())
    if name == _STEM:
        layers, parameters = _layers(network, f"frozen '{name}'"), dict(encoder.named_parameters())
        return [parameters[parameter] for parameter, layer in layers.items() if layer == 0]
    if name == _BATCHNORM:
        norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            raise NetworkError(f"frozen '{name}': {network.encoder_name} has none; leave it out")
        return [parameter for module in norms for parameter in module.parameters(recurse=False)]
    stages = {path: list(module.parameters()) for path, module in encoder.named_modules() if path}
    if not stages.get(name):
        made = [info["module"] for info in getattr(encoder, "feature_info", ())]
        known = [_ENCODER, _STEM, _BATCHNORM, *(path for path in made if stages.get(path))]
        raise NetworkError(
            f"frozen '{name}': {network.encoder_name} has no such stage to freeze{nearest(str(name), stages)}; it has "
            f"{', '.join(known)}"
        )
    return stages[name]
