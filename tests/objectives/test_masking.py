"""Masking: which pixels, how many, with what; and a saliency pass that leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.networks.blur import blurred
from medsd.networks.classifier import TileClassifier
from medsd.objectives.masking import Fill, mask_lowest, masked_count, pixel_scores


class ConvNet(nn.Module):
    """Small, with BatchNorm and dropout: modes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(6, 8, 3, 1, 1), nn.Tanh()
        )
        self.head = nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled


@pytest.fixture
def network() -> ConvNet:
    torch.manual_seed(0)
    network = ConvNet().double()
    network.body[1].running_mean.uniform_(-0.5, 0.5)
    network.body[1].running_var.uniform_(0.5, 2)
    return network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0, 0.99),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)),
    fill=st.sampled_from(["noise", "mean", "blur"]),
)
def test_exactly_k_pixels_in_all_channels(share: float, size: tuple[int, ...], fill: Fill) -> None:
    batch, _, height, width = size
    x = torch.randn(size, generator=generator())
    scores = torch.rand(batch, height, width, generator=generator(1))
    count = int(share * (height * width))  # the library's order of products: (0.6 * 9) * 5 is below 27
    if share > 0 and count == 0:
        with pytest.raises(ConfigError, match="masked_share"):
            mask_lowest(x, scores, share, fill, generator(2))
        return
    masked = mask_lowest(x, scores, share, fill, generator(2))
    changed = masked != x
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))  # a pixel changes in all channels or in none
    assert changed.any(dim=1).flatten(1).sum(dim=1).tolist() == [count] * batch
    for image in range(batch):
        lowest = set(scores[image].flatten().argsort()[:count].tolist())
        assert set(changed[image].any(dim=0).flatten().nonzero().flatten().tolist()) == lowest


def test_noise_spans_the_range_of_each_image_and_channel() -> None:
    scale = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    x = torch.rand(2, 3, 40, 40, generator=generator()) * scale + scale
    masked = mask_lowest(x, torch.rand(2, 40, 40, generator=generator(1)), 0.5, "noise", generator(2))
    for image in range(2):
        for channel in range(3):
            before, after = x[image, channel], masked[image, channel]
            noise = after[after != before]
            low, high = before.min(), before.max()
            assert low * (1 - 1e-6) <= noise.min()
            assert noise.max() <= high * (1 + 1e-6)
            position = (noise - low) / (high - low)
            assert abs(float(position.mean()) - 0.5) < 0.05
            assert abs(float(position.var()) - 1 / 12) < 0.01


def test_noise_is_drawn_by_the_generator_for_every_pixel_and_channel() -> None:
    x, scores = torch.randn(2, 3, 8, 8, generator=generator()), torch.rand(2, 8, 8, generator=generator(1))
    first = mask_lowest(x, scores, 0.5, "noise", generator(2))
    assert torch.equal(first, mask_lowest(x, scores, 0.5, "noise", generator(2)))
    assert not torch.equal(first, mask_lowest(x, scores, 0.5, "noise", generator(3)))
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    position = ((first - low) / (high - low))[first != x].view(2, 3, 32)
    for one, other in ((position[0, 0], position[0, 1]), (position[0, 1], position[0, 2]), (position[0], position[1])):
        assert (one - other).abs().mean() > 0.15  # 1/3 for independent draws


def test_mean_fill() -> None:
    x, scores = torch.randn(2, 3, 8, 8, generator=generator()), torch.rand(2, 8, 8, generator=generator(1))
    masked = mask_lowest(x, scores, 0.25, "mean", None)
    expected = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(masked[masked != x], expected[masked != x])


def test_blur_fill() -> None:
    x, scores = torch.randn(2, 3, 24, 24, generator=generator()), torch.rand(2, 24, 24, generator=generator(1))
    masked = mask_lowest(x, scores, 0.25, "blur", None)
    chosen = masked != x
    assert chosen.float().mean() == 0.25
    # The definition: each place is the sum of its surroundings under a symmetric kernel of sum 1.
    assert torch.equal(masked[chosen], blurred(x)[chosen])
    flat = blurred(torch.full((1, 1, 24, 24), 3.0))
    torch.testing.assert_close(flat[..., 5:-5, 5:-5], torch.full((1, 1, 14, 14), 3.0))
    point = torch.zeros(1, 2, 24, 24)
    point[0, 1, 12, 12] = 1
    assert torch.equal(blurred(point)[0, 0], torch.zeros(24, 24))
    torch.testing.assert_close(blurred(point)[0, 1, 7:18, 7:18], blurred(point)[0, 1, 7:18, 7:18].flip(0).T)


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.3, 0.99), block=st.integers(1, 5), height=st.integers(6, 17), width=st.integers(6, 17))
def test_blocks_of_the_least_mean_score(share: float, block: int, height: int, width: int) -> None:
    x, scores = torch.randn(2, 3, height, width), torch.rand(2, height, width, dtype=torch.float64)
    masked = (mask_lowest(x, scores, share, "noise", None, block) != x).all(dim=1)
    corners = [(top, left) for top in range(0, height, block) for left in range(0, width, block)]
    for image in range(2):
        # Block by block: its mean, and whether all of it is masked or none.
        blocks = [(slice(top, top + block), slice(left, left + block)) for top, left in corners]
        means = torch.stack([scores[image][place].mean() for place in blocks])
        seen = [masked[image][place] for place in blocks]
        assert all(bool(part.all()) == bool(part.any()) for part in seen)
        found = {number for number, part in enumerate(seen) if part.any()}
        assert found == set(means.argsort()[: int(share * len(blocks))].tolist())


