"""tiatoolbox's tissue maskers, by choice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import Bools
from medsd.slides.tiatoolbox_import import logging_untouched
from medsd.slides.tissue.morphology import drop_small

_WHITE = np.uint8(255)


def masked_by_tiatoolbox(
    image: npt.NDArray[np.uint8], mpp: float, seen: Bools | None = None, morphology: bool = False
) -> Bools:
    """tiatoolbox's `OtsuTissueMasker` (darker than Otsu's threshold on grey) or `MorphologicalMasker`.

    They know nothing of ink, frames and blank glass: something is always darker than Otsu's threshold.

    Args:
        image: RGB, shape (h, w, 3), uint8.
        mpp: micrometres per pixel of the image.
        seen: False where the image shows nothing, shape (h, w): no tissue there, and no part in the threshold.
        morphology: small pieces dropped, the others grown (`MorphologicalMasker`).

    Returns:
        shape (h, w).
    """
    with logging_untouched():
        import cv2
        from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker

    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    if seen is None:
        seen = np.ones(grey.shape, np.bool_)
    if not seen.any():
        return seen
    masker = MorphologicalMasker(mpp=mpp) if morphology else OtsuTissueMasker()
    # Grey as one channel: the fit would make a list of each pixel of a colour image.
    masker.fit(grey[seen].reshape(1, 1, -1, 1))
    grey = np.where(seen, grey, _WHITE)
    if morphology:
        # The same pieces that the masker would drop, which takes it a pass over the picture for each.
        grey = np.where(drop_small(grey < masker.threshold, masker.min_region_size - 1, corners=True), grey, _WHITE)
    return np.asarray(masker.transform(grey[None, ..., None])[0].reshape(grey.shape), np.bool_) & seen
