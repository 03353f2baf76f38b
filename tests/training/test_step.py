"""The step that MONAI's trainer calls."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from medsd.errors import ConfigError, TrainingError
from medsd.networks.classifier import TileClassifier
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.augment import augment
from medsd.training.step import ObjectiveStep
from medsd.training.terms import Terms


def engine(objective: Any = None, lr: float = 0.01, iteration: int = 1, length: int = 4) -> Any:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet")
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    state = SimpleNamespace(
        device=torch.device("cpu"), epoch=1 + (iteration - 1) // length, iteration=iteration, epoch_length=length
    )
    return SimpleNamespace(
        network=network, optimizer=optimizer, state=state, loss_function=objective or SaliencyDecor(warm_epochs=0)
    )


def batch(labels: list[int] | None = None, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.tensor([0, 1, 0, 1] if labels is None else labels, dtype=dtype)}


def test_the_step_is_one_of_the_objective_on_augmented_normalised_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

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
    output = ObjectiveStep(stain=0.0)(trainer, batch())
    assert seen["epoch"] == 1.5
    assert seen["training"]
    # A symmetry of the square: the same pixels, normalised.
    normalised = trainer.network.normalise(batch()["image"])
    torch.testing.assert_close(seen["x"].flatten(2).sort().values, normalised.flatten(2).sort().values)
    assert output["pred"].shape == (4, 2)
    assert not output["pred"].requires_grad
    assert torch.equal(output["label"], batch()["label"])
    total = output["cross_entropy"] + output["consistency"] + 0.1 * math.log(2) * output["decorrelation"]
    assert output["loss"] == pytest.approx(total, rel=1e-5)
    for name, parameter in trainer.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * parameter.grad, msg=name)


def test_draws_depend_on_seed_and_iteration_alone() -> None:
    def run(step: ObjectiveStep, iteration: int) -> dict[str, torch.Tensor]:
        trainer = engine(iteration=iteration)
        step(trainer, batch())
        return trainer.network.state_dict()

    def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    used = ObjectiveStep(seed=3)
    first, second = run(used, 1), run(used, 2)
    assert not equal(first, second)
    torch.manual_seed(99)
    assert equal(run(used, 1), first)  # again, with the same step
    assert equal(run(ObjectiveStep(seed=3), 2), second)  # and with a fresh one, later on
    assert not equal(run(ObjectiveStep(seed=4), 1), first)


def test_mask_noise_differs_between_iterations_without_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsd.training.step.augment", lambda images, _generator, _stain: images)
    step, alone = ObjectiveStep(), SaliencyDecor(decorrelation=0, warm_epochs=0, fill="noise")
    assert (
        step(engine(alone, iteration=1), batch())["consistency"]
        != step(engine(alone, iteration=2), batch())["consistency"]
    )


def test_gradients_of_the_last_step_are_dropped() -> None:
    trainer, clean = engine(), engine()
    for parameter in trainer.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    step = ObjectiveStep()
    assert step(trainer, batch())["loss"] == step(clean, batch())["loss"]
    assert torch.equal(trainer.network.head.weight, clean.network.head.weight)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types(dtype: torch.dtype) -> None:
    step = ObjectiveStep()
    assert step(engine(), batch(dtype=dtype))["loss"] == step(engine(), batch())["loss"]


@pytest.mark.parametrize("label", [2, 255, -1])
def test_labels_without_a_class_are_named(label: int) -> None:
    trainer = engine()
    before = trainer.network.head.weight.detach().clone()
    with pytest.raises(TrainingError, match=rf"label {label}: the classes are 0 \(normal\), 1 \(tumour\)") as caught:
        ObjectiveStep()(trainer, batch([0, 1, label, 1]))
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
        ObjectiveStep()(trainer, batch())
    assert "\n" not in str(caught.value)
    assert torch.equal(trainer.network.head.bias, before)


@pytest.mark.parametrize("stain", [-0.1, 1.0, float("nan")])
def test_stain_is_checked(stain: float) -> None:
    with pytest.raises(ConfigError, match="stain="):
        ObjectiveStep(stain=stain)


def test_without_its_terms_the_step_is_plain_training() -> None:
    trainer, twin = engine(SaliencyDecor(consistency=0, decorrelation=0)), engine()
    output = ObjectiveStep(stain=0.2)(trainer, batch())
    images = augment(batch()["image"], torch.Generator().manual_seed(1_000_003), 0.2)
    loss = torch.nn.functional.cross_entropy(twin.network.train()(images), batch()["label"])
    loss.backward()
    twin.optimizer.step()
    assert output["loss"] == float(loss.detach())
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, twin.network.state_dict()[name]), name


class Recorded:
    """Plain cross-entropy that keeps what it was given."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[int] = []

    def __call__(
        self, network: Any, x: torch.Tensor, labels: torch.Tensor, epoch: float, generator: Any = None
    ) -> Terms:
        logits = network(x)
        self.dtypes.append(logits.dtype)
        self.sizes.append(len(x))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return Terms(loss, {"cross_entropy": loss.detach()}, logits.detach())


