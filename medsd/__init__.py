"""medsd: tumour classifiers on whole-slide images whose explanations can be trusted and seen."""

__version__ = "0.1.0"
RESEARCH_USE_ONLY = "Research use only."
