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

from medsd.errors import ConfigError, NetworkError, TrainingError
from medsd.networks.classifier import TileClassifier
from medsd.networks.modes import training
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss
from medsd.objectives.masking import mask_lowest, pixel_scores
from medsd.objectives.saliency_decor import SaliencyDecor, consistency_loss
from tests.objectives.convnet import ConvNet, data, network, relative


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
    state = with_objective(SaliencyDecor(consistency, decorrelation, warm_epochs=0))
    assert not torch.equal(train(plain)["head.weight"], state["head.weight"])


@pytest.mark.parametrize("bn", ["own", "shared"])
def test_total_is_the_weighted_sum_of_independent_parts(bn: Any) -> None:
    model, (x, labels) = network().train(), data()
    objective = SaliencyDecor(0.7, 0.3, masked_share=0.4, warm_epochs=0, fill="noise", bn=bn)
    terms = objective(model, x, labels, 1.0, torch.Generator().manual_seed(3))

    twin = network().train()
    scores = pixel_scores(twin, x, labels, "absolute")
    masked = mask_lowest(x, scores, 0.4, "noise", torch.Generator().manual_seed(3))
    features, masked_features = twin.features(x), twin.features(masked)
    p, q = twin.head(features).softmax(1), twin.head(masked_features).softmax(1)
    cross_entropy = -p[torch.arange(6), labels].log().mean()
    divergence = (p * (p.log() - q.log())).sum() / 6
    penalty = relative(features, features)
    total = cross_entropy + 0.7 * divergence + 0.3 * math.log(3) * penalty
    for value, expected in (
        (terms.parts["cross_entropy"], cross_entropy),
        (terms.parts["consistency"], divergence),
        (terms.parts["decorrelation"], penalty),
        (terms.logits, twin.head(features)),
        (terms.total, total),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    # Gradients flow through both sides of the divergence; the parent's BatchNorm has seen two batches.
    terms.total.backward()
    total.backward()
    for parameter, expected_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected_parameter.grad, rtol=1e-10, atol=1e-14)
    assert model.body[1].num_batches_tracked == {"own": 1, "shared": 2}[bn]
    assert not any(t.requires_grad for t in (*terms.parts.values(), terms.logits))


def buffers_after_a_step(objective: SaliencyDecor, encoder: str, whitening: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = TileClassifier(encoder)
    if whitening:
        model.head = WhitenedHead(model.feature_dim, 2, 4)
    next(model.encoder.children()).requires_grad_(False)
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.requires_grad_(False)
    training(model)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    objective(model, x, torch.tensor([0, 1, 0, 1]), 0.0).total.backward()
    return dict(model.named_buffers())


@pytest.mark.parametrize("encoder", ["test_resnet", "test_efficientnet"])  # the latter's norms hold activations
@pytest.mark.parametrize("changes", [{}, {"saliency_pass": "shared"}, {"decorrelated": "both"}, {"mode": "layer"}])
def test_running_averages_after_a_step_are_those_of_cross_entropy(encoder: str, changes: dict[str, Any]) -> None:
    objective, whitening = SaliencyDecor(warm_epochs=0, **changes), changes.get("mode") == "layer"
    found = buffers_after_a_step(objective, encoder, whitening)
    expected = buffers_after_a_step(SaliencyDecor(0, 0), encoder, whitening)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    parents = buffers_after_a_step(replace(objective, bn="shared"), encoder, whitening)
    moved = {name for name, tensor in expected.items() if not torch.equal(parents[name], tensor)}
    assert len(moved) > 5 and ("head.running_covariance" in moved) == whitening


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


def test_warm_epochs_are_plain_cross_entropy() -> None:
    objective = SaliencyDecor(warm_epochs=2)
    warmed = train(lambda model, x, labels, step: objective(model, x, labels, step / 3).total, steps=6)
    assert all(torch.equal(tensor, warmed[name]) for name, tensor in train(plain, steps=6).items())
    assert objective.state_dict() == {}
    model, (x, labels) = network(batch_norm=False), data()
    assert sorted(objective(model, x, labels, 1.99).parts) == ["cross_entropy"]
    # Then all of it at once, measured where it starts.
    terms = objective(model, x, labels, 2.0)
    expected = SaliencyDecor(warm_epochs=0)(network(batch_norm=False), x, labels, 0.0)
    assert torch.equal(terms.total, expected.total) and len(objective.state_dict()) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("consistency", -1.0),
        ("decorrelation", math.nan),
        ("warm_epochs", -1),
        ("warm_epochs", 0.5),
        ("block_px", 0),
        ("bn", "none"),
        ("masked_share", 1.0),
        ("masked_share", -0.1),
        ("masked_share", math.nan),
        ("ranking", "abs"),
        ("fill", "uniform"),
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"block_px": 64}, r"masked_share=0\.2: .* of 1 x 1 blocks of 64 px, below 1; raise it or lower block_px"),
        ({"masked_share": 0.001}, r"masked_share=0\.001: must be 0, or mask at least 1 of 16 x 16 pixels"),
        ({"group_size": 9}, "group_size=9: must lie in 2 to 8"),
        ({"block_px": 64, "group_size": 9, "consistency": 0.0, "decorrelation": 0.0}, ""),
    ],
)
def test_what_cannot_be_used_is_told_before_any_step(settings: dict[str, Any], words: str) -> None:
    objective = SaliencyDecor(**settings)
    if words:
        with pytest.raises(ConfigError, match=words):
            objective.check_fits(side_px=16, feature_dim=8, batch=2)
    else:
        objective.check_fits(side_px=16, feature_dim=8, batch=2)


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
        terms = SaliencyDecor()(model, x.float(), labels, 1.0)
    terms.total.backward()
    assert terms.parts["consistency"].dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_three_lines_in_anybodys_loop() -> None:
    model, objective = network().float().train(), SaliencyDecor(warm_epochs=10)
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


