"""Binary masks that can be learned: Gumbel noise, a hard threshold, and the gradient of the sigmoid behind it."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_mask(logits: Tensor, temperature: float, noise: bool, generator: torch.Generator | None = None) -> Tensor:
    """Straight-through sample of a mask: its value is 0 or 1, its gradient that of sigmoid(logits / temperature).

    The difference of two Gumbel variables is one logistic variable, so one draw a position is enough; a position is
    active with the probability sigmoid(logit), whatever the temperature. AIM (arXiv 2508.11502) names Gumbel-Softmax;
    the sigmoid form is that of Verelst and Tuytelaars (arXiv 1912.03203, released code), with the same law.

    Args:
        logits: any shape; half precision is computed in float32, also under autocast.
        temperature: of the gradient, above 0; higher is flatter.
        noise: False leaves the Gumbel noise out: the threshold is then that of `hard_mask`.
        generator: draws the noise, on the device of `logits`; torch's own where None.

    Returns:
        The mask in the shape of `logits`, float32 or float64. NaN stays NaN, for a broken network must not pass as an
        empty mask.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _in_full_precision(logits)
        if noise:
            uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
            # 0 would be an infinite draw, whose sigmoid has no gradient.
            uniform = uniform.clamp_min(torch.finfo(logits.dtype).eps / 2)
            logits = logits + uniform.log() - (-uniform).log1p()
        soft = (logits / temperature).sigmoid()
        # Added to the difference, which is exactly 0, the value stays exactly 0 or 1.
        return hard_mask(logits) + (soft - soft.detach())


def hard_mask(logits: Tensor) -> Tensor:
    """The mask of evaluation: 1 where the logit is 0 or more, else 0; no gradient. Shape and type as `gumbel_mask`."""
    logits = _in_full_precision(logits.detach())
    return torch.where(logits.isnan(), logits, (logits >= 0).to(logits.dtype))


def _in_full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
