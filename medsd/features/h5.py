"""Features of a slide's tiles as HDF5 in TRIDENT's layout, which its slide encoders and others' models read.

The layout is that of github.com/mahmoodlab/TRIDENT (`WSI.extract_patch_features`, `coords_to_h5` and `save_h5` of
`trident/IO.py`): data sets `features` (N, D) and `coords` (N, 2), the corners in level-0 pixels, whose attributes say
how they were cut.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.errors import ConfigError
from medsd.files import atomic_path

# TRIDENT names scales by magnification, and takes 10x for 1 um per pixel.
_UM_OF_MAGNIFICATION = 10.0
_ROWS = 256


def check_h5() -> None:
    """Raises ConfigError: h5py is not installed."""
    if importlib.util.find_spec("h5py") is None:
        raise ConfigError("features: h5py is missing; install it with: pip install 'medsd[features]'")


def magnification(mpp: float) -> int | float:
    """What TRIDENT calls a scale: 10 over micrometres per pixel, whole where it is to a hundredth.

    TRIDENT itself rounds to 5, 10, 20, 40, 60 or 80; a number that follows from the scale keeps sizes right.

    Example:
        >>> magnification(0.25), magnification(0.5), round(magnification(0.2431), 2)
        (40, 20, 41.14)
    """
    exact = _UM_OF_MAGNIFICATION / mpp
    return round(exact) if abs(exact - round(exact)) < 0.01 else exact


def write_h5(
    path: Path,
    features: npt.NDArray[np.float32],
    coords: npt.NDArray[np.int64],
    of_features: Mapping[str, Any],
    of_coords: Mapping[str, Any],
) -> None:
    """Write features and places atomically.

    Args:
        path: ends in .h5.
        features: (N, D).
        coords: (N, 2) x and y of top left corners in level-0 pixels.
        of_features, of_coords: attributes, numbers and text.

    Raises:
        OutputError: the file cannot be written.
    """
    import h5py

    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values, attributes in (("features", features, of_features), ("coords", coords, of_coords)):
            rows = max(1, min(_ROWS, len(values)))
            data = file.create_dataset(
                name, data=values, chunks=(rows, values.shape[1]), maxshape=(None, values.shape[1])
            )
            data.attrs.update(attributes)
