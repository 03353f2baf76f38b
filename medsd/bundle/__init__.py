"""What the bundles' JSON refers to. JSON keeps choices; these functions wire the library, as the `medsd` command does.

A user's mistake ends the run with one line and exit code 1; MONAI would print a chain of tracebacks.
"""

from medsd.bundle.config import check_config
from medsd.bundle.data import default_device, patch_data, slide_data
from medsd.bundle.stages import (
    check_slides,
    classifier,
    dataset,
    evaluate,
    finetune,
    heatmap,
    prepare,
    report,
    sampler,
    step,
    summary,
)

__all__ = [
    "check_config",
    "check_slides",
    "classifier",
    "dataset",
    "default_device",
    "evaluate",
    "finetune",
    "heatmap",
    "patch_data",
    "prepare",
    "report",
    "sampler",
    "slide_data",
    "step",
    "summary",
]
