"""Lesions and isolated cells as CAMELYON16's evaluation had them, at any width of a pixel; against MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
from monai.apps.pathology.utils import compute_isolated_tumor_cells, compute_multi_instance_mask
from scipy import ndimage

from medsd.errors import ConfigError
from medsd.evaluate.lesions import ISOLATED_UM, JOINED_UM, isolated_cells, lesion_labels


@pytest.mark.parametrize("pixel_um", [3.9, 7.776, 16.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_monai(seed: int, pixel_um: float) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((120, 150)), 3)
    tumour = noise > np.quantile(noise, 0.98)
    found = lesion_labels(tumour, pixel_um)
    np.testing.assert_array_equal(found, compute_multi_instance_mask(tumour.astype(np.uint8), JOINED_UM / 2 / pixel_um))
    wanted = compute_isolated_tumor_cells(found, ISOLATED_UM / pixel_um)
    assert isolated_cells(found, pixel_um).tolist() == wanted
    assert 0 < len(wanted) < found.max() or pixel_um in (100.0, 3.9)


@pytest.mark.parametrize("pixel_um", [2.0, 3.1, 5.0])
def test_discs_below_200_um_are_isolated_cells_and_near_ones_are_one(pixel_um: float) -> None:
    rows, columns = np.ogrid[: round(800 / pixel_um), : round(2400 / pixel_um)]

    def disc(x_um: float, y_um: float, across_um: float) -> np.ndarray:
        x, y = (columns + 0.5) * pixel_um - x_um, (rows + 0.5) * pixel_um - y_um
        return x**2 + y**2 < (across_um / 2) ** 2

    ring = disc(1800, 400, 400) & ~disc(1800, 400, 200)
    tumour = disc(300, 200, 185) | disc(900, 200, 215) | ring
    labels = lesion_labels(tumour, pixel_um)
    centres = ((300, 200), (900, 200), (1800, 400))
    small, large, filled = (labels[round(y / pixel_um), round(x / pixel_um)] for x, y in centres)
    assert len({0, small, large, filled}) == 4 and isolated_cells(labels, pixel_um).tolist() == [small]
    joined = lesion_labels(tumour | disc(300, 200 + 185 + 60, 185), pixel_um)
    assert joined.max() == 3 and len(isolated_cells(joined, pixel_um)) == 0


def test_no_tumour_is_no_lesion() -> None:
    assert not lesion_labels(np.zeros((5, 6), bool), 8.0).any()
    assert isolated_cells(np.zeros((5, 6), np.int32), 8.0).tolist() == []
    with pytest.raises(ConfigError, match="pixel_um=0"):
        lesion_labels(np.ones((2, 2), bool), 0)