def frozen_norms(trainer: Any) -> Any:
    """Without BatchNorm's batches, pieces of a batch are the batch."""
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    return trainer


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulated_pieces_give_the_gradient_of_the_whole_batch(pieces: int) -> None:
    objective = Recorded()
    whole, parts = frozen_norms(engine(Recorded())), frozen_norms(engine(objective))
    expected = ObjectiveStep()(whole, batch())
    output = ObjectiveStep(accumulation=pieces)(parts, batch())
    assert len(objective.sizes) == pieces and sum(objective.sizes) == 4
    assert output["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    torch.testing.assert_close(output["pred"], expected["pred"], rtol=1e-5, atol=1e-6)
    for name, tensor in parts.network.state_dict().items():
        torch.testing.assert_close(tensor, whole.network.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


def test_more_pieces_than_images_is_refused() -> None:
    with pytest.raises(TrainingError, match="batch_size=4: less than accumulation=5"):
        ObjectiveStep(accumulation=5)(engine(), batch())


@pytest.mark.parametrize(("amp", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_trains_as_full_precision_does(amp: Any, dtype: torch.dtype) -> None:
    objective = Recorded()
    half, full = engine(objective), engine(Recorded())
    step, plain = ObjectiveStep(amp=amp), ObjectiveStep()
    # The scale that a training starts with overflows float16 in the first steps of some networks.
    step.load_state_dict({**GradScaler("cpu").state_dict(), "scale": 1024.0} if amp == "float16" else {})
    output, expected = step(half, batch()), plain(full, batch())
    assert output["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert set(objective.dtypes) == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in half.network.parameters())
    moved = half.network.head.weight - engine().network.head.weight
    wanted = full.network.head.weight - engine().network.head.weight
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.99


def test_gradients_too_large_for_float16_lower_the_scale_and_leave_the_network() -> None:
    class Huge(Recorded):
        def __call__(self, *arguments: Any) -> Terms:
            terms = super().__call__(*arguments)
            return Terms(terms.total * 1e34, terms.parts, terms.logits)

    trainer, step = engine(Huge()), ObjectiveStep(amp="float16")
    before = trainer.network.head.weight.detach().clone()
    step(trainer, batch())
    assert torch.equal(trainer.network.head.weight, before)
    scale = step.state_dict()["scale"]
    assert scale < 65536.0
    resumed = ObjectiveStep(amp="float16")
    resumed.load_state_dict(step.state_dict())
    resumed(engine(Recorded()), batch())
    assert resumed.state_dict()["scale"] == scale
    assert ObjectiveStep().state_dict() == {}


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_saliency_decor_in_half_precision_keeps_its_statistics(amp: Any) -> None:
    output = ObjectiveStep(amp=amp)(engine(SaliencyDecor(warm_epochs=0)), batch())
    expected = ObjectiveStep()(engine(SaliencyDecor(warm_epochs=0)), batch())
    assert output["decorrelation"] == pytest.approx(expected["decorrelation"], rel=0.05)
    assert output["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=0.05)
    assert math.isfinite(output["consistency"])


def test_frozen_stages_stay_as_they_are() -> None:
    trainer = engine()
    stem = trainer.network.encoder.layer1
    stem.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in stem.state_dict().items()}
    ObjectiveStep()(trainer, batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in stem.state_dict().items())
    assert not any(parameter.requires_grad for parameter in stem.parameters())
    assert trainer.network.encoder.layer2[0].bn1.num_batches_tracked == 1


@pytest.mark.parametrize(("name", "value"), [("amp", "half"), ("amp", "float"), ("accumulation", 0)])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=") as caught:
        ObjectiveStep(**{name: value})
    assert "\n" not in str(caught.value)


def test_a_compiled_encoder_trains_as_it_does_without() -> None:
    plain, compiled = engine(), engine()
    compiled.network.encoder.compile(backend="eager")  # the capture, without minutes of making kernels
    expected = ObjectiveStep()(plain, batch())
    output = ObjectiveStep()(compiled, batch())
    assert output["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert compiled.network.state_dict().keys() == plain.network.state_dict().keys()
    torch.testing.assert_close(compiled.network.head.weight, plain.network.head.weight)


def test_dropout_draws_from_seed_and_iteration_too() -> None:
    def run(noise: int) -> torch.Tensor:
        trainer = engine(Recorded())
        trainer.network.encoder.layer2.register_forward_hook(
            lambda _module, _inputs, output: torch.nn.functional.dropout(output, 0.5)
        )
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        ObjectiveStep()(trainer, batch())
        assert torch.equal(torch.get_rng_state(), before)
        return trainer.network.head.weight.detach().clone()

    assert torch.equal(run(1), run(2))
