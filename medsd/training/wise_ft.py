"""Weights between those that a fine-tuning started from and those that it reached."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from medsd.checks import check_number


def weight_space_ensemble(
    start: Mapping[str, Tensor], trained: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) of the weights before fine-tuning and alpha of those after it, one network at the cost of one.

    WiSE-FT (Wortsman et al., CVPR 2022, section 3), with the head among the mixed weights: it must mean the same before
    as after, as one from a regression does. Running averages of BatchNorm are mixed, too, which is exact where they
    are frozen. What is not floating point is the trained network's.

    Args:
        start, trained: state dicts of one network.
        alpha: 1 is the trained network, 0 the start.

    Raises:
        ConfigError: alpha beyond 0 to 1.
    """
    check_number("wise_ft_alpha", alpha, "[0, 1]")
    # Lerp is exact at both ends.
    return {
        name: start[name].to(value).lerp(value, alpha) if value.is_floating_point() else value
        for name, value in trained.items()
    }
