"""Tokens of vision transformers as maps: (B, N, C) as (B, C, h, w), with the tokens that are no place kept apart.

The class token, a distillation token and registers stand before the patches' tokens and belong to no place of the
image. They are a path around the map: what saliency methods change is the map, and they stay the images' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medsd.checks import check_choice, check_flag, check_number
from medsd.errors import NetworkError

# Of timm's vision transformers, what weights of others are made with beside a name: UNI's are
# {"init_values": 1e-5, "dynamic_img_size": True} of vit_large_patch16_224. None of them names a file or code.
_NUMBERS = {
    **dict.fromkeys(("img_size", "patch_size", "embed_dim", "depth", "num_heads"), True),
    **dict.fromkeys(("init_values", "mlp_ratio"), False),
    "reg_tokens": True,
}
_SWITCHES = (
    *("class_token", "no_embed_class", "dynamic_img_size", "qkv_bias", "qk_norm", "proj_bias", "pre_norm"),
    *("final_norm", "scale_attn_norm", "scale_mlp_norm"),
)
_NAMES = {
    "mlp_layer": ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"),
    "pos_embed": ("learn", "none"),
}


@dataclass(frozen=True)
class TokenGrid:
    """Where tokens lie in an image.

    Attributes:
        prefix: number of tokens before those of patches.
        height, width: patches along the image's sides; tokens go through them row by row.
    """

    prefix: int
    height: int
    width: int

    def map_of(self, layer: str, tokens: Tensor) -> Tensor:
        """The patches' tokens, of (B, prefix + height * width, C), as a map (B, C, height, width).

        Raises:
            NetworkError: another number of tokens.
        """
        if tokens.shape[1] != self.prefix + self.height * self.width:
            raise NetworkError(
                f"layer '{layer}': its {tokens.shape[1]} tokens are not {self.prefix} and a grid of {self.height} x "
                f"{self.width}; choose a layer in which every patch has one, such as a block"
            )
        patches = tokens[:, self.prefix :].mT
        return patches.reshape(*patches.shape[:2], self.height, self.width)

    def with_map(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Tokens with a map (B, C, height, width) in the place of the patches'.

        The others are those of `tokens`, as often as the map holds more images.
        """
        prefix = tokens[:, : self.prefix]
        prefix = prefix.repeat(len(values) // len(prefix), 1, 1)
        return torch.cat([prefix, values.flatten(2).mT], dim=1)


def token_grid(network: nn.Module, layer: str, images: Tensor) -> TokenGrid | None:
    """The grid of a layer's tokens, as timm's and torchvision's vision transformers tell it; None of other networks.

    Args:
        network: any module.
        layer: a name in it; "" for its output.
        images: (B, 3, H, W) that it was given.
    """
    transformer = _transformer(network, layer)
    if transformer is None or images.ndim != 4:
        return None
    height, width = images.shape[2:]
    if hasattr(transformer, "num_prefix_tokens"):
        rows, columns = transformer.patch_embed.dynamic_feat_size((height, width))
        return TokenGrid(int(transformer.num_prefix_tokens), int(rows), int(columns))
    return TokenGrid(1, height // transformer.patch_size, width // transformer.patch_size)


def token_stride(encoder: nn.Module) -> int | None:
    """Image pixels from one token of a timm encoder to the next; None of one that is no vision transformer."""
    transformer = _transformer(encoder, "")
    return None if transformer is None else int(transformer.patch_embed.feat_ratio())


def image_side(encoder: nn.Module) -> int:
    """A side, in pixels, of images that a timm vision transformer takes: of those that it was made for, if it says."""
    patches: Any = encoder.patch_embed
    return int(patches.img_size[0]) if patches.img_size is not None else 4 * int(patches.feat_ratio())


def check_image_px(encoder: nn.Module, name: str, image_px: int) -> None:
    """That a timm vision transformer takes images of this side; of other encoders nothing is asked.

    Raises:
        NetworkError: it does not.
    """
    stride = token_stride(encoder)
    if stride is None:
        return
    patches: Any = encoder.patch_embed
    side = image_side(encoder)
    fixed = patches.img_size is not None and not getattr(encoder, "dynamic_img_size", False)
    if fixed and side != image_px:
        raise NetworkError(
            f"tile_px={image_px}: encoder '{name}' takes images of {side} px; set tile_px to {side}, or "
            f"encoder_options to {{'img_size': {image_px}}} or, for weights made at another size, "
            "{'dynamic_img_size': True}"
        )
    if image_px % stride:
        raise NetworkError(f"tile_px={image_px}: must be a multiple of the patches of encoder '{name}', {stride} px")


def check_encoder_options(name: str, options: Mapping[str, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """What timm makes a vision transformer with, of plain values; names of layers become timm's.

    `also` are options that the caller takes itself, for the message.

    Raises:
        ConfigError: an option that is not among those known here, or a value that it does not take.
    """
    made: dict[str, Any] = {}
    for key, value in options.items():
        known = (*_NUMBERS, *_SWITCHES, *_NAMES)
        if key not in known:
            check_choice(f"encoder_options of '{name}'", key, (*also, *known))
        if key in _NUMBERS:
            check_number(key, value, "[0, inf)" if key == "reg_tokens" else "(0, inf)", whole=_NUMBERS[key])
        elif key in _SWITCHES:
            check_flag(key, value)
        else:
            check_choice(key, value, _NAMES[key])
        made[key] = value
    if "mlp_layer" in made:
        import timm.layers

        made["mlp_layer"] = getattr(timm.layers, made["mlp_layer"])
    return made


def _transformer(network: nn.Module, layer: str) -> Any:
    """The innermost vision transformer of a network that holds a layer; None where there is none."""
    for name, module in reversed(list(network.named_modules())):
        if name and not f"{layer}.".startswith(f"{name}."):
            continue
        timms = hasattr(module, "num_prefix_tokens") and hasattr(
            getattr(module, "patch_embed", None), "dynamic_feat_size"
        )
        torchvisions = hasattr(module, "class_token") and isinstance(getattr(module, "patch_size", None), int)
        if timms or torchvisions:
            return module
    return None
