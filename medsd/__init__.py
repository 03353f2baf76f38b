"""medsd: tumour classifiers on whole-slide images whose explanations can be trusted and seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medsd.heatmap.maps import SlideMaps
    from medsd.heatmap.model import MapModel
    from medsd.heatmap.notebook import SlideView
    from medsd.heatmap.value_map import ValueMap
    from medsd.slides.slide import Slide

__version__ = "0.2.0"
RESEARCH_USE_ONLY = "Research use only."


def view(
    slide: Slide | str | Path, maps: SlideMaps | Mapping[str, ValueMap], model: MapModel | None = None
) -> SlideView:
    """A slide and its maps, for a notebook: the slide as stained, then each map over it in light grey, with its bar.

    Hue is the map's: orange for the class, blue against it, stronger the larger the value.

    Args:
        slide: an open slide, or its file.
        maps: what `Engine.map` gave; or maps by the names of their methods, such as
            `{"deeplift": read_ome_tiff("maps/HE/saliency.ome.tif")}`, and "probability".
        model: what made them, see `load_map_model`: colours then end where the weights say, the same on every slide,
            and with an engine's maps regions and score are shown. Without it they end at the 99.5th percentile of
            the slide's own absolute values, which compare with no other slide.

    Returns:
        What a notebook shows where it is the last value of a cell; `save(path)` writes it as PNG.

    Raises:
        ConfigError: no maps, no such method, or a map without values.
        DatasetError: maps of a slide of another size.
        SlideError: the slide cannot be read.

    Example:
        >>> import numpy as np
        >>> from medsd.heatmap.value_map import ValueMap
        >>> values = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
        >>> drawn = ValueMap(values, 64.0, 32.0, "saliency", "tumour", "drawn", "log-odds")
        >>> view("slide.tif", {"deeplift": drawn}).save("view.png")
    """
    from medsd.heatmap.notebook import view_slide  # torch and matplotlib are slow to import

    return view_slide(slide, maps, model)
