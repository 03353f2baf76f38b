"""What AIM adds to a stage of its encoder: mask estimator, feature branch, and binary masks that can be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

# sigmoid(2) = 0.88: training starts with nearly open masks.
_OPEN_LOGIT = 2.0


class MaskEstimator(nn.Module):
    """Mask logits of a stage: 3 x 3 convolution, three residual blocks, then a 1 x 1 convolution plus a pooled branch.

    The parts are those of AIM (arXiv 2508.11502, as told by readers of it); widths, normalisation and how the pooled
    branch joins (added to every position, as in Verelst and Tuytelaars' released code) are our choice.

    Args:
        channels: channels C of the stage's features.
        width: channels of its own layers.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(channels, width), nn.ReLU(), *(_Residual(width) for _ in range(3)))
        self.spatial = nn.Conv2d(width, 1, 1)
        self.pooled = nn.Linear(width, 1)
        nn.init.constant_(self.spatial.bias, _OPEN_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of features (B, C, h, w); each depends on the whole image through the pooled branch."""
        body = self.body(features)
        logits: Tensor = self.spatial(body) + self.pooled(body.mean(dim=(2, 3)))[:, :, None, None]
        return logits


class FeatureBranch(nn.Sequential):
    """Features of a stage at the common width: 1 x 1 then 3 x 3 convolution, batch normalisation, ReLU.

    The form of feature pyramid networks (our choice: the paper's is not known). It is normalised before it is masked:
    statistics of masked features would carry the mask's area into every position.

    Args:
        channels: channels C of the stage's features.
        width: channels d of what it gives.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 1), *_convolution(width, width), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(width, width), nn.ReLU(), *_convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _convolution(channels: int, width: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)


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
    if has_torch_function_unary(logits):  # as torch's own functions do, so that DeepLift can give it a rule
        mask: Tensor = handle_torch_function(hard_mask, (logits,), logits)
        return mask
    logits = _in_full_precision(logits.detach())
    return torch.where(logits.isnan(), logits, (logits >= 0).to(logits.dtype))


def _in_full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
