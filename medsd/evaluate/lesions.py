"""Lesions as CAMELYON16 counted them: near outlines are one, and isolated tumour cells are neither found nor missed.

After the challenge's evaluation (github.com/computationalpathologygroup/Camelyon16, `Evaluation_FROC.py`), whose masks
are levels of a slide's pyramid with a factor of 2 each. Here a mask's pixel may have any width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import measure

from medsd.checks import check_number

Labels = npt.NDArray[np.int32]

JOINED_UM = 75.0
"""Outlines nearer than this are one lesion: five tumour cells' width."""
ISOLATED_UM = 275.0
"""A lesion with a shorter major axis is isolated tumour cells: the 200 um of their definition, and the 75 above."""


def lesion_labels(tumour: npt.NDArray[np.bool_], pixel_um: float) -> Labels:
    """The evaluation mask (height, width): 0 off all lesions, and the lesions from 1.

    Tumour is grown by half of `JOINED_UM` (Euclidean distance between pixels' centres), its holes are filled, and what
    touches by an edge or a corner is one lesion.

    Args:
        tumour: (height, width), the annotation.
        pixel_um: width of a pixel in micrometres.

    Raises:
        ConfigError: a width that is not above 0.

    Example:
        >>> row = np.zeros((1, 40), bool)
        >>> row[0, [0, 7, 30]] = True
        >>> int(lesion_labels(row, 10.0).max()), int(lesion_labels(row, 20.0).max())
        (2, 3)
    """
    check_number("pixel_um", pixel_um, "(0, inf)")
    if not tumour.any():
        return np.zeros(tumour.shape, np.int32)
    near = ndimage.distance_transform_edt(~tumour) < JOINED_UM / 2 / pixel_um
    filled = ndimage.binary_fill_holes(near)
    return measure.label(filled, connectivity=2).astype(np.int32)  # type: ignore[no-untyped-call,no-any-return]


def isolated_cells(labels: Labels, pixel_um: float) -> npt.NDArray[np.int64]:
    """Numbers of the lesions that are isolated tumour cells, by the major axis of the ellipse of equal moments.

    Args:
        labels: as of `lesion_labels`.
        pixel_um: width of a pixel in micrometres.
    """
    found = measure.regionprops(labels)  # type: ignore[no-untyped-call]
    return np.array([one.label for one in found if one.axis_major_length < ISOLATED_UM / pixel_um], np.int64)
