"""What the bundles' JSON refers to and the library does not have: stages, data sets, the check of a configuration."""

from medsd.bundle.config import check, check_config, mistake
from medsd.bundle.finetuning import finetune
from medsd.bundle.pretraining import pretrain
from medsd.bundle.probing import probe
from medsd.bundle.segmentation import score_masks, segment, segmentation_summary
from medsd.bundle.stages import check_slides, evaluate, explain, heatmap, prepare, report, summary
from medsd.bundle.surrogates import surrogate

__all__ = [
    "check",
    "check_config",
    "check_slides",
    "evaluate",
    "explain",
    "finetune",
    "heatmap",
    "mistake",
    "prepare",
    "pretrain",
    "probe",
    "report",
    "score_masks",
    "segment",
    "segmentation_summary",
    "summary",
    "surrogate",
]