def test_blocks_too_large_for_the_share_are_told_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"masked_share=0.2: .* at least 1 of 2 x 2 blocks of 8 px, below 1"
    ) as caught:
        mask_lowest(torch.rand(1, 3, 9, 16), torch.rand(1, 9, 16), 0.2, "mean", None, 8)
    assert "\n" not in str(caught.value)


def test_the_input_and_the_graph_stay_out() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    before = x.detach().clone()
    masked = mask_lowest(x, torch.rand(2, 8, 8), 0.5, "noise", generator())
    assert not masked.requires_grad
    assert torch.equal(x.detach(), before)
    assert torch.equal(mask_lowest(x, torch.rand(2, 8, 8), 0.0, "noise", generator()), before)
    channels_last = before.to(memory_format=torch.channels_last)
    scores = torch.rand(2, 8, 8)
    assert torch.equal(
        mask_lowest(channels_last, scores, 0.5, "noise", generator()),
        mask_lowest(before, scores, 0.5, "noise", generator()),
    )


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), 0.01])
def test_shares_that_mask_nothing_or_all_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="masked_share") as caught:
        mask_lowest(torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8), share, "noise", None)
    assert "\n" not in str(caught.value)


def test_scores_are_the_gradient_of_the_true_logit(network: ConvNet) -> None:
    x = torch.randn(4, 3, 10, 12, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 1])
    signed = pixel_scores(network, x, labels, "signed")
    assert not signed.requires_grad
    network.eval()
    for image in range(4):  # one by one, and by finite differences for a few pixels

        def logit(pixels: Tensor, image: int = image) -> Tensor:
            return network.head(network.features(pixels[None]))[0, labels[image]]

        leaf = x[image].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logit(leaf), leaf)
        torch.testing.assert_close(signed[image], gradient.mean(dim=0), rtol=0, atol=1e-15)
        for row, column in ((0, 0), (4, 7), (9, 11)):
            step = torch.zeros_like(x[image])
            step[:, row, column] = 1e-5
            slope = (logit(x[image] + step) - logit(x[image] - step)).detach() / 2e-5 / 3
            torch.testing.assert_close(signed[image, row, column], slope, rtol=0, atol=1e-9)
    assert (signed < 0).any()
    assert torch.equal(pixel_scores(network, x, labels, "absolute"), signed.abs())


def test_rankings_mask_different_pixels() -> None:
    x = torch.randn(1, 1, 1, 4)
    signed = torch.tensor([[[-3.0, 0.1, 2.0, -0.2]]])
    most_negative = mask_lowest(x, signed, 0.5, "mean", None) != x
    least = mask_lowest(x, signed.abs(), 0.5, "mean", None) != x
    assert most_negative.flatten().tolist() == [True, False, False, True]
    assert least.flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("training", [True, False])
def test_the_saliency_pass_leaves_no_trace(training: bool) -> None:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").train(training)
    network.encoder.bn1.eval()  # frozen: must stay so
    frozen = network.encoder.layer1[0].conv1.weight
    frozen.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    before = x.clone()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    pixel_scores(network, x, torch.tensor([0, 1]), "absolute")
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad != (parameter is frozen) for parameter in network.parameters())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert x.grad is None


def test_autocast_does_not_change_the_order() -> None:
    torch.manual_seed(0)
    network, x, labels = ConvNet(), torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    scores = pixel_scores(network, x, labels, "absolute")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixel_scores(network, x, labels, "absolute"), scores)


def test_the_saliency_pass_ignores_dropout_and_batch_mates(network: ConvNet) -> None:
    network.train()
    x, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    first = pixel_scores(network, x, labels, "signed")
    assert torch.equal(first, pixel_scores(network, x, labels, "signed"))
    alone = pixel_scores(network, x[1:2], labels[1:2], "signed")
    torch.testing.assert_close(first[1:2], alone, rtol=0, atol=1e-15)


def test_the_saliency_pass_cleans_up_after_an_error_and_works_under_no_grad(network: ConvNet) -> None:
    network.train()
    with pytest.raises(RuntimeError):
        pixel_scores(network, torch.randn(1, 5, 8, 8).double(), torch.tensor([0]), "signed")
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.modules())
    with torch.no_grad():
        scores = pixel_scores(network, torch.randn(1, 3, 8, 8).double(), torch.tensor([0]), "signed")
    assert scores.abs().max() > 0


def test_a_share_is_the_whole_number_that_it_nearly_gives() -> None:
    """0.29 * 100 is 28.999999999999996."""
    for percent in range(1, 100):
        assert masked_count(percent / 100, 10, 10) == percent
        assert masked_count(percent / 100, 30, 30) == 9 * percent
    assert masked_count(0.299, 10, 10) == 29
