"""A head that starts from a regression: the same logits as the probe's, and refused where it means nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from medsd.bundle.finetuning import _check_methods, finetune, tell_of_best_epoch, tell_of_incomplete
from medsd.bundle.head import start_head
from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.evaluate.probes import Labelled, features_of, linear_probe
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.step import ObjectiveStep


class Items(torch.utils.data.Dataset[Any]):
    """Noise that is lighter in some classes, in six groups."""

    def __init__(self, classes: int) -> None:
        self.labels = np.arange(48) % classes
        self.groups = np.arange(48) // 8
        shades = torch.from_numpy(40 * self.labels)[:, None, None, None]
        noise = torch.randint(0, 120, (48, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        self.images = (noise + shades).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[item], "label": torch.tensor(int(self.labels[item]))}


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_gives_what_the_probe_gives(classes: int) -> None:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet", ["a", "b", "c"][:classes])
    items: Any = Items(classes)
    start_head(network, items)
    with torch.inference_mode():
        logits = network.eval()(items.images).double().numpy()
    rest = np.stack([logsumexp(np.delete(logits, number, axis=1), axis=1) for number in range(classes)], axis=1)
    known = Labelled(features_of(network.encoder, items.images.split(16)), items.labels, items.groups)
    np.testing.assert_allclose(logits - rest, linear_probe(known, known.features), atol=1e-3)
    assert (logits.argmax(axis=1) == items.labels).mean() > 0.8


def test_a_head_that_whitens_has_no_such_start() -> None:
    network = SimpleNamespace(head=WhitenedHead(8, 2, 4))
    with pytest.raises(ConfigError, match="set whitening to false"):
        start_head(network, Items(2))  # type: ignore[arg-type]


def test_a_class_of_one_group_is_told() -> None:
    items: Any = Items(2)
    items.groups = items.labels
    with pytest.raises(DatasetError, match=r"head_start='regression': .*one training group only.*set it to random"):
        start_head(TileClassifier("test_resnet"), items)


@pytest.mark.parametrize(
    ("objective", "complete_from", "epochs", "told"),
    [
        (SaliencyDecor(warm_epochs=1), 2, 2, False),
        (SaliencyDecor(warm_epochs=2), 3, 2, True),
        (SaliencyDecor(consistency=0, decorrelation=0, warm_epochs=2), 1, 2, False),  # what was asked for
    ],
)
def test_an_objective_that_never_comes_in_is_told(
    objective: SaliencyDecor, complete_from: int, epochs: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert objective.complete_from(torch.nn.Identity()) == complete_from
    tell_of_incomplete(objective, complete_from, epochs)
    assert (f"complete from epoch 3 on, and max_epochs is {epochs}" in caplog.text) == told


@pytest.mark.parametrize(("warm_epochs", "best", "told"), [(1, 1, True), (1, 2, False), (2, 2, True), (4, 4, False)])
def test_a_kept_network_of_a_warm_epoch_is_told(
    warm_epochs: int, best: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    objective, network = SaliencyDecor(warm_epochs=warm_epochs), TileClassifier("test_resnet")
    tell_of_best_epoch(objective, objective.complete_from(network), best, 4)
    assert (f"that of epoch {best}; SaliencyDecor is complete from epoch {warm_epochs + 1} on" in caplog.text) == told


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (SaliencyDecor(warm_epochs=3, block_px=64), "raise it or lower block_px"),
        (SaliencyDecor(warm_epochs=3), "decorrelation: needs at least 2 images at once; .*lower accumulation"),
    ],
)
def test_an_objective_that_cannot_be_used_is_told_before_any_epoch(objective: SaliencyDecor, words: str) -> None:
    loader = torch.utils.data.DataLoader(Items(2), batch_size=4)
    trainer: Any = SimpleNamespace(network=TileClassifier("test_resnet"), loss_function=objective, data_loader=loader)
    data: Any = SimpleNamespace(tile_px=64, mpp=1.0)
    checkpoint: Any = SimpleNamespace(parts={"step": ObjectiveStep(accumulation=4)})
    with pytest.raises(ConfigError, match=words):
        finetune(data, trainer, None, checkpoint, MapSettings())  # type: ignore[arg-type]


def test_augmentation_of_the_network_to_be_trained_is_refused() -> None:
    network = TileClassifier("test_resnet", test_time_augmentation=True)
    trainer: Any = SimpleNamespace(network=network)
    data: Any = SimpleNamespace(tile_px=64, mpp=1.0)
    with pytest.raises(ConfigError, match="set the key test_time_augmentation"):
        finetune(data, trainer, None, None, MapSettings())  # type: ignore[arg-type]


def test_a_method_that_cannot_explain_the_network_is_told_before_the_training():
    network = TileClassifier("convnext_atto")
    for methods in (("deeplift", "tsm"), ("gradcam",)):
        _check_methods(make_engine(network, 64, 1.0, settings=MapSettings(methods, "stages.3")))
    with pytest.raises(NetworkError, match="its channels cancel"):
        _check_methods(make_engine(network, 64, 1.0, settings=MapSettings(("deeplift", "gradient"), "stages.3")))
