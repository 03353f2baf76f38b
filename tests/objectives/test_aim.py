"""The AIM objective: its parts, the gradient of the mask loss, and its schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.aim import AimClassifier, AimOutput
from medsd.objectives.aim import AimObjective

SHARES = ("cross_entropy", "stage_cross_entropy", "mask_loss", "mask_target")


def network(**options: object) -> AimClassifier:
    torch.manual_seed(0)
    return AimClassifier("test_resnet", feature_width=16, mask_width=8, **options)


def data(batch: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 32, 32, generator=draw), torch.arange(batch) % 2


class FixedOutput(AimClassifier):
    """Gives the same output to every batch."""

    def __init__(self, masks: tuple[Tensor, ...], logits: Tensor, stage_logits: tuple[Tensor, ...]) -> None:
        nn.Module.__init__(self)
        self.stages = tuple(range(3, 3 - len(masks), -1))
        self.options = {"masking": True}
        self.output = AimOutput(logits, stage_logits, masks, torch.zeros(1))
        self.noise: list[bool | None] = []

    def masked(self, x: Tensor, noise: bool | None = None, generator: torch.Generator | None = None) -> AimOutput:
        self.noise.append(noise)
        return self.output


def fixed(*masks: Tensor) -> FixedOutput:
    draw = torch.Generator().manual_seed(2)
    logits = [torch.randn(2, 2, generator=draw, requires_grad=True) for _ in range(len(masks) + 1)]
    return FixedOutput(masks, logits[0], tuple(logits[1:]))


def test_total_is_the_weighted_sum_of_independent_parts() -> None:
    model, (x, labels) = network().train(), data()
    terms = AimObjective(10, mask_target=0.25, mask_weight=2.0)(model, x, labels, 1.5, torch.Generator().manual_seed(3))

    output = model.masked(x, True, torch.Generator().manual_seed(3))
    log_p = [z.log_softmax(1)[range(4), labels] for z in (output.logits, *output.stage_logits)]
    tau = 1 - 0.75 * 0.5
    mask_loss = sum((float(mask.detach().sum()) / mask.numel() - tau) ** 2 for mask in output.masks)
    expected = -sum(each.mean() for each in log_p) + 2.0 * mask_loss
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-6)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(-float(log_p[0].detach().mean()), rel=1e-5)
    assert float(terms.parts["stage_cross_entropy"]) == pytest.approx(-float(sum(log_p[1:]).detach().mean()), rel=1e-5)
    assert float(terms.parts["mask_loss"]) == pytest.approx(mask_loss, rel=1e-5)
    assert float(terms.parts["mask_target"]) == pytest.approx(tau)
    assert torch.equal(terms.logits, output.logits)
    assert not terms.logits.requires_grad and not any(part.requires_grad for part in terms.parts.values())
    assert model.training


@pytest.mark.parametrize(
    ("epochs", "options", "first"),
    [
        (10, {}, 3),
        (11, {}, 4),
        (1, {}, 1),
        (100, {"anneal_share": 0.07}, 7),  # 0.07 * 100 is a little more than 7
        (5, {"anneal_share": 1.0}, 5),
        (10, {"anneal_share": 0.0}, 1),
        (10, {"mask_target": 1.0}, 1),
        (10, {"mask_weight": 0.0}, 1),
    ],
)
def test_it_is_complete_when_tau_has_fallen(epochs: int, options: dict[str, float], first: int) -> None:
    assert AimObjective(epochs, **options).complete_from(network()) == first
    assert AimObjective(epochs, **options).complete_from(network(masking=False)) == 1


def test_gradient_of_the_mask_loss_at_every_position() -> None:
    masks = [(torch.rand(2, 1, 3, 5) < 0.6).float().requires_grad_(), (torch.rand(2, 1, 6, 10) < 0.3).float()]
    masks[1].requires_grad_()
    objective = AimObjective(10, mask_target=0.4, anneal_share=0)
    objective(fixed(*masks), torch.zeros(2), torch.tensor([0, 1]), 0.0).total.backward()
    for mask in masks:
        share = float(mask.detach().mean())
        expected = 2 * 6.0 * (share - 0.4) / mask.numel()
        torch.testing.assert_close(mask.grad, torch.full_like(mask, expected))


def test_masks_of_the_target_size_have_no_loss() -> None:
    mask = torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 0]).view(2, 1, 2, 2).requires_grad_()
    terms = AimObjective(10, anneal_share=0)(fixed(mask), torch.zeros(2), torch.tensor([0, 1]), 0.0)
    terms.total.backward()
    assert float(terms.parts["mask_loss"]) == 0.0
    assert not mask.grad.any()


def test_shares_are_told_for_every_stage() -> None:
    deep = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).view(3, 1, 2, 2)
    fine = torch.ones(3, 1, 4, 4)
    model = fixed(deep, fine)
    model.output = AimOutput(torch.zeros(3, 2), (torch.zeros(3, 2),) * 2, (deep, fine), torch.zeros(1))
    parts = AimObjective(10)(model, torch.zeros(3), torch.tensor([0, 1, 1]), 0.0).parts
    told = {name: float(part) for name, part in parts.items() if name not in SHARES}
    assert told == pytest.approx(
        {
            "mask_share_3": 0.5,
            "mask_share_std_3": math.sqrt(1 / 6),
            "empty_share_3": 1 / 3,
            "mask_share_2": 1.0,
            "mask_share_std_2": 0.0,
            "empty_share_2": 0.0,
        }
    )


@pytest.mark.parametrize(("epoch", "tau"), [(0, 1.0), (10, 0.75), (15, 0.625), (30, 0.25), (30.5, 0.25), (99, 0.25)])
def test_target_falls_linearly_then_stays(epoch: float, tau: float) -> None:
    assert AimObjective(100).target_at(epoch) == pytest.approx(tau, abs=1e-12)


def test_target_without_annealing() -> None:
    assert AimObjective(100, mask_target=0.35, anneal_share=0).target_at(0) == 0.35


@pytest.mark.parametrize(
    ("share", "epoch", "noise"), [(0.2, 7.9, True), (0.2, 8.0, False), (0, 10, False), (1, 0, False)]
)
def test_the_last_epochs_are_without_noise(share: float, epoch: float, noise: bool) -> None:
    model = fixed(torch.ones(2, 1, 2, 2))
    AimObjective(10, noise_off_share=share)(model, torch.zeros(2), torch.tensor([0, 1]), epoch)
    assert model.noise == [noise]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("mask_target", 0.0),
        ("mask_target", 1.01),
        ("mask_target", math.nan),
        ("mask_weight", -1.0),
        ("mask_weight", math.nan),
        ("anneal_share", 1.1),
        ("anneal_share", -0.1),
        ("noise_off_share", 1.1),
        ("noise_off_share", math.nan),
    ],
)
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=") as caught:
        AimObjective(**{"max_epochs": 10, name: value})
    assert "\n" not in str(caught.value)


def test_another_network_is_refused() -> None:
    with pytest.raises(NetworkError, match="AimClassifier"):
        AimObjective(10)(nn.Linear(2, 2), torch.zeros(2), torch.tensor([0, 1]), 0.0)


def train(steps: int, masking: bool = True) -> tuple[AimClassifier, list[dict[str, float]]]:
    model, (x, labels) = network(masking=masking).train(), data(8)
    objective, draw = AimObjective(steps, mask_target=0.5), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    told = []
    for step in range(steps):
        optimizer.zero_grad()
        terms = objective(model, x, labels, float(step), draw)
        terms.total.backward()
        optimizer.step()
        told.append({name: float(part) for name, part in terms.parts.items()})
    return model, told


def test_training_reaches_the_target() -> None:
    _, told = train(30)
    assert told[-1]["cross_entropy"] < 0.5 * told[0]["cross_entropy"]
    assert told[0]["mask_share_2"] > 0.7
    assert told[-1]["mask_share_2"] == pytest.approx(0.5, abs=0.15)


def test_training_is_reproducible() -> None:
    states = [train(3)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_unmasked_twin_trains_with_the_same_objective() -> None:
    _, told = train(10, masking=False)
    assert told[-1]["cross_entropy"] < told[0]["cross_entropy"]
    assert told[-1]["mask_share_3"] == 1.0
    terms = AimObjective(10)(network(masking=False), *data(), 9.0)
    torch.testing.assert_close(terms.total, terms.parts["cross_entropy"] + terms.parts["stage_cross_entropy"])


def test_under_autocast() -> None:
    model, (x, labels) = network().train(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = AimObjective(10)(model, x, labels, 1.0, torch.Generator().manual_seed(0))
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    unmasked = F.cross_entropy(terms.logits.float(), labels)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(float(unmasked), rel=1e-3)


class Pyramid(nn.Module):
    """Stands for a pre-trained encoder: channel 2 of its maps tells objects from background."""

    num_features = 3
    feature_info = tuple({"module": str(stage)} for stage in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4)

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = True) -> list[Tensor]:
        return [F.interpolate(x, scale_factor=2), x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]


def objects_on_tint(labels: Tensor, tints: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (B, 3, 16, 16) with an object of 4 x 4, whose sign in channel 0 is the class; and where it is (B, 16, 16).

    The background is tinted faintly in channel 1: no position tells the tint, their mean does.
    """
    corners = torch.randint(13, (2, len(labels), 1), generator=draw)
    rows, columns = ((torch.arange(16) >= corner) & (torch.arange(16) < corner + 4) for corner in corners)
    inside = rows[:, :, None] & columns[:, None, :]
    x = torch.randn(len(labels), 3, 16, 16, generator=draw)
    x[:, 0] += 3 * inside * (2 * labels - 1).view(-1, 1, 1)
    x[:, 1] += 0.2 * ~inside * (2 * tints - 1).view(-1, 1, 1)
    x[:, 2] += 3 * inside
    return x, inside


