"""What the tests of saliency share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def lively() -> Callable[[nn.Module], nn.Module]:
    """Gives a network's BatchNorms random weights and statistics, so that no branch of it is silent; in eval mode."""

    def draw(network: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 0.9)
                for shift in (module.bias, module.running_mean):
                    nn.init.normal_(shift, 0, 0.2)
        return network.eval()

    return draw
