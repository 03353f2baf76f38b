"""The linear decoder: it reads off masks that are linear in the maps, is reproducible, and stands beside its oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.mask_probe import (
    DecoderSettings,
    Masked,
    decoder_dice,
    dice_per_image,
    maps_of,
    oracle_masks,
    predict_masks,
    train_decoder,
)
from medsd.intervals import bootstrap_mean
from medsd.networks.classifier import create_encoder
from medsd.segment.linear import LinearDecoder

SHORT = DecoderSettings(steps=60, batch_size=4, lr=0.1)


def linear(images: int, classes: int = 2, seed: int = 0) -> Masked:
    """Maps (6, 8, 8) whose weighted sums, upsampled to 32 px, are the logits of the masks."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, 6, 8, 8, generator=generator) * torch.tensor([1, 5, 0.2, 1, 1, 0])[:, None, None] + 2
    weights = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    logits = torch.einsum("kc,nchw->nkhw", weights / torch.tensor([1, 5, 0.2, 1, 1, 1]), maps)
    logits = logits - logits.mean(dim=(0, 2, 3), keepdim=True)
    masks = F.interpolate(logits, (32, 32), mode="bilinear").argmax(dim=1)
    return Masked(maps.half(), masks.to(torch.uint8), np.arange(images) // 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_masks_linear_in_the_maps_are_read_off(classes: int) -> None:
    train, test = linear(24, classes), linear(9, classes, seed=1)
    found = decoder_dice(train, test, SHORT)
    assert found.dice.value > 0.93 and found.dice.low <= found.dice.value <= found.dice.high
    assert 0.85 < found.oracle.value < 1
    assert (found.images, found.groups, found.stride) == (9, 3, 4.0)
    oracle = dice_per_image(oracle_masks(test.masks, (8, 8), classes), test.masks, classes)
    for interval, values in ((found.dice, found.per_image), (found.oracle, oracle)):
        assert interval == bootstrap_mean(values, groups=test.groups)
    noise = Masked(torch.randn(9, 6, 8, 8, generator=torch.Generator().manual_seed(3)).half(), test.masks, test.groups)
    assert decoder_dice(train, noise, SHORT).dice.value < 0.7


def test_the_seed_decides_and_torch_s_own_generator_is_left_alone() -> None:
    train = linear(12)
    before = torch.random.get_rng_state()
    one, same = (train_decoder(train, DecoderSettings(steps=5, batch_size=4, seed=1)) for _ in range(2))
    other = train_decoder(train, DecoderSettings(steps=5, batch_size=4, seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.convolution.weight, same.convolution.weight)
    assert not torch.equal(one.convolution.weight, other.convolution.weight)


def test_the_learning_rate_falls_as_a_cosine() -> None:
    """Adam's first steps are as long as it is: of two the second is half as long."""
    settings = [DecoderSettings(steps=steps, batch_size=4, lr=1e-4, weight_decay=0) for steps in (1, 2)]
    one, two = (train_decoder(linear(4), each).convolution.weight.detach() for each in settings)
    assert float((two / one).nanmedian()) == pytest.approx(1.5, rel=0.01)


def test_test_masks_change_no_prediction() -> None:
    train, test = linear(12), linear(6, seed=1)
    turned = Masked(test.maps, 1 - test.masks, test.groups)
    settings = DecoderSettings(steps=10, batch_size=4)
    one, other = (decoder_dice(train, each, settings) for each in (test, turned))
    found = predict_masks(train_decoder(train, settings), test.maps, (32, 32))
    np.testing.assert_array_equal(one.per_image, dice_per_image(found, test.masks, 2))
    np.testing.assert_array_equal(other.per_image, dice_per_image(found, turned.masks, 2))


def test_channels_of_any_scale_do_alike() -> None:
    """Half precision of the channels is all that differs."""
    train, test = linear(12), linear(6, seed=1)
    scale = torch.tensor([4.0, 0.25, 64, 1, 8, 2])[:, None, None]
    scaled = [Masked((each.maps * scale).half(), each.masks, each.groups) for each in (train, test)]
    settings = DecoderSettings(steps=10, batch_size=4)
    one, other = decoder_dice(train, test, settings), decoder_dice(scaled[0], scaled[1], settings)
    np.testing.assert_allclose(one.per_image, other.per_image, atol=0.01)


def test_convolution_and_upsampling_commute() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = LinearDecoder(torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5, 3)
    with torch.no_grad():
        decoder.convolution.weight.normal_(generator=generator)
        decoder.convolution.bias.fill_(0.3)  # type: ignore[union-attr]
    maps = torch.randn(2, 5, 4, 6, generator=generator)
    full = F.interpolate(maps, (32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(maps, (32, 48)), decoder(full, (32, 48)), rtol=1e-4, atol=1e-4)


def test_the_oracle_knows_what_fits_its_cells_and_misses_what_is_finer() -> None:
    blocks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    blocks[:, :16] = 1  # on cell borders: the upsampled ramp crosses 1/2 there
    assert dice_per_image(oracle_masks(blocks, (4, 4), 2), blocks, 2).tolist() == [1.0]
    fine = torch.zeros(1, 32, 32, dtype=torch.uint8)
    fine[:, ::4, ::4] = 1
    assert dice_per_image(oracle_masks(fine, (4, 4), 2), fine, 2).tolist() == [0.0]
    round_ = torch.tensor([[(x - 20) ** 2 + (y - 27) ** 2 < 81 for x in range(64)] for y in range(64)])[None]
    dice = [dice_per_image(oracle_masks(round_.byte(), (n, n), 2), round_.byte(), 2)[0] for n in (64, 16, 8, 4)]
    assert dice[0] == 1 and dice == sorted(dice, reverse=True) and dice[1] > 0.95 > 0.9 > dice[3]


def test_the_oracle_s_cells_are_the_best_in_least_squares() -> None:
    masks = (torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(0)) < 0.4).to(torch.uint8)
    size = (24, 32)
    columns = F.interpolate(torch.eye(24).view(24, 1, 4, 6), size, mode="bilinear").flatten(1).T
    expected = columns @ torch.linalg.lstsq(columns, masks.flatten(1).T.float()).solution
    assert torch.equal(oracle_masks(masks, (4, 6), 2).flatten(1), (expected.T > 0.5).to(torch.uint8))


def test_dice_by_hand() -> None:
    mask = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    found = torch.tensor([[[0, 1], [0, 2]], [[0, 0], [0, 1]], [[0, 0], [1, 0]]], dtype=torch.uint8)
    dice = dice_per_image(found, mask, 3)
    np.testing.assert_allclose(dice[:2], [(2 / 3 + 1) / 2, 2 / 3])  # a class that an image lacks does not count
    assert np.isnan(dice[2])


def test_maps_of_a_layer() -> None:
    encoder, _ = create_encoder("test_resnet", pretrained=False)
    images = torch.randint(256, (5, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = maps_of(encoder, images.split(2), "layer2")
    assert maps.shape[0] == 5 and maps.shape[2:] == (8, 12) and maps.dtype == torch.float16
    with torch.no_grad():
        encoder.get_parameter("bn1.weight").mul_(1e9)
    with pytest.raises(DatasetError, match="half precision"):
        maps_of(encoder, [images], "bn1")
    with pytest.raises(DatasetError, match="no images"):
        maps_of(encoder, [])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("maps", "masks", "words"),
    [
        (torch.zeros(2, 3, 4), zeros(2, 8, 8), r"maps \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, 4), zeros(3, 8, 8), r"masks \(3, 8, 8\)"),
        (torch.zeros(0, 3, 4, 4), zeros(0, 8, 8), r"groups \(0,\)"),
        (torch.zeros(2, 3, 4, 4), zeros(2, 8, 8).float(), "masks are torch.float32"),
    ],
)
def test_maps_without_their_masks_are_refused(maps: Tensor, masks: Tensor, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        Masked(maps, masks, np.arange(len(maps)))


def test_a_decoder_says_what_it_lacks() -> None:
    train = linear(6)
    empty = Masked(train.maps, zeros(6, 32, 32), train.groups)
    short = DecoderSettings(steps=1)
    for one, other, words in (
        (empty, train, "all training masks are empty"),
        (train, empty, "all test masks are empty"),
        (train, Masked(train.maps[:, :3], train.masks, train.groups), "6 channels to train on, 3 to test on"),
        (train, Masked(train.maps, train.masks * 2, train.groups), "class 2 in a test mask; .* end at 1"),
    ):
        with pytest.raises(DatasetError, match=words):
            decoder_dice(one, other, short)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 1.5}, {"lr": 0.0}, {"weight_decay": -1.0}, {"seed": -1}]
)
def test_a_schedule_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DecoderSettings(**wrong)
