"""The decorrelation term of SaliencyDecor: of features in their own unit, and relative to its first batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, TrainingError
from medsd.evaluate.features import feature_health
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss
from medsd.objectives.masking import mask_lowest, pixel_scores
from medsd.objectives.saliency_decor import SaliencyDecor
from tests.objectives.convnet import ConvNet, data, network, relative


class Scaled(ConvNet):
    """A network whose features come in another unit; its logits stay."""

    def __init__(self, factor: float, copies: int = 1) -> None:
        super().__init__(batch_norm=False)
        self.factor, self.copies = factor, copies
        self.load_state_dict(network(batch_norm=False).state_dict())
        self.double().head = nn.Linear(8 * copies, 3).double()
        with torch.no_grad():
            self.head.weight.copy_(network(False).head.weight.repeat(1, copies) / (factor * copies))
            self.head.bias.copy_(network(False).head.bias)

    def features(self, x: Tensor) -> Tensor:
        return self.factor * super().features(x).repeat(1, self.copies)


def two_steps(model: ConvNet, objective: SaliencyDecor) -> list[tuple[Tensor, Tensor]]:
    """Total and gradient of the body, in two batches between which the features shrink."""
    steps = []
    for seed in (1, 2):
        x, labels = data(40, seed)
        model.zero_grad()
        total = objective(model, x, labels, 0.0).total
        total.backward()
        steps.append((total.detach(), model.body[3].weight.grad.clone()))
        with torch.no_grad():
            model.body[3].weight *= 0.7
    return steps


@pytest.mark.parametrize("mode", ["cov", "zca", "corr"])
@pytest.mark.parametrize("variance", [1e-5, 1e5])
def test_one_weight_holds_for_features_of_any_scale(mode: Any, variance: float) -> None:
    found = two_steps(Scaled(math.sqrt(variance)), SaliencyDecor(decorrelation=0.5, warm_epochs=0, mode=mode))
    expected = two_steps(network(batch_norm=False), SaliencyDecor(decorrelation=0.5, warm_epochs=0, mode=mode))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mode", ["cov", "zca", "corr"])
@pytest.mark.parametrize("copies", [1, 12])
def test_the_term_starts_as_its_share_of_the_cross_entropy_of_who_knows_nothing(mode: Any, copies: int) -> None:
    model, (x, labels) = Scaled(3.0, copies), data(20)
    objective = SaliencyDecor(consistency=0, decorrelation=0.1, warm_epochs=0, mode=mode)
    terms = objective(model, x, labels, 0.0)
    assert float(terms.total - terms.parts["cross_entropy"]) == pytest.approx(0.1 * math.log(3), rel=1e-12)
    assert float(terms.parts["decorrelation"]) == pytest.approx(1, rel=1e-12)


def test_scale_and_level_are_measured_once_and_do_not_follow_the_features() -> None:
    model, (x, labels) = network(batch_norm=False), data(20)
    objective = SaliencyDecor(consistency=0, warm_epochs=0)
    assert objective.state_dict() == {}
    objective(model, x, labels, 0.0)
    first, start = model.features(x).detach(), objective.state_dict()
    assert start["scale"] == pytest.approx(float(first.var(dim=0).mean().sqrt()), rel=1e-12)
    assert start["level"] == pytest.approx(float(decorrelation_loss(first / start["scale"])), rel=1e-12)
    with torch.no_grad():
        model.body[3].weight *= 0.5
    again, _ = data(20, seed=5)
    value = objective(model, again, labels, 0.0).parts["decorrelation"]
    torch.testing.assert_close(value, relative(model.features(again), first).detach(), rtol=1e-12, atol=0)
    assert objective.state_dict() == start
    # What goes on from there is what was never stopped; one that starts anew is another loss.
    resumed = SaliencyDecor(consistency=0, warm_epochs=0)
    resumed.load_state_dict(start)
    assert torch.equal(resumed(model, again, labels, 0.0).parts["decorrelation"], value)
    assert not torch.equal(
        SaliencyDecor(consistency=0, warm_epochs=0)(model, again, labels, 0.0).parts["decorrelation"], value
    )


def test_features_that_do_not_vary_have_no_scale() -> None:
    model, (x, labels) = network(batch_norm=False), data()
    with torch.no_grad():
        model.body[3].weight.zero_()
        model.body[3].bias.zero_()
    with pytest.raises(
        TrainingError, match=r"decorrelation: features of the first batch do not vary; .*set it to 0"
    ) as e:
        SaliencyDecor()(model, x, labels, 1.0)
    assert "\n" not in str(e.value)


def test_features_without_correlation_have_a_bounded_weight() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2).double()

        def features(self, x: Tensor) -> Tensor:
            return x.mean(dim=(1, 2, 3))[:, None]

    objective, (x, labels) = SaliencyDecor(consistency=0, warm_epochs=0), data()
    assert float(objective(One(), x, labels % 2, 0.0).parts["decorrelation"]) == pytest.approx(0, abs=1e-12)
    assert objective.state_dict()["level"] == 1e-3


def test_one_sample_cannot_be_decorrelated() -> None:
    model, (x, labels) = network().eval(), data(1)
    with pytest.raises(TrainingError, match="raise batch_size"):
        SaliencyDecor()(model, x, labels, 1.0)
    assert torch.isfinite(SaliencyDecor(decorrelation=0)(model, x, labels, 1.0).total)


@pytest.mark.parametrize("mode", ["cov", "zca", "corr"])
@pytest.mark.parametrize("decorrelated", ["clean", "both"])
def test_the_decorrelation_term_is_that_of_its_mode(mode: Any, decorrelated: Any) -> None:
    model, (x, labels) = network().eval(), data(20)
    objective = SaliencyDecor(warm_epochs=0, mode=mode, decorrelated=decorrelated)
    start = {"scale": 0.7, "level": 3.0}
    objective.load_state_dict(start)
    terms = objective(model, x, labels, 0.0)
    masked = mask_lowest(x, pixel_scores(model, x, labels, "absolute"), 0.2, "mean", None)
    batches = [model.features(x), model.features(masked)][: 2 if decorrelated == "both" else 1]
    expected = torch.stack([decorrelation_loss(features / 0.7, mode) for features in batches]).mean() / 3
    torch.testing.assert_close(terms.parts["decorrelation"], expected.detach(), rtol=1e-12, atol=0)


def test_zca_takes_groups_of_half_a_batch_that_does_not_span_the_channels() -> None:
    model, (x, labels) = network().eval(), data(8)  # 8 channels: two groups of 4
    objective = SaliencyDecor(consistency=0, warm_epochs=0, mode="zca")
    objective.load_state_dict({"scale": 1.0, "level": 1.0})
    value = objective(model, x, labels, 0.0, torch.Generator().manual_seed(2)).parts["decorrelation"]
    expected = decorrelation_loss(model.features(x), "zca", 4, torch.Generator().manual_seed(2))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    assert value != decorrelation_loss(model.features(x), "zca")


def test_layer_mode_wants_a_head_that_whitens() -> None:
    model, (x, labels) = network().train(), data()
    with pytest.raises(ConfigError, match=r"mode='layer': .* set whitening to true"):
        SaliencyDecor(warm_epochs=0, mode="layer")(model, x, labels, 0.0)
    model.head = WhitenedHead(8, 3, 2).double()  # type: ignore[assignment]
    terms = SaliencyDecor(consistency=0, warm_epochs=0, mode="layer")(model, x, labels, 0.0)
    assert "decorrelation" not in terms.parts
    torch.testing.assert_close(terms.total.detach(), terms.parts["cross_entropy"])


def test_decorrelation_finds_the_features_behind_their_copies() -> None:
    """Two informative pixels in ten noisy copies each: less correlation, more saliency on the two (one training)."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=draw)
    signal = torch.randn(256, 2, generator=draw) * 0.3 + (2 * labels[:, None] - 1.0)
    copies = signal.repeat(1, 10) + 0.5 * torch.randn(256, 20, generator=draw)
    x = torch.cat([signal, copies], dim=1).view(256, 1, 1, 22)

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(22, 12), nn.Tanh())
            self.head = nn.Linear(12, 2)

        def features(self, x: Tensor) -> Tensor:
            features: Tensor = self.body(x.flatten(1))
            return features

    correlation, share = {}, {}
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = Perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
        objective = SaliencyDecor(consistency=0, decorrelation=weight, warm_epochs=0)
        for _ in range(200):
            optimizer.zero_grad()
            objective(model, x, labels, 0.0).total.backward()
            optimizer.step()
        correlation[weight] = feature_health(model.features(x).detach()).mean_abs_correlation
        scores = pixel_scores(model, x, labels, "absolute")[:, 0]
        share[weight] = float((scores[:, :2].sum(dim=1) / scores.sum(dim=1)).mean())
    assert correlation[1.0] < 0.5 * correlation[0.0]
    assert share[1.0] > share[0.0]
