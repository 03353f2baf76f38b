"""medsd: tumour classifiers on whole-slide images whose explanations can be trusted and seen."""

__version__ = "0.1.0"
