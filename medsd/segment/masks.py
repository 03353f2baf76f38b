"""Masks from files: class numbers of pixels, or a line that says why they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin

from medsd.checks import check_choice
from medsd.classes import checked_classes
from medsd.cohort.patches import stated_turn
from medsd.errors import ConfigError, DatasetError
from medsd.segment.items import Numbers
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.picture import bits_a_colour

# Pillow would try every decoder it has; JPEG is known to be told what it does to masks.
_FORMATS = ("PNG", "TIFF", "JPEG", "WEBP")
_WHITE_IS_ZERO = 0
_GREY = ("1", "L", "I", "I;16", "I;16B")

Kind = Literal["semantic", "instances"]


@dataclass(frozen=True)
class MaskCoding:
    """What the values of masks mean.

    Attributes:
        classes: names, the background's first.
        kind: "semantic", where a value is a class; "instances", where each object has a number of its own, 0 is the
            background, and all objects are of the second class.
        values: the value of each class in masks, in the order of `classes`; None for 0, 1, and so on, with 255 for 1 in
            masks of two classes that have no 1.
        key: what messages call `values`.

    Raises:
        ConfigError: classes of one name, instances of several classes, or values that are not one for each class.
    """

    classes: tuple[str, ...]
    kind: Kind = "semantic"
    values: Sequence[int] | None = None
    key: InitVar[str] = "mask_values"

    def __post_init__(self, key: str) -> None:
        object.__setattr__(self, "classes", checked_classes(self.classes))
        check_choice("mask_kind", self.kind, get_args(Kind))
        if self.kind == "instances" and (len(self.classes) != 2 or self.values is not None):
            raise ConfigError("mask_kind='instances': numbers say nothing of classes; give two classes, no mask_values")
        if self.values is not None and not len(self.classes) == len(set(self.values)) == len(self.values):
            raise ConfigError(
                f"{key}={list(self.values)}: give a different one for each of the {len(self.classes)} classes"
            )

    def numbers(self, values: npt.NDArray[np.integer], path: Path) -> Numbers:
        """Class numbers of a mask's values (H, W).

        Raises:
            DatasetError: a value that is no class's; `path` is named.
        """
        if self.kind == "instances":
            objects: Numbers = (values != 0).astype(np.uint8)
            return objects
        found = np.unique(values).tolist()
        coded = list(range(len(self.classes))) if self.values is None else list(self.values)
        if self.values is None and len(self.classes) == 2 and set(found) <= {0, 255}:
            coded = [0, 255]
        outside = [value for value in found if value not in coded]
        if outside:
            means = ", ".join(f"{value} {name}" for value, name in zip(coded, self.classes, strict=True))
            raise DatasetError(
                f"{path}: value {outside[0]} is no class ({means}); set classes or mask_values, or mask_kind to "
                "'instances' where each object has its number"
            )
        numbers = np.zeros(values.shape, np.uint8)
        for number, value in enumerate(coded):
            numbers[values == value] = number
        return numbers


def mask_values(path: Path, height: int, width: int, turn: int = 1) -> npt.NDArray[np.integer]:
    """The values (height, width) of a grey mask, PNG or TIFF, as stored, whatever a viewer shows; of 1 bit white is 1.

    Args:
        path: the mask.
        height, width: of its image as shown.
        turn: the EXIF orientation of its image; a mask of another one was drawn on who knows which side up.

    Raises:
        DatasetError: it cannot be read, is of another size or orientation than its image, a JPEG, in colour, of several
            pages, or has a palette.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            file.seek(0)
            bits = bits_a_colour(image, file.read(32))
            if image.format not in ("PNG", "TIFF"):
                raise DatasetError(f"{path}: a mask as {image.format}, whose values blur; save it anew as a grey PNG")
            if image.mode == "P":
                raise DatasetError(
                    f"{path}: a mask with a palette, whose values may be places in it or colours; save it as a grey "
                    "PNG of class numbers"
                )
            if image.mode not in _GREY:
                raise DatasetError(f"{path}: a mask in colour ({image.mode}); save it as a grey PNG, 0 is background")
            if getattr(image, "is_animated", False):
                raise DatasetError(f"{path}: has several pages; save the one that is the mask as a file of its own")
            own = stated_turn(image)
            if own != turn:
                raise DatasetError(f"{path}: a mask of Orientation {own}, its image of {turn}; save both upright")
            tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
            # Of two levels that is how they are encoded (usual of a fax); of more, numbers whose picture is a negative.
            inverted = bits > 1 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
            upright = ImageOps.exif_transpose(image)
            if upright.size != (width, height):
                raise DatasetError(
                    f"{path}: {upright.width} x {upright.height} px, its image {width} x {height}; draw it at that size"
                )
            # Pillow makes shades of up to 8 bits: 0 is black, 255 white.
            values: npt.NDArray[np.integer] = np.asarray(upright.convert("L") if bits <= 8 else upright)
    except DAMAGED as error:
        raise DatasetError(f"{path}: cannot be read as a mask ({error}); write it again") from error
    if bits <= 8:
        values = (255 - values if inverted else values) // (255 // (2**bits - 1))
    return values


def read_mask(path: str | Path, coding: MaskCoding, height: int, width: int, turn: int = 1) -> Numbers:
    """Class numbers (height, width) uint8 of a mask, for an image of that size and orientation.

    Raises:
        DatasetError: see `mask_values` and `MaskCoding.numbers`.
    """
    path = Path(path)
    return coding.numbers(mask_values(path, height, width, turn), path)
