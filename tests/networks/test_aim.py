"""AIM's masks decide what is seen, keep their gradient where closed, and cost what the paper says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medsd.errors import ConfigError, NetworkError
from medsd.networks.aim import AimClassifier, AimOutput
from medsd.networks.classifier import TileClassifier
from medsd.networks.geometry import measure_fields

ENCODER = "test_resnet"


def network(encoder: str = ENCODER, end_stage: int = 1, **options: object) -> AimClassifier:
    torch.manual_seed(0)
    return AimClassifier(encoder, end_stage=end_stage, feature_width=16, mask_width=8, **options)


def images(batch: int = 3, height: int = 64, width: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@contextmanager
def logits_set_to(model: AimClassifier, value: float) -> Iterator[None]:
    """The estimators say `value` everywhere."""
    handles = [
        each.register_forward_hook(lambda _m, _i, out: out * 0 + value) for each in model.mask_estimators.values()
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("encoder", "direction"),
    [
        ("resnet18", "top_down"),
        ("resnet50", "top_down"),
        ("convnext_tiny", "top_down"),
        ("efficientnet_b0", "top_down"),
        ("resnet10t", "top_down"),
        ("resnet10t", "bottom_up"),
        ("test_convnext", "bottom_up"),
        ("efficientnet_b0", "bottom_up"),
    ],
)
def test_shapes_and_gradients_of_any_pyramid(encoder: str, direction: str) -> None:
    model = network(encoder, direction=direction).train()
    output = model.masked(images(2, 64, 64), generator=torch.Generator().manual_seed(0))
    assert model.stages == (3, 2, 1)
    assert [tuple(mask.shape) for mask in output.masks] == [(2, 1, side, side) for side in (2, 4, 8)]
    assert output.merged.shape == (2, model.feature_dim, 8, 8)
    assert output.logits.shape == (2, 2) and len(output.stage_logits) == 3
    (output.logits.square().sum() + sum(z.square().sum() for z in output.stage_logits)).backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused <= {f"encoder.{name}" for name in ("head.norm.weight", "head.norm.bias")} | {
        f"encoder.{name}" for name in ("conv_head.weight", "bn2.weight", "bn2.bias")
    }


def test_surface_is_that_of_a_tile_classifier() -> None:
    model, tile = network().eval(), TileClassifier(ENCODER)
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(model.normalise(pixels), tile.normalise(pixels))
    assert (model.encoder_name, model.classes) == (tile.encoder_name, tile.classes)
    assert model.encoder.state_dict().keys() == tile.encoder.state_dict().keys()
    assert not {"mean", "std"} & set(model.state_dict())
    with torch.no_grad():
        output = model.masked(pixels)
        assert torch.equal(model(pixels), output.logits)
        assert torch.equal(model(pixels), model(model.normalise(pixels)))
        torch.testing.assert_close(model.head(model.features(pixels)), output.logits)
        torch.testing.assert_close(model.feature_map(pixels), output.merged)


def test_every_number_by_hand() -> None:
    model, x = network().eval(), images()
    with torch.no_grad():
        stages = model.encoder.forward_intermediates(x, intermediates_only=True)
        merged, stage_logits = None, []
        for stage in (3, 2, 1):
            features, name = stages[stage - 4], str(stage)
            estimator, branch = model.mask_estimators[name], model.branches[name]
            body = estimator.body(features)
            logits = estimator.spatial(body) + estimator.pooled(body.flatten(2).mean(2)).view(-1, 1, 1, 1)
            mask = (logits >= 0).float()
            seen = branch(features) * mask
            stage_logits.append(model.stage_heads[name](seen.flatten(2).sum(2) / mask[0].numel()))
            merged = seen if merged is None else seen + merged.repeat_interleave(2, 2).repeat_interleave(2, 3)
            torch.testing.assert_close(model.masked(x).masks[3 - stage], mask)
        output = model.masked(x)
    torch.testing.assert_close(output.merged, merged)
    torch.testing.assert_close(output.logits, model.head(merged.mean((2, 3))))
    for logits, expected in zip(output.stage_logits, stage_logits, strict=True):
        torch.testing.assert_close(logits, expected)


def test_evaluation_is_hard_deterministic_and_draws_nothing() -> None:
    model, x = network().eval(), images()
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = model.masked(x), model.masked(x, noise=True)
    assert torch.equal(first.logits, second.logits)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and not mask.requires_grad for mask in first.masks)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_draws_from_the_given_generator_alone() -> None:
    model, x = network().train(), images()
    model.mask_estimators.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Conv2d) else None)
    before = torch.get_rng_state()
    first, again, other = (model.masked(x, generator=torch.Generator().manual_seed(seed)).masks for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(bool((mask == 1).all()) for mask in model.masked(x, noise=False).masks)  # the logits start at +2
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_start_open() -> None:
    with torch.no_grad():
        shares = [float(mask.mean()) for mask in network().train().masked(images(16), noise=False).masks]
    assert all(share > 0.9 for share in shares)


def test_the_mean_mask_repeats_coarse_cells() -> None:
    masks = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1, 0, 1], [0, 0, 0, 0]]]])
    mean = AimOutput(torch.zeros(1, 2), (), masks, torch.zeros(1)).mean_mask()
    assert mean.tolist() == [[[0.5, 1, 0, 0.5], [0.5, 0.5, 0, 0]]]


def test_closed_positions_give_no_gradient_to_features_but_to_their_masks() -> None:
    model = network(end_stage=3).train()
    kept: dict[str, Tensor] = {}
    handles = [
        module["3"].register_forward_hook(lambda _m, _i, out, key=key: kept.update({key: out}) or out.retain_grad())
        for key, module in (("features", model.branches), ("logits", model.mask_estimators))
    ]
    model.mask_estimators["3"].spatial.bias.data.fill_(0.0)
    output = model.masked(images(), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(output.logits, torch.tensor([0, 1, 0])).backward()
    for handle in handles:
        handle.remove()
    closed = output.masks[0][:, 0] == 0
    assert 0 < int(closed.sum()) < closed.numel()
    by_position = kept["features"].grad.abs().sum(1)
    assert bool((by_position[closed] == 0).all()) and bool((by_position[~closed] > 0).all())
    assert bool((kept["logits"].grad[:, 0][closed] != 0).all())
    # dL/da = <dL/dO, T> s(1 - s) / T, from the gradients of the pooled linear head.
    probabilities = output.logits.softmax(1) - F.one_hot(torch.tensor([0, 1, 0]), 2)
    slope = (probabilities @ model.head.weight / 3)[:, :, None, None] / closed[0].numel()
    noise = torch.rand(closed.shape, generator=torch.Generator().manual_seed(0))[:, None]
    soft = (kept["logits"] + noise.log() - (1 - noise).log()).sigmoid()
    expected = (slope * kept["features"]).sum(1, keepdim=True) * soft * (1 - soft)
    torch.testing.assert_close(kept["logits"].grad, expected.detach(), rtol=1e-3, atol=1e-7)


def test_empty_masks_leave_the_bias_of_the_heads() -> None:
    model = network().eval()
    with logits_set_to(model, -1.0), torch.no_grad():
        output = model.masked(images())
    assert not output.merged.any()
    assert torch.equal(output.logits, model.head.bias.expand_as(output.logits))
    for stage, logits in zip(model.stages, output.stage_logits, strict=True):
        assert torch.equal(logits, model.stage_heads[str(stage)].bias.expand_as(logits))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
def test_open_masks_are_a_plain_feature_pyramid(direction: str, training: bool) -> None:
    model, plain = network(direction=direction), network(masking=False, direction=direction)
    assert not len(plain.mask_estimators)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("mask_estimators.") for name in unexpected)
    model.train(training), plain.train(training)
    with logits_set_to(model, 1e4):
        output, expected = model.masked(images()), plain.masked(images())
    assert all(bool((mask == 1).all()) for mask in expected.masks)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.stage_logits, expected.stage_logits)
    pooled = [F.adaptive_avg_pool2d(branch_map(plain, s, images()), 1).flatten(1) for s in (3, 2, 1)]
    if not training:  # nearest up-sampling by whole factors keeps the mean
        torch.testing.assert_close(expected.logits, plain.head(sum(pooled)))


def branch_map(model: AimClassifier, stage: int, x: Tensor) -> Tensor:
    features: Tensor = model.branches[str(stage)](model.encoder.forward_intermediates(x)[1][stage - 4])
    return features


def test_the_sum_is_up_sampled_by_the_nearest() -> None:
    model = network(end_stage=2).eval()
    constant = torch.randn(16)
    handles = [
        model.branches["3"].register_forward_hook(lambda _m, _i, out: torch.arange(6.0).view(1, 1, 2, 3) + 0 * out),
        model.branches["2"].register_forward_hook(lambda _m, _i, out: 0 * out),
        model.mask_estimators["3"].register_forward_hook(lambda _m, _i, out: 0 * out + 1),
    ]
    with torch.no_grad():
        merged = model.masked(images(1)).merged
    for handle in handles:
        handle.remove()
    expected = torch.tensor([[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]).float().repeat_interleave(2, 0)
    assert torch.equal(merged, expected.expand(1, len(constant), 4, 6))


@pytest.mark.parametrize("fails", [False, True])
def test_bottom_up_masks_what_the_next_stage_sees_and_leaves_no_hook(fails: bool) -> None:
    model, x = network(end_stage=2, direction="bottom_up").eval(), images()
    layers = [model.encoder.layer3, model.encoder.layer4]
    seen: list[Tensor] = []
    with logits_set_to(model, 1.0), torch.no_grad():
        open_output = model.masked(x)
    half = torch.zeros(1, 1, 4, 6)
    half[..., :3] = 9.0
    handles = [
        model.mask_estimators["2"].register_forward_hook(lambda _m, _i, out: 0 * out + half - 1),
        model.mask_estimators["3"].register_forward_hook(lambda _m, _i, out: 0 * out + 1),
        layers[1].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])),
    ]
    with torch.no_grad():
        output = model.masked(x)
        expected = layers[1](layers[0](stage_input(model, x)) * (half > 0))
        torch.testing.assert_close(output.merged[..., 3:], upsampled(model.branches["3"](expected), 4, 6)[..., 3:])
        if fails:
            with pytest.raises(RuntimeError):
                model.masked(x[:, :1])
    for handle in handles:
        handle.remove()
    assert not seen[0][..., 3:].any() and bool(seen[0][..., :3].any())
    assert not torch.equal(output.logits, open_output.logits)
    assert not any(module._forward_hooks for module in model.encoder.modules())


def stage_input(model: AimClassifier, x: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    handle = model.encoder.layer3.register_forward_pre_hook(lambda _m, given: inputs.append(given[0]))
    model.encoder(x)
    handle.remove()
    return inputs[0]


def upsampled(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="nearest")


def test_under_autocast_masks_stay_exact() -> None:
    model = network().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.masked(images(), generator=torch.Generator().manual_seed(0))
    assert all(mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0} for mask in output.masks)
    (output.logits.float().sum() + sum(mask.mean() for mask in output.masks)).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_broken_network_gives_nan_and_no_geometry() -> None:
    model, x = network().eval(), images(1)
    x[0, 0, 5, 5] = math.nan
    with torch.no_grad():
        assert model(x).isnan().all()
    with pytest.raises(NetworkError, match="no dense map"):  # the estimators pool: no halo is wide enough
        measure_fields(model, ["layer2"])


@pytest.mark.parametrize(("end_stage", "parameters_m", "gmac"), [(3, 1.5, 0.07), (2, 2.7, 0.29), (1, 3.7, 1.06)])
def test_cost_of_masking_convnext_tiny(end_stage: int, parameters_m: float, gmac: float) -> None:
    # The widths that bring the cost into the window of the paper (+1.9 to 3.7 M, +0.1 to 1.0 GFLOPs), with 200 classes.
    with torch.device("meta"):
        plain = timm.create_model("convnext_tiny", num_classes=0, global_pool="").eval()
        model = AimClassifier("convnext_tiny", [str(number) for number in range(200)], end_stage=end_stage).eval()
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added / 1e6 == pytest.approx(parameters_m, abs=0.07)
    assert (macs(model) - macs(plain)) / 1e9 == pytest.approx(gmac, abs=0.015)


def macs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("test_nfnet", "does not give the maps of 4 stages"),
        ("test_vit", "not a map"),
        ("vit_tiny_patch16_224", "does not take images of every size"),
        ("resnet81", "did you mean"),
    ],
)
def test_encoders_without_a_pyramid_are_refused_in_one_line(encoder: str, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        AimClassifier(encoder)
    assert encoder in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sides", [(8, 8, 4, 2), (4, 4, 4, 4)])
def test_stages_of_one_size_are_no_pyramid(monkeypatch: pytest.MonkeyPatch, sides: tuple[int, ...]) -> None:
    maps = [torch.zeros(1, 8, side, side) for side in sides]
    monkeypatch.setattr("timm.models.ResNet.forward_intermediates", lambda *_args, **_options: maps)
    with pytest.raises(NetworkError, match="no pyramid"):
        network()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"end_stage": 4}, ConfigError, "end_stage=4"),
        ({"end_stage": -1}, ConfigError, "end_stage=-1"),
        ({"temperature": 0.0}, ConfigError, "temperature=0.0"),
        ({"temperature": math.nan}, ConfigError, "temperature=nan"),
        ({"feature_width": 0}, ConfigError, "feature_width=0"),
        ({"mask_width": 0}, ConfigError, "mask_width=0"),
        ({"direction": "sideways"}, ConfigError, "direction='sideways'"),
        ({"masking": "no"}, ConfigError, "masking='no': must be true or false"),
    ],
)
def test_options_are_checked(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        AimClassifier(ENCODER, **options)
    assert "\n" not in str(caught.value)
