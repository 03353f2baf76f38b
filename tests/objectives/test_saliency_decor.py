"""The objective: its parts, its weights, and that without them it is plain cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, TrainingError
from medsd.evaluate.features import feature_health
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss
from medsd.objectives.masking import mask_lowest, pixel_scores
from medsd.objectives.saliency_decor import SaliencyDecor, consistency_loss


class ConvNet(nn.Module):
    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        norm: nn.Module = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), norm, nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled


def network(batch_norm: bool = True) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(batch_norm).double()


def data(batch: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=draw)
    return x, torch.randint(3, (batch,), generator=draw)


def train(loss: Callable[[ConvNet, Tensor, Tensor, int], Tensor], steps: int = 5) -> dict[str, Tensor]:
    model = network().float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        x, labels = data(seed=step)
        optimizer.zero_grad()
        loss(model, x.float(), labels, step).backward()
        optimizer.step()
    return model.state_dict()


def plain(model: ConvNet, x: Tensor, labels: Tensor, _step: int) -> Tensor:
    return F.cross_entropy(model.head(model.features(x)), labels)


def with_objective(objective: SaliencyDecor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return train(lambda model, x, labels, step: objective(model, x, labels, float(step), draw).total)


def test_without_its_terms_it_is_cross_entropy_bit_for_bit() -> None:
    expected = train(plain)
    state = with_objective(SaliencyDecor(consistency=0, decorrelation=0))
    assert expected.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())  # BatchNorm buffers too


@pytest.mark.parametrize(("consistency", "decorrelation"), [(1.0, 0.0), (0.0, 0.1)])
def test_each_term_changes_the_training(consistency: float, decorrelation: float) -> None:
    state = with_objective(SaliencyDecor(consistency=consistency, decorrelation=decorrelation, ramp_epochs=0))
    assert not torch.equal(train(plain)["head.weight"], state["head.weight"])


def test_total_is_the_weighted_sum_of_independent_parts() -> None:
    model, (x, labels) = network().train(), data()
    objective = SaliencyDecor(consistency=0.7, decorrelation=0.3, masked_share=0.4, ramp_epochs=4)
    terms = objective(model, x, labels, 1.0, torch.Generator().manual_seed(3))

    twin = network().train()
    scores = pixel_scores(twin, x, labels, "absolute")
    masked = mask_lowest(x, scores, 0.4, "uniform", torch.Generator().manual_seed(3))
    features, masked_features = twin.features(x), twin.features(masked)
    p, q = twin.head(features).softmax(1), twin.head(masked_features).softmax(1)
    cross_entropy = -p[torch.arange(6), labels].log().mean()
    divergence = (p * (p.log() - q.log())).sum() / 6
    penalty = decorrelation_loss(features)
    for value, expected in (
        (terms.parts["cross_entropy"], cross_entropy),
        (terms.parts["consistency"], divergence),
        (terms.parts["decorrelation"], penalty),
        (terms.logits, twin.head(features)),
        (terms.total, cross_entropy + 0.7 * divergence + 0.25 * 0.3 * penalty),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    # Gradients flow through both sides of the divergence, and BatchNorm has seen two batches.
    terms.total.backward()
    (cross_entropy + 0.7 * divergence + 0.25 * 0.3 * penalty).backward()
    for parameter, expected_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected_parameter.grad, rtol=1e-10, atol=1e-14)
    assert model.body[1].num_batches_tracked == 2
    assert not any(t.requires_grad for t in (*terms.parts.values(), terms.logits))


def test_gradient_of_the_whole_loss_by_finite_differences() -> None:
    model, (x, labels) = network(batch_norm=False), data()
    scores = pixel_scores(model, x, labels, "absolute")
    masked = mask_lowest(x, scores, 0.5, "mean", None)
    weight = model.head.weight.detach().clone().requires_grad_()

    def loss(head: Tensor) -> Tensor:
        features = model.features(x)
        logits = features @ head.T
        consistency = consistency_loss(logits, model.features(masked) @ head.T)
        return F.cross_entropy(logits, labels) + consistency + 0.1 * decorrelation_loss(features)

    assert torch.autograd.gradcheck(loss, weight)


def test_divergence_by_hand_and_its_direction() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).double()
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2  # summed over classes, averaged over the two samples
    assert float(consistency_loss(p.log() + 3, q.log() - 2)) == pytest.approx(expected, rel=1e-12)
    assert float(consistency_loss(q.log(), p.log())) != pytest.approx(expected, rel=1e-2)


def test_divergence_of_half_precision_logits_is_computed_in_float32() -> None:
    logits, other = torch.randn(4, 3).half(), torch.randn(4, 3).half()
    value = consistency_loss(logits, other)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), consistency_loss(logits.double(), other.double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_without_masked_pixels_the_divergence_is_exactly_0(training: bool) -> None:
    model, (x, labels) = network().train(training), data()
    terms = SaliencyDecor(masked_share=0, decorrelation=0)(model, x, labels, 1.0)
    assert float(terms.parts["consistency"]) == 0.0
    assert float(SaliencyDecor(decorrelation=0)(model, x, labels, 1.0).parts["consistency"]) > 0


@pytest.mark.parametrize(
    ("epoch", "ramp_epochs", "share"), [(0, 5, 0.0), (1, 5, 0.2), (2.5, 5, 0.5), (5, 5, 1.0), (50, 5, 1.0), (0, 0, 1.0)]
)
def test_ramp(epoch: float, ramp_epochs: float, share: float) -> None:
    model, (x, labels) = network().eval(), data()
    terms = SaliencyDecor(consistency=0, decorrelation=2.0, ramp_epochs=ramp_epochs)(model, x, labels, epoch)
    expected = terms.parts["cross_entropy"] + share * 2.0 * terms.parts["decorrelation"]
    torch.testing.assert_close(terms.total.detach(), expected, rtol=1e-14, atol=0)
    assert terms.parts["decorrelation"] > 0  # the term itself is told without its weight


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("consistency", -1.0),
        ("decorrelation", math.nan),
        ("ramp_epochs", -0.1),
        ("masked_share", 1.0),
        ("masked_share", -0.1),
        ("masked_share", math.nan),
        ("ranking", "abs"),
        ("fill", "blur"),
        ("mode", "covariance"),
        ("decorrelated", "masked"),
        ("saliency_pass", "train"),
        ("group_size", 1),
    ],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=") as caught:
        replace(SaliencyDecor(), **{name: value})
    assert "\n" not in str(caught.value)


def test_one_sample_cannot_be_decorrelated() -> None:
    model, (x, labels) = network().eval(), data(1)
    with pytest.raises(TrainingError, match="raise batch_size"):
        SaliencyDecor()(model, x, labels, 0.0)
    assert torch.isfinite(SaliencyDecor(decorrelation=0)(model, x, labels, 0.0).total)


def test_the_mode_of_the_network_stays() -> None:
    model, (x, labels) = network().train(), data()
    model.body[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    SaliencyDecor()(model, x, labels, 1.0).total.backward()
    assert model.training
    assert not model.body[1].training  # a frozen BatchNorm
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_under_autocast() -> None:
    model, (x, labels) = network().float().train(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = SaliencyDecor(ramp_epochs=0)(model, x.float(), labels, 1.0)
    terms.total.backward()
    assert terms.parts["consistency"].dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_three_lines_in_anybodys_loop() -> None:
    model, objective = network().float().train(), SaliencyDecor(decorrelation=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, labels = data(12)
    losses = []
    for epoch in range(40):
        optimizer.zero_grad()
        terms = objective(model, x.float(), labels, float(epoch))
        terms.total.backward()
        optimizer.step()
        losses.append(float(terms.parts["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mode", ["cov", "zca", "corr"])
@pytest.mark.parametrize("decorrelated", ["clean", "both"])
def test_the_decorrelation_term_is_that_of_its_mode(mode: Any, decorrelated: Any) -> None:
    model, (x, labels) = network().eval(), data(20)
    objective = SaliencyDecor(mode=mode, decorrelated=decorrelated, ramp_epochs=0, fill="mean")
    terms = objective(model, x, labels, 0.0)
    masked = mask_lowest(x, pixel_scores(model, x, labels, "absolute"), 0.5, "mean", None)
    batches = [model.features(x), model.features(masked)][: 2 if decorrelated == "both" else 1]
    expected = torch.stack([decorrelation_loss(features, mode) for features in batches]).mean()
    torch.testing.assert_close(terms.parts["decorrelation"], expected.detach(), rtol=1e-12, atol=0)


def test_zca_takes_groups_of_half_a_batch_that_does_not_span_the_channels() -> None:
    model, (x, labels) = network().eval(), data(8)  # 8 channels: two groups of 4
    objective = SaliencyDecor(consistency=0, mode="zca")
    value = objective(model, x, labels, 0.0, torch.Generator().manual_seed(2)).parts["decorrelation"]
    expected = decorrelation_loss(model.features(x), "zca", 4, torch.Generator().manual_seed(2))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    assert value != decorrelation_loss(model.features(x), "zca")


def test_the_shared_pass_ranks_by_the_training_pass_and_runs_the_network_twice() -> None:
    objective = SaliencyDecor(saliency_pass="shared", fill="mean", ramp_epochs=0)
    model, (x, labels) = network().train(), data()
    terms = objective(model, x, labels, 0.0)
    assert model.body[1].num_batches_tracked == 2
    twin = network().train()
    probe = x.clone().requires_grad_()
    logits = twin.head(twin.features(probe))
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), probe)
    masked = mask_lowest(x, gradient.mean(dim=1).abs(), 0.5, "mean", None)
    expected = consistency_loss(logits, twin.head(twin.features(masked)))
    torch.testing.assert_close(terms.parts["consistency"], expected.detach(), rtol=1e-10, atol=0)
    terms.total.backward()
    assert x.grad is None and not x.requires_grad


def test_without_batch_norm_the_shared_pass_is_the_separate_one() -> None:
    losses = []
    for saliency_pass in ("eval", "shared"):
        model, (x, labels) = network(batch_norm=False).train(), data()
        draw = torch.Generator().manual_seed(0)
        terms = SaliencyDecor(saliency_pass=saliency_pass)(model, x, labels, 2.0, draw)  # type: ignore[arg-type]
        terms.total.backward()
        losses.append((terms.total.detach(), model.body[0].weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-15)


def test_layer_mode_wants_a_head_that_whitens() -> None:
    model, (x, labels) = network().train(), data()
    with pytest.raises(ConfigError, match=r"mode='layer': .* set whitening to true"):
        SaliencyDecor(mode="layer")(model, x, labels, 0.0)
    model.head = WhitenedHead(8, 3, 2).double()  # type: ignore[assignment]
    terms = SaliencyDecor(mode="layer", consistency=0)(model, x, labels, 0.0)
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
    for weight in (0.0, 0.3):
        torch.manual_seed(1)
        model = Perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
        objective = SaliencyDecor(consistency=0, decorrelation=weight, ramp_epochs=0)
        for _ in range(200):
            optimizer.zero_grad()
            objective(model, x, labels, 0.0).total.backward()
            optimizer.step()
        correlation[weight] = feature_health(model.features(x).detach()).mean_abs_correlation
        scores = pixel_scores(model, x, labels, "absolute")[:, 0]
        share[weight] = float((scores[:, :2].sum(dim=1) / scores.sum(dim=1)).mean())
    assert correlation[0.3] < 0.5 * correlation[0.0]
    assert share[0.3] > share[0.0]
