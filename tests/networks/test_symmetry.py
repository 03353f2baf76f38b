"""Symmetric networks: answers that no turn of the image changes, and maps that turn with it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medsd.errors import ConfigError
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier
from medsd.networks.modes import recorded
from medsd.networks.symmetry import SYMMETRIES, is_symmetric, turned, turned_back, upright
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.saliency.neutral import neutral_from_images
from medsd.saliency.registry import METHODS, make_method
from tests.heatmap.made_up import spread

LAYER = "encoder.layer2"
CLASS_METHODS = [name for name, card in METHODS.items() if card.needs_label]
LABEL_FREE = [name for name, card in METHODS.items() if not card.needs_label]


@pytest.fixture(scope="module")
def network() -> TileClassifier:
    torch.manual_seed(0)
    made = spread(TileClassifier("test_resnet", test_time_augmentation=True))
    made.head.weight.data *= 20
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_symmetries_are_numpys_and_are_undone() -> None:
    values = np.arange(12).reshape(1, 3, 4)
    for number in SYMMETRIES:
        expected = np.rot90(values, number % 4, axes=(1, 2))
        expected = expected[..., ::-1] if number >= 4 else expected
        found = turned(torch.from_numpy(values), number)
        assert np.array_equal(found.numpy(), expected)
        assert np.array_equal(turned_back(found, number).numpy(), values)


def test_images_that_are_nhwc_stay_so() -> None:
    images = torch.rand(2, 8, 8, 3).permute(0, 3, 1, 2)
    for number in SYMMETRIES:
        assert turned(images, number).is_contiguous(memory_format=torch.channels_last)


def test_the_eight_differ() -> None:
    values = torch.arange(9).view(3, 3)
    assert len({tuple(turned(values, number).flatten().tolist()) for number in SYMMETRIES}) == 8


@torch.no_grad()
def test_the_answer_is_the_mean_of_eight_and_training_sees_one(network: TileClassifier, images: torch.Tensor) -> None:
    with upright(network):
        alone = torch.stack([network(turned(images, number)) for number in SYMMETRIES])
    assert not torch.allclose(alone[0], alone[5], atol=1e-2)
    torch.testing.assert_close(network(images), alone.mean(dim=0))
    for number in SYMMETRIES:
        torch.testing.assert_close(network(turned(images, number)), network(images), rtol=1e-4, atol=1e-4)
    for module in (frozen := network.train()).modules():  # as `training` leaves a network whose BatchNorm is frozen
        module.training = module is frozen
    try:
        torch.testing.assert_close(network(images), alone[0])
    finally:
        network.eval()


def test_images_need_not_be_square(network: TileClassifier) -> None:
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 64, 96, dtype=torch.uint8)).shape == (2, 2)
    maps = make_method("gradient_x_activation", network, LAYER)(torch.rand(2, 3, 64, 96), 1)
    assert maps.shape[1:] == (8, 12)


@pytest.mark.parametrize("name", CLASS_METHODS)
def test_maps_turn_with_the_image(network: TileClassifier, images: torch.Tensor, name: str) -> None:
    """Noise of SmoothGrad does not turn with the images: its map is compared with itself only in the mean."""
    method = make_method(name, network, LAYER, "evidence")
    x = network.normalise(images)
    found = method(x, 1)
    assert found.abs().max() > 0
    if name == "smoothgrad":
        return
    for number in (1, 6):
        torch.testing.assert_close(method(turned(x, number), 1), turned(found, number), rtol=1e-3, atol=1e-4)
    # ... and are the mean of what the method says of each view, by hand.
    with upright(network):
        alone = make_method(name, network, LAYER, "evidence")
        by_hand = [turned_back(alone(turned(x, number), 1), number) for number in SYMMETRIES]
    assert not torch.allclose(by_hand[0], found, atol=1e-3)
    torch.testing.assert_close(found, torch.stack(by_hand).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_class_that_is_predicted_is_that_of_the_mean(network: TileClassifier, images: torch.Tensor) -> None:
    x = network.normalise(images)
    explanation = make_method("gradient", network, LAYER).explain(x)  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = network(x)
    torch.testing.assert_close(explanation.logits, logits)
    assert explanation.target.tolist() == logits.argmax(dim=1).tolist()


def test_the_map_against_the_neutral_reference_adds_up_to_the_mean(
    network: TileClassifier, images: torch.Tensor
) -> None:
    network, x, odds = copy.deepcopy(network), network.normalise(images), torch.tensor([-1.0, 1.0])
    with torch.no_grad(), upright(network):
        network.head.bias -= odds * (network(x) @ odds).median() / 2  # images on both sides
        network.head.bias += odds / 2 * 1e-2
    reference = neutral_from_images(network, LAYER, [x], "evidence", 1)
    vector = torch.tensor(reference.vector)
    maps = make_method("deeplift", network, LAYER, "evidence", reference=vector)(x, 1)
    with torch.no_grad():
        log_odds = network(x) @ odds
    assert log_odds.abs().max() > 0.1
    torch.testing.assert_close(maps.sum(dim=(1, 2)) * len(vector), log_odds, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LABEL_FREE)
def test_label_free_maps_are_of_the_image_as_it_is(network: TileClassifier, images: torch.Tensor, name: str) -> None:
    x = network.normalise(images)
    found = make_method(name, network, LAYER)(x)
    with upright(network):
        expected = make_method(name, network, LAYER)(x)
    torch.testing.assert_close(found, expected)


def test_what_is_recorded_is_of_the_image_as_it_is(network: TileClassifier, images: torch.Tensor) -> None:
    with torch.no_grad(), recorded(network, LAYER) as outputs:
        network(images)
    with torch.no_grad(), recorded(network.encoder, "layer2") as expected:
        network.encoder(network.normalise(images))
    torch.testing.assert_close(outputs[0], expected[0])
    assert is_symmetric(network)


def test_weights_remember_it(tmp_path, network: TileClassifier, images: torch.Tensor) -> None:
    assert network.options == {"test_time_augmentation": True}
    card = ModelCard("test_resnet", network.classes, 64, 1.0, "nothing", options=network.options)
    save_classifier(tmp_path / "w.safetensors", network, card)
    loaded, _, _ = load_classifier(tmp_path / "w.safetensors")
    assert loaded.test_time_augmentation
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(images))
    loaded.augment_at_test_time(False)
    assert loaded.options == {}


@torch.no_grad()
def test_aim_opens_its_masks_as_a_mean_of_eight(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = spread(AimClassifier("test_resnet", feature_width=16, mask_width=8, test_time_augmentation=True))
    assert network.options["test_time_augmentation"] is True
    features = network.encoder.forward_intermediates(network.normalise(images), intermediates_only=True)[-4:]
    for stage, estimator in network.mask_estimators.items():
        estimator.spatial.bias -= estimator(features[int(stage)]).median()  # neither all open nor all closed
    logits, share = network.open_share(images)
    torch.testing.assert_close(logits, network(images))
    with upright(network):
        alone = [turned_back(network.open_share(turned(images, number))[1], number) for number in SYMMETRIES]
    assert not torch.equal(alone[0], alone[1])
    torch.testing.assert_close(share, torch.stack(alone).mean(dim=0))
    assert network.open_share(torch.zeros(1, 3, 64, 96), whole=True)[1].shape == (1, 64, 96)


def test_test_time_augmentation_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="test_time_augmentation"):
        TileClassifier("test_resnet", test_time_augmentation=8)  # type: ignore[arg-type]


def test_a_foreign_network_with_such_a_name_is_none() -> None:
    foreign = nn.Conv2d(3, 2, 1)
    foreign.test_time_augmentation = True  # type: ignore[assignment]
    assert not is_symmetric(foreign)
    with upright(foreign):
        assert foreign.test_time_augmentation


@pytest.mark.parametrize("each", [False, True])
def test_a_baseline_turns_with_the_images(network: TileClassifier, each: bool) -> None:
    """One with a picture in it; of oblong images its sides are to be swapped as well."""
    x, baseline = (torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    baseline = baseline if each else baseline[0]
    found = make_method("deeplift", network, None, "evidence", {"baseline": baseline}).attribute(x, 1)
    with torch.no_grad():
        change = network(x) - network(baseline.expand_as(x))
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), change[:, 1] - change[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "layer", "option"),
    [("deeplift", LAYER, "reference"), ("integrated_gradients", None, "baseline")],
)
def test_what_maps_compare_with_turns_with_the_images(
    network: TileClassifier, name: str, layer: str | None, option: str
) -> None:
    x, given = (torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    if layer is not None:
        with recorded(network, layer) as outputs, upright(network), torch.no_grad():
            network(given)
        given = outputs[0]
    options = {} if name == "deeplift" else {"steps": 3}
    found = make_method(name, network, layer, "evidence", {option: given[0], **options}).attribute(x, 1)
    by_hand = []
    with upright(network):
        for number in SYMMETRIES:
            view = {option: turned(given[0], number), **options}
            by_hand.append(
                turned_back(make_method(name, network, layer, "evidence", view).attribute(turned(x, number), 1), number)
            )
    torch.testing.assert_close(found, torch.stack(by_hand).mean(dim=0))
