"""Annotations of slides: which pixels are tumour, as a pathologist drew them.

One reader for all files (`read_annotations`), areas for labels of tiles (`tumour_share`) and
pixels (`rasterise`), and writers for ASAP and QuPath. Everything is in level-0 pixels of the slide, x to the right,
y down, origin at the top left.
"""

from medsd.annotations.areas import rasterise, tumour_share
from medsd.annotations.asap import write_asap_xml
from medsd.annotations.files import read_annotations
from medsd.annotations.geojson import write_geojson
from medsd.annotations.shapes import EXCLUDED_GROUPS, TUMOUR_GROUPS, Annotations, Outline, annotations_of

__all__ = [
    "EXCLUDED_GROUPS",
    "TUMOUR_GROUPS",
    "Annotations",
    "Outline",
    "annotations_of",
    "rasterise",
    "read_annotations",
    "tumour_share",
    "write_asap_xml",
    "write_geojson",
]
