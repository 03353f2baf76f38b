"""Smooth Deep Saliency (arXiv 2404.02282): gradients without the checkerboard of strided modules."""

from medsd.saliency.smooth.bilinear import Surrogate
from medsd.saliency.smooth.box import Boundary, Box
from medsd.saliency.smooth.hooks import backward_hook, forward_hook, surrogate
from medsd.saliency.smooth.points import Also, Point, strided_points
from medsd.saliency.smooth.training import PointError, SurrogateReport, measure_surrogate, train_surrogate

__all__ = [
    "Also",
    "Boundary",
    "Box",
    "Point",
    "PointError",
    "Surrogate",
    "SurrogateReport",
    "backward_hook",
    "forward_hook",
    "measure_surrogate",
    "strided_points",
    "surrogate",
    "train_surrogate",
]
