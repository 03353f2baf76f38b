"""The pretended GPU is like one; on it the default bundle's steps and maps have everything on one device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch

from tests.pretended_gpu import GPU, OnGpu, OtherDeviceError

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


REFUSED: dict[str, tuple[type[Exception], Callable[[torch.Tensor, torch.Tensor], object]]] = {
    "sum": (OtherDeviceError, lambda here, there: here + there),
    "written into": (OtherDeviceError, lambda here, there: here.add_(there)),
    "its indices": (OtherDeviceError, lambda here, there: here[there.long()]),
    "a layer": (OtherDeviceError, lambda here, there: torch.nn.Linear(4, 2)(there)),
    "a number of the CPU written into": (OtherDeviceError, lambda here, there: torch.zeros(()).add_(there.sum())),
    "numpy": (TypeError, lambda here, there: np.asarray(there)),
    "draws": (RuntimeError, lambda here, there: torch.rand(4, device=GPU, generator=torch.Generator())),
    "draws in place": (RuntimeError, lambda here, there: there.normal_(generator=torch.Generator())),
    "backward": (OtherDeviceError, lambda here, there: _returns_of_the_cpu(there)),
}


def _returns_of_the_cpu(there: torch.Tensor) -> None:
    leaf = there.clone().requires_grad_()
    middle = leaf * 2
    middle.register_hook(lambda gradient: torch.ones(4))
    (middle * leaf).sum().backward()


@pytest.mark.parametrize("what", REFUSED)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu: torch.device, what: str) -> None:
    error, attempt = REFUSED[what]
    with pytest.raises(error):
        attempt(torch.zeros(4), torch.ones(4, device=gpu))


def test_what_a_gpu_allows_is_the_cpus(gpu: torch.device) -> None:
    there = torch.arange(6.0).to(gpu).view(2, 3)
    assert there.device == gpu and isinstance(there, OnGpu)
    assert (there * torch.tensor(2.0))[:, torch.tensor([1])].cpu().tolist() == [[2.0], [8.0]]
    there[0, 0] = 7.0
    assert torch.zeros(2, 3).copy_(there).sum().item() == 22.0
    assert torch.rand(3, device=gpu, generator=torch.Generator(gpu).manual_seed(1)).device == gpu
    first, second = (timm.create_model("test_resnet").eval().requires_grad_() for _ in range(2))
    second.load_state_dict(first.state_dict())
    second.to(gpu)
    first(IMAGES).logsumexp(1).sum().backward()
    second(IMAGES.to(gpu)).logsumexp(1).sum().backward()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(b.grad.device == gpu and torch.equal(a.grad, b.grad.cpu()) for a, b in pairs)