def worst_group_and_overlap(masking: bool, seed: int) -> tuple[float, float]:
    """Least accuracy over (class, tint) and the masks' mean intersection over union with the object."""
    torch.manual_seed(seed)
    draw, steps = torch.Generator().manual_seed(seed), 60
    model = AimClassifier("resnet18", feature_width=8, mask_width=8, masking=masking).train()
    objective = AimObjective(steps, mask_target=0.15, mask_weight=6.0 if masking else 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        labels = torch.randint(2, (32,), generator=draw)
        optimizer.zero_grad()
        objective(model, objects_on_tint(labels, labels, draw)[0], labels, float(step), draw).total.backward()
        optimizer.step()
    accuracies, overlaps = [], []
    model.eval()
    with torch.no_grad():
        for label, tint in itertools.product((0, 1), (0, 1)):
            x, inside = objects_on_tint(torch.full((100,), label), torch.full((100,), tint), draw)
            output = model.masked(x)
            mask = F.interpolate(output.masks[-1], size=(16, 16))[:, 0] > 0
            accuracies.append(float((output.logits.argmax(1) == label).float().mean()))
            overlaps.append(float((mask & inside).sum() / (mask | inside).sum()))
    return min(accuracies), sum(overlaps) / 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_masks_resist_a_diffuse_cue_that_always_goes_with_the_class(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # A cue that one position tells, or an encoder that knows no objects, leaves AIM as wrong as its unmasked twin.
    monkeypatch.setattr("timm.create_model", lambda *_args, **_options: Pyramid())
    accuracy, overlap = worst_group_and_overlap(masking=True, seed=seed)
    twin_accuracy, area = worst_group_and_overlap(masking=False, seed=seed)
    assert twin_accuracy < 0.5
    assert accuracy > twin_accuracy + 0.3
    assert area == pytest.approx(16 / 256)
    assert overlap > 2.5 * area
