"""The three kinds of data that `bundles/segmentation.json` trains on: slides with outlines, folders, CT volumes."""

from medsd.bundle.masks.base import MaskData
from medsd.bundle.masks.folder import MaskFolder
from medsd.bundle.masks.slides import OutlinedSlides
from medsd.bundle.masks.volumes import LabelledVolumes

__all__ = ["LabelledVolumes", "MaskData", "MaskFolder", "OutlinedSlides"]
