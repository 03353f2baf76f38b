"""The stain of a slide: fitted once, kept as numbers, normalised to that of a target, changed in training."""

from medsd.slides.stain.profile import (
    METHODS,
    LabColours,
    Method,
    StainProfile,
    TwoStains,
    check_method,
    fit_picture,
    profile_from_dict,
    transform_between,
)

__all__ = [
    "METHODS",
    "LabColours",
    "Method",
    "StainProfile",
    "TwoStains",
    "check_method",
    "fit_picture",
    "profile_from_dict",
    "transform_between",
]
