"""What the bundles' JSON refers to. JSON keeps choices; these functions wire the library, as the `medsd` command does.

A user's mistake ends the run with one line and exit code 1; MONAI would print a chain of tracebacks.
"""

from medsd.bundle.config import check_config
from medsd.bundle.data import default_device, patch_data, slide_data
from medsd.bundle.explain import explain
from medsd.bundle.stages import check_slides, evaluate, finetune, heatmap, prepare, report, summary
from medsd.bundle.surrogate import surrogate
from medsd.bundle.training import (
    aim,
    aim_classifier,
    classifier,
    dataset,
    hard_negatives,
    map_settings,
    parameters,
    place,
    saliency_decor,
    sampler,
    start_ranks,
    step,
    stop_ranks,
)

__all__ = [
    "aim",
    "aim_classifier",
    "check_config",
    "check_slides",
    "classifier",
    "dataset",
    "default_device",
    "evaluate",
    "explain",
    "finetune",
    "hard_negatives",
    "heatmap",
    "map_settings",
    "parameters",
    "patch_data",
    "place",
    "prepare",
    "report",
    "saliency_decor",
    "sampler",
    "slide_data",
    "start_ranks",
    "step",
    "stop_ranks",
    "summary",
    "surrogate",
]
