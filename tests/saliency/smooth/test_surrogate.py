"""Surrogates: what they are made of, what they learn, and where they stand in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, NetworkError, TrainingError
from medsd.saliency import smooth
from medsd.saliency.smooth.bilinear import PointSurrogate

Batches = Callable[[int], list[Tensor]]


def digest(network: nn.Module) -> str:
    """Of weights and running statistics."""
    state = network.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


@pytest.mark.parametrize("size", [(16, 16), (8, 14)])
def test_interpolation_by_two_is_the_mean_of_two_by_two(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    point = PointSurrogate(3, 5).double()
    x = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64)
    torch.testing.assert_close(F.interpolate(x, size=size, mode="bilinear"), F.avg_pool2d(x, 2), rtol=0, atol=1e-15)
    expected = point.second(F.avg_pool2d(point.first(x), 2))
    torch.testing.assert_close(point(x, size), expected, rtol=0, atol=1e-14)


def test_a_surrogates_gradient_has_no_checkerboard(
    input_gradient: Callable[..., Tensor], nyquist_share: Callable[[Tensor], float]
) -> None:
    torch.manual_seed(0)
    point = PointSurrogate(3, 5).double()
    for layer in (point.first, point.second):
        layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    x = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    assert nyquist_share(input_gradient(nn.Conv2d(3, 5, 3, 2, 1).double(), x)) > 0.3
    assert nyquist_share(input_gradient(lambda images: point(images, (16, 16)), x)) < 1e-28


def test_it_learns_and_leaves_the_network_alone(small_resnet: nn.Module, smooth_images: Batches) -> None:
    *training, held_out = smooth_images(3)
    small_resnet.train()  # it shall be taken in eval mode all the same, and be back in training mode after
    before, state = digest(small_resnet), torch.random.get_rng_state()
    surrogate, report = smooth.train_surrogate(small_resnet, training, 12, 0.01, [held_out], ("max_pool",))
    assert digest(small_resnet) == before and torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in small_resnet.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in small_resnet.parameters())
    assert not any(module._forward_hooks for module in small_resnet.modules())
    assert not any(parameter.requires_grad for parameter in surrogate.parameters())
    assert list(report.points) == ["0", "2", "3.conv1", "3.downsample"]
    assert surrogate.channels == {"0": (3, 6), "2": (6, 6), "3.conv1": (6, 8), "3.downsample": (6, 8)}
    assert len(report.loss) == 12 and report.loss[-1] < 0.7 * report.loss[0]


class Shortcut(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution of stride 2, both of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.downsample = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.downsample(x)


def test_it_follows_smooth_inputs_and_cannot_follow_noise(smooth_images: Batches) -> None:
    torch.manual_seed(0)
    network, noise = Shortcut(), torch.randn(8, 3, 32, 32)
    for x, low, high in ((smooth_images(1)[0].float(), 0, 0.1), (noise, 0.3, 1)):
        _, report = smooth.train_surrogate(network, [x], 100, 0.01)
        for name, error in report.points.items():
            assert low < error.relative_l1 < high, name


def test_it_is_trained_as_all_points_at_once_on_the_networks_own_inputs(
    small_resnet: nn.Module, smooth_images: Batches
) -> None:
    """The released way in plain words: record every pair, sum the losses, one backward pass, Adam."""
    batches = smooth_images(2)
    trained, report = smooth.train_surrogate(small_resnet, batches, epochs=2, seed=5)
    reference, _ = smooth.train_surrogate(small_resnet, batches, epochs=0, seed=5)
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), reference.parameters(), strict=True))
    reference.requires_grad_(True)
    optimizer = torch.optim.Adam(reference.parameters())
    block, losses = small_resnet[3], []
    for _ in range(2):
        for x in batches:
            with torch.no_grad():
                stem = small_resnet[0](x)
                inner = small_resnet[2](small_resnet[1](stem))
                pairs = {
                    "0": (x, stem),
                    "3.conv1": (inner, block.conv1(inner)),
                    "3.downsample": (inner, block.downsample(inner)),
                }
            loss = sum((reference(name, u, y.shape[2:]) - y).abs().mean() for name, (u, y) in pairs.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    for mine, wanted in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)
    assert report.loss == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-10)


def test_the_same_seed_gives_the_same_surrogates(small_resnet: nn.Module, smooth_images: Batches) -> None:
    batches = smooth_images(1)
    one, same = (smooth.train_surrogate(small_resnet, batches, 2, seed=1)[0] for _ in range(2))
    other = smooth.train_surrogate(small_resnet, batches, 2, seed=2)[0]
    assert digest(one) == digest(same) != digest(other)
    nhwc = smooth.train_surrogate(small_resnet, batches, 2, seed=1, channels_last=True)[0]
    torch.testing.assert_close(nhwc.state_dict(), one.state_dict(), rtol=0, atol=1e-9)


def test_errors_are_measured_as_said(small_resnet: nn.Module, smooth_images: Batches) -> None:
    batches = smooth_images(3)
    batches = [batches[0], batches[1][:3], batches[2]]  # of unequal size: every element counts the same
    surrogate, report = smooth.train_surrogate(small_resnet, batches[:1], 1, held_out=batches)
    x = torch.cat(batches)
    with torch.no_grad():
        y = small_resnet[0](x)
        difference = (surrogate("0", x, y.shape[2:]) - y).abs()
    assert report.points["0"].l1 == pytest.approx(float(difference.mean()), rel=1e-12)
    assert report.points["0"].relative_l1 == pytest.approx(float(difference.mean() / y.abs().mean()), rel=1e-12)
    assert smooth.measure_surrogate(small_resnet, surrogate, batches) == report.points


def test_all_but_the_stem_are_replaced(small_resnet: nn.Module, smooth_images: Batches) -> None:
    (x,) = smooth_images(1)
    surrogate, _ = smooth.train_surrogate(small_resnet, [x], 3, also=("max_pool",))
    plain, block = small_resnet(x), small_resnet[3]
    inner = surrogate("2", small_resnet[1](small_resnet[0](x)), (8, 8))
    main = block.conv2(block.relu1(block.norm(surrogate("3.conv1", inner, (4, 4)))))
    expected = small_resnet[4:](block.relu2(main + surrogate("3.downsample", inner, (4, 4))))
    with smooth.surrogate(small_resnet, surrogate):
        torch.testing.assert_close(small_resnet(x), expected, rtol=0, atol=1e-14)
        odd = small_resnet(x[..., :27, :31])  # any size fits
    assert odd.isfinite().all() and (expected - plain).abs().max() > 1e-6
    assert torch.equal(small_resnet(x), plain)


def test_surrogates_of_another_network_are_refused(small_resnet: nn.Module, smooth_images: Batches) -> None:
    def refused(surrogate: smooth.Surrogate, words: str, network: nn.Module = small_resnet) -> None:
        with pytest.raises(NetworkError, match=words), smooth.surrogate(network, surrogate):
            network(smooth_images(1)[0])
        with pytest.raises(NetworkError, match=words):
            smooth.measure_surrogate(network, surrogate, smooth_images(1))
        assert not any(module._forward_hooks for module in network.modules())

    fitting = {"0": (3, 6), "3.conv1": (6, 8), "3.downsample": (6, 8)}
    refused(smooth.Surrogate({**fitting, "4.conv1": (6, 8)}).double(), "'4.conv1': the network has no such")
    refused(smooth.Surrogate({"0": (3, 6), "3.conv1": (6, 8)}).double(), "'3.downsample': the surrogate lacks it")
    refused(smooth.Surrogate(fitting, ("max_pool",)).double(), "'2': the surrogate lacks it")
    refused(smooth.Surrogate({**fitting, "3.conv1": (6, 9)}).double(), r"'3.conv1': made for \(6, 9\) channels")
    # Of pooling it shows when it runs.
    refused(smooth.Surrogate({**fitting, "2": (5, 5)}, ("max_pool",)).double(), "'2': made for 5 channels, here are 6")
    only_stem = nn.Conv2d(3, 6, 3, 2).double()
    with pytest.raises(NetworkError, match="no strided module but the stem"):
        smooth.surrogate(only_stem, smooth.Surrogate({"": (3, 6)}).double()).__enter__()


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_cannot_be_trained_is_told(small_resnet: nn.Module, smooth_images: Batches) -> None:
    batches = smooth_images(1)
    for words, given in (
        ("no batches of images", []),
        ("a generator is used up", iter(batches)),
        ("give \\(B, C, H, W\\) float", [batches[0][0]]),
    ):
        with pytest.raises(DatasetError, match=words):
            smooth.train_surrogate(small_resnet, given)
    with pytest.raises(DatasetError, match="no batches of images"):
        smooth.train_surrogate(small_resnet, batches, 0, held_out=[])
    for options in ({"epochs": -1}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            smooth.train_surrogate(small_resnet, batches, **options)
    with pytest.raises(NetworkError, match="no convolution of stride 2"):
        smooth.train_surrogate(nn.Conv2d(3, 3, 3), batches)
    with pytest.raises(NetworkError, match="layer 'unused': not reached"):
        smooth.train_surrogate(Unreached().double(), batches)
    with pytest.raises(TrainingError, match="surrogate of '0': the loss is nan"):
        smooth.train_surrogate(small_resnet, [batches[0], batches[0] * torch.nan], 1)
    assert not any(module._forward_hooks for module in small_resnet.modules())


def test_starting_weights_seed_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU())
    smooth.train_surrogate(network, [torch.zeros(1, 3, 9, 9)], epochs=0)
    assert not seeded


def test_batches_with_labels_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU())
    with pytest.raises(DatasetError, match=r"images: list; give a tensor \(B, C, H, W\), without labels"):
        smooth.train_surrogate(network, [[torch.zeros(1, 3, 9, 9), torch.zeros(1)]], epochs=1)  # type: ignore[list-item]
