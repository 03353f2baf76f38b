"""Where the tissue of a slide is: a mask at low resolution, and its share of tiles and of other grids."""

from medsd.slides.tissue.find import METHODS, TissueMask, find_tissue
from medsd.slides.tissue.saturation import tissue_from_rgb

__all__ = ["METHODS", "TissueMask", "find_tissue", "tissue_from_rgb"]
