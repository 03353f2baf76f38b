"""Where a network runs."""

from __future__ import annotations

import torch

from medsd.errors import ConfigError


def usable_device(device: torch.device | str) -> torch.device:
    """The device, tried out.

    Raises:
        ConfigError: it cannot be used here.
    """
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device '{device}': cannot be used here ({reason}); try 'cpu', see medsd doctor") from error
