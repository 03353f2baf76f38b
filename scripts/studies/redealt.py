"""Means and differences over seeds or folds that deal the same groups anew: patients, stain clusters, stretches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

# Of a job's results: by side, items tested on over items trained on, of what its seed or fold deals.
# Studies compute it from the data when tables are made, so that results of before have it, too.
RATIOS = "test over training"


def ratio_of(results: Iterable[dict[str, Any]], side: str = "testing") -> float:
    """Items tested on over items trained on, in the mean of the jobs of a comparison."""
    return float(np.mean([found[RATIOS][side] for found in results]))


def half_width(differences: npt.NDArray[np.float64], ratio: float) -> float:
    """Half of the 95 % interval of a mean of differences, each of another deal of the same groups.

    The corrected resampled t-test of Nadeau and Bengio (*Inference for the generalization error*, Machine Learning 52,
    2003): deals share groups on either side, so that the variance of their mean is that of the differences times
    1 / n + (items tested on) / (items trained on), and not 1 / n. What is in every training side and never tested on
    counts for neither. A ratio of 0 is Student's t, for deals that share nothing.
    """
    count = len(differences)
    error = np.sqrt((1 / count + ratio) * differences.var(ddof=1))
    return float(stats.t.ppf(0.975, count - 1) * error)


def mean_of(values: npt.NDArray[np.float64], digits: int) -> str:
    """Mean and standard error, which is over deals as if they shared nothing; empty where nothing was measured."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    spread = f" ± {stats.sem(known):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"


def difference_of(values: npt.NDArray[np.float64], digits: int, ratio: float) -> str:
    """Mean difference with its 95 % interval, see `half_width`; without one where nothing varies."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    mean = known.mean()
    if len(known) < 2 or known.std() == 0:
        return f"{mean:+.{digits}f}"
    half = half_width(known, ratio)
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
