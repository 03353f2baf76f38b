"""Part of an encoder: from behind one of its layers to another, so that what a layer gives can be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.modes import evaluating, layer_named, map_of_layer, recorded, uncompiled

# Run through the layers whose results are not looked at; `create_encoder` has seen that it is large enough.
_DUMMY_PX = 64
_PROBE_PX = 128
_ROUNDING = 1e-4


class Segment(nn.Module):
    """The layers of an encoder behind `start` up to `end`, as a network of its own.

    The encoder runs as a whole, for it alone knows the way through its layers: those below are given an image of
    64 px, and those above go on with the corner of the map that belongs to such an image, which costs next to nothing.

    Args:
        encoder: a network of images (B, 3, H, W), in eval mode; it stays as it is.
        start: layer whose output is given; None for the image.
        end: layer whose output is wanted; None for the encoder's own.

    Raises:
        NetworkError: no such layer, or one that gives no map (B, C, h, w).
    """

    def __init__(self, encoder: nn.Module, start: str | None, end: str | None) -> None:
        super().__init__()
        self.encoder, self.start, self.end = encoder, start, end
        self._corner: Sequence[int] = ()
        if end is not None:
            parameter = next(encoder.parameters())
            with evaluating(encoder), torch.no_grad(), recorded(encoder, end) as outputs:
                encoder(parameter.new_zeros((1, 3, _DUMMY_PX, _DUMMY_PX)))
            self._corner = outputs[0].shape[2:]

    def forward(self, x: Tensor, kept: Mapping[str, tuple[slice, slice]] | None = None) -> Tensor:
        """What `end` gives (B, C, h, w) where `start` gave `x`, or of images `x` as the encoder takes them.

        Layers that work in place may write to `x`.

        Args:
            x: (B, C, h, w).
            kept: by the names of layers in between, rows and columns of their outputs with which it goes on; of what is
                given by the name of `end`, or "".
        """
        ended: list[Tensor] = []
        kept = kept or {}
        last = kept.get(self.end or "", (slice(None), slice(None)))

        def stop(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            ended[:] = [map_of_layer(str(self.end), output)]
            return ended[0][:, :, : self._corner[0], : self._corner[1]].clone()  # layers behind may work in place

        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            image = x
            if self.start is not None:
                image = x.new_zeros((len(x), 3, _DUMMY_PX, _DUMMY_PX))
                stack.callback(layer_named(self.encoder, self.start).register_forward_hook(lambda *_: x).remove)
            for name, part in kept.items():
                if name not in (self.end, ""):
                    # Layers behind may work in place, which a view must not pass on.
                    cut = partial(_cut, part=part)
                    stack.callback(layer_named(self.encoder, name).register_forward_hook(cut).remove)
            if self.end is not None:
                stack.callback(layer_named(self.encoder, self.end).register_forward_hook(stop).remove)
            output = self.encoder(image)
        return (ended[0] if ended else map_of_layer("output", output))[..., *last]


def _cut(_module: nn.Module, _inputs: object, output: Tensor, part: tuple[slice, slice]) -> Tensor:
    return output[..., *part].clone()


def segments(encoder: nn.Module, layers: Sequence[str]) -> list[Segment]:
    """The encoder cut behind each of `layers`, from the image on: what they give one after the other is what it gives.

    Raises:
        NetworkError: no such layer, or a path leads around one (a skip from below it to above it), so that it cannot
            be cut there.
    """
    ends = [*layers, None]
    parts = [Segment(encoder, start, end) for start, end in zip([None, *layers], ends, strict=True)]
    parameter = next(encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, 3, _PROBE_PX, _PROBE_PX), generator=generator).to(parameter)
    with evaluating(encoder), torch.no_grad():
        whole = encoder(probe)
        try:
            for part in parts:
                probe = part(probe)
            apart = float((probe - whole).abs().max() / whole.abs().max())
        except RuntimeError:  # sizes that do not meet
            apart = float("inf")
    if not apart <= _ROUNDING:
        raise NetworkError(
            f"layer '{layers[-1]}': a path of the encoder leads around it, so it cannot be cut there; choose the "
            "output of a whole stage"
        )
    return parts
