"""The step that MONAI's trainer calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medsd.errors import ConfigError, TrainingError
from medsd.finetune.augment import augment
from medsd.finetune.objective import SaliencyDecor
from medsd.finetune.step import SaliencyDecorStep
from medsd.networks.classifier import TileClassifier


def engine(lr: float = 0.01, iteration: int = 1, length: int = 4) -> Any:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet")
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    state = SimpleNamespace(
        device=torch.device("cpu"), epoch=1 + (iteration - 1) // length, iteration=iteration, epoch_length=length
    )
    return SimpleNamespace(network=network, optimizer=optimizer, state=state)


def batch(labels: list[int] | None = None, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.tensor([0, 1, 0, 1] if labels is None else labels, dtype=dtype)}


def test_the_step_is_one_of_the_objective_on_augmented_normalised_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    objective = SaliencyDecor()

    def spy(
        self: SaliencyDecor, network: Any, x: torch.Tensor, labels: torch.Tensor, epoch: float, generator: Any
    ) -> Any:
        seen.update(x=x.clone(), labels=labels, epoch=epoch, training=network.training, device=generator.device)
        return original(self, network, x, labels, epoch, generator)

    original = SaliencyDecor.__call__
    monkeypatch.setattr(SaliencyDecor, "__call__", spy)
    trainer = engine(iteration=7, length=4)
    trainer.network.eval()
    before = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    output = SaliencyDecorStep(objective, stain=0.0)(trainer, batch())
    assert seen["epoch"] == 1.5
    assert seen["training"]
    # A symmetry of the square: the same pixels, normalised.
    normalised = trainer.network.normalise(batch()["image"])
    torch.testing.assert_close(seen["x"].flatten(2).sort().values, normalised.flatten(2).sort().values)
    assert output["pred"].shape == (4, 2)
    assert not output["pred"].requires_grad
    assert torch.equal(output["label"], batch()["label"])
    ramped = output["cross_entropy"] + output["consistency"] + 0.1 * 1.5 / 5 * output["decorrelation"]
    assert output["loss"] == pytest.approx(ramped, rel=1e-5)
    for name, parameter in trainer.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * parameter.grad, msg=name)


def test_draws_depend_on_seed_and_iteration_alone() -> None:
    def run(step: SaliencyDecorStep, iteration: int) -> dict[str, torch.Tensor]:
        trainer = engine(iteration=iteration)
        step(trainer, batch())
        return trainer.network.state_dict()

    def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    used = SaliencyDecorStep(SaliencyDecor(), seed=3)
    first, second = run(used, 1), run(used, 2)
    assert not equal(first, second)
    torch.manual_seed(99)
    assert equal(run(used, 1), first)  # again, with the same step
    assert equal(run(SaliencyDecorStep(SaliencyDecor(), seed=3), 2), second)  # and with a fresh one, later on
    assert not equal(run(SaliencyDecorStep(SaliencyDecor(), seed=4), 1), first)


def test_mask_noise_differs_between_iterations_without_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsd.finetune.step.augment", lambda images, _generator, _stain: images)
    step = SaliencyDecorStep(SaliencyDecor(decorrelation=0))
    assert step(engine(iteration=1), batch())["consistency"] != step(engine(iteration=2), batch())["consistency"]


def test_gradients_of_the_last_step_are_dropped() -> None:
    trainer, clean = engine(), engine()
    for parameter in trainer.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    step = SaliencyDecorStep(SaliencyDecor())
    assert step(trainer, batch())["loss"] == step(clean, batch())["loss"]
    assert torch.equal(trainer.network.head.weight, clean.network.head.weight)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types(dtype: torch.dtype) -> None:
    step = SaliencyDecorStep(SaliencyDecor())
    assert step(engine(), batch(dtype=dtype))["loss"] == step(engine(), batch())["loss"]


@pytest.mark.parametrize("label", [2, 255, -1])
def test_labels_without_a_class_are_named(label: int) -> None:
    trainer = engine()
    before = trainer.network.head.weight.detach().clone()
    with pytest.raises(TrainingError, match=rf"label {label}: the classes are 0 \(normal\), 1 \(tumour\)") as caught:
        SaliencyDecorStep(SaliencyDecor())(trainer, batch([0, 1, label, 1]))
    assert "\n" not in str(caught.value)
    assert torch.equal(trainer.network.head.weight, before)


def test_a_loss_that_is_not_finite_stops_before_the_optimiser() -> None:
    trainer = engine(iteration=6)
    with torch.no_grad():
        trainer.network.head.weight[0, 0] = torch.inf
    before = trainer.network.head.bias.detach().clone()
    with pytest.raises(
        TrainingError, match=r"loss is (nan|inf) in epoch 2, iteration 6; lower the learning rate"
    ) as caught:
        SaliencyDecorStep(SaliencyDecor())(trainer, batch())
    assert "\n" not in str(caught.value)
    assert torch.equal(trainer.network.head.bias, before)


@pytest.mark.parametrize("stain", [-0.1, 1.0, float("nan")])
def test_stain_is_checked(stain: float) -> None:
    with pytest.raises(ConfigError, match="stain="):
        SaliencyDecorStep(SaliencyDecor(), stain=stain)


def test_without_its_terms_the_step_is_plain_training() -> None:
    trainer, twin = engine(), engine()
    output = SaliencyDecorStep(SaliencyDecor(consistency=0, decorrelation=0), stain=0.2)(trainer, batch())
    images = augment(batch()["image"], torch.Generator().manual_seed(1_000_003), 0.2)
    loss = torch.nn.functional.cross_entropy(twin.network.train()(images), batch()["label"])
    loss.backward()
    twin.optimizer.step()
    assert output["loss"] == float(loss.detach())
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, twin.network.state_dict()[name]), name
