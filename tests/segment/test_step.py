"""The step: masks go where their images go, and one step is MONAI's loss on smp's network."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from medsd.errors import ConfigError, TrainingError
from medsd.segment.network import SegmentationNetwork
from medsd.segment.step import SegmentationStep

LOSS = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)


def batch(count: int = 4, side: int = 32) -> dict[str, Tensor]:
    """Masks that are their image's red channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": images[:, :1] // 128}


def engine(network: SegmentationNetwork, optimizer: torch.optim.Optimizer | None = None, iteration: int = 1) -> Any:
    state = SimpleNamespace(device=torch.device("cpu"), iteration=iteration, epoch=1, epoch_length=10)
    return SimpleNamespace(
        network=network,
        loss_function=LOSS,
        optimizer=optimizer or torch.optim.SGD(network.parameters(), 0.1),
        state=state,
    )


def test_masks_are_cut_and_turned_with_their_images() -> None:
    given, step = batch(64), SegmentationStep(stain=0.0, crop_px=20)
    images, masks = step.augmented(given["image"], given["label"], torch.Generator().manual_seed(1))
    assert images.shape == (64, 3, 20, 20) and torch.equal(masks, images[:, :1] // 128)
    assert len({tuple(image.flatten()[:50].tolist()) for image in images}) == 64
    fixed = SegmentationStep(stain=0.0, turns=False)
    images, masks = fixed.augmented(given["image"], given["label"], torch.Generator().manual_seed(1))
    assert torch.equal(images, given["image"]) and torch.equal(masks, given["label"])
    stained, masks = SegmentationStep(stain=0.3, turns=False).augmented(
        given["image"], given["label"], torch.Generator().manual_seed(1)
    )
    assert torch.equal(masks, given["label"]) and not torch.equal(stained, given["image"])


def test_a_step_is_the_plain_one_and_accumulation_changes_it_little() -> None:
    torch.manual_seed(0)
    network, given = SegmentationNetwork("test_resnet", ("background", "dark"), "fpn"), batch()
    network.model.decoder.dropout.p = 0.0
    by_hand = copy.deepcopy(network).train()
    found = SegmentationStep(stain=0.0, turns=False)(engine(network), given)
    optimiser = torch.optim.SGD(by_hand.parameters(), 0.1)
    loss = LOSS(by_hand(given["image"]), given["label"])
    loss.backward()
    optimiser.step()
    assert found == {"loss": pytest.approx(loss.item(), rel=1e-6)}
    for (name, one), other in zip(network.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_what_cannot_be_stepped_is_told() -> None:
    network = SegmentationNetwork("test_resnet", ("background", "dark"), "fpn")
    with pytest.raises(ConfigError, match="crop_px=64: images are 32 x 32 px; lower it"):
        SegmentationStep(crop_px=64)(engine(network), batch())
    with pytest.raises(ConfigError, match="crop_px=2"):
        SegmentationStep(crop_px=2)
    with torch.no_grad():
        network.model.segmentation_head[0].bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan"):
        SegmentationStep()(engine(network), batch())