class OneLogit(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)


class Unpooled(ConvNet):
    def features(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("epoch", [0.0, 1.0], ids=["warm", "masked"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (OneLogit(), r"OneLogit: features \(4, 8\), logits \(4, 1\); .*head of one logit give 0 and it"),  # all 0
        (nn.DataParallel(ConvNet()), r"DataParallel: .*wrap not the network but .*ObjectiveLoss\(network, objective\)"),
        (nn.Flatten(), "Flatten: the objective runs its features.* give it a module that has both$"),
    ],
)
def test_a_network_that_it_cannot_train_is_told(model: nn.Module, words: str, epoch: float) -> None:
    with pytest.raises(NetworkError, match=words):
        SaliencyDecor()(model, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), epoch)


def test_features_that_are_a_map_are_told() -> None:
    model = Unpooled()
    model.head = nn.Linear(4, 3)
    with pytest.raises(NetworkError, match=r"Unpooled: features \(4, 8, 4, 4\), .*pool the features"):
        SaliencyDecor()(model, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), 0.0)
    with pytest.raises(TrainingError, match=r"features \(4, 8, 4\): .*pool them"):
        decorrelation_loss(torch.rand(4, 8, 4))


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        (torch.rand(4, 3, 8, 8), torch.zeros(4)),
        (torch.rand(4, 3, 8, 8), torch.zeros(4, 1, dtype=torch.int64)),
        (torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int32)),
        (torch.rand(4, 3, 8, 8), torch.zeros(5, dtype=torch.int64)),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_labels_and_images_of_another_kind_are_told(x: Tensor, labels: Tensor) -> None:
    with pytest.raises(TrainingError, match=r"needs class numbers \(B,\) int64 and float images"):
        SaliencyDecor()(ConvNet(), x, labels, 1.0)


def test_without_masking_soft_labels_are_as_good() -> None:
    model, soft = network().float().train(), torch.full((4, 3), 1 / 3)
    x = torch.rand(4, 3, 8, 8)
    expected = F.cross_entropy(model.head(model.features(x)), soft)
    for epoch, objective in ((0.0, SaliencyDecor()), (2.0, SaliencyDecor(consistency=0, decorrelation=0))):
        assert float(objective(model, x, soft, epoch).total) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("changes", [{"fill": "blur"}, {"block_px": 4}, {"fill": "noise"}])
def test_masks_are_those_of_the_settings(changes: dict[str, Any]) -> None:
    model, (x, labels) = network(batch_norm=False), data()
    value = SaliencyDecor(decorrelation=0, masked_share=0.5, warm_epochs=0, **changes)(
        model, x, labels, 0.0, torch.Generator().manual_seed(4)
    ).parts["consistency"]
    scores = pixel_scores(model, x, labels, "absolute")
    chosen = changes.get("fill", "mean"), torch.Generator().manual_seed(4), changes.get("block_px", 1)
    masked = mask_lowest(x, scores, 0.5, *chosen)
    logits, others = (model.head(model.features(images)) for images in (x, masked))
    assert torch.equal(value, consistency_loss(logits, others).detach())


def test_the_shared_pass_ranks_by_the_training_pass_and_runs_the_network_twice() -> None:
    objective = SaliencyDecor(masked_share=0.5, warm_epochs=0, saliency_pass="shared", bn="shared")
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
