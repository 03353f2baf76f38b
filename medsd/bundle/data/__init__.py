"""The two kinds of data that a bundle trains on: whole slides, and patches on disk."""

from medsd.bundle.data.patches import PatchData
from medsd.bundle.data.slides import Phantoms, SlideData

__all__ = ["Data", "PatchData", "Phantoms", "SlideData"]

# What the stages ask of a data set is what both offer.
Data = SlideData | PatchData
