"""Deletion and insertion against a loop written after RISE's text, and on a network with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.masking import masking_curve
from medsd.saliency.metrics.scoring import Perturbation

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 13 * 11, 3)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 13, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def saliency() -> Tensor:
    return torch.randn(3, 13, 11, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rise_baseline(image: Tensor, kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(image)
    if kind == "mean":
        return image.mean(dim=(1, 2), keepdim=True) * torch.ones_like(image)
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(point, 5))
    weight = torch.zeros(3, 3, 11, 11, dtype=torch.float64)
    for channel in range(3):
        weight[channel, channel] = kernel
    return nn.functional.conv2d(image[None], weight, padding=5)[0]


def rise(network: nn.Module, start: Tensor, end: Tensor, label: int, saliency: Tensor, step: int) -> list[float]:
    """One image: a step's pixels are copied from `end` before each further look."""
    order = np.flip(np.argsort(saliency.numpy().ravel()))
    image, width, probabilities = start.clone(), saliency.shape[1], []
    for number in range(-(-len(order) // step) + 1):
        probabilities.append(float(network(image[None]).softmax(1)[0, label]))
        for place in order[number * step : (number + 1) * step]:
            row, column = divmod(int(place), width)
            image[:, row, column] = end[:, row, column]
    return probabilities


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur"])
@pytest.mark.parametrize("step_px", [7, 13, 143, 500])
def test_equals_a_plain_loop(network, x, saliency, baseline, step_px):
    deletion = deletion_curve(network, x, LABELS, saliency, Perturbation(baseline, step_px, batch_size=10))
    insertion = insertion_curve(network, x, LABELS, saliency, Perturbation(baseline, step_px))
    for item, (image, label) in enumerate(zip(x, LABELS.tolist(), strict=True)):
        other = rise_baseline(image, baseline)
        for found, start, end in ((deletion, image, other), (insertion, other, image)):
            expected = rise(network, start, end, label, saliency[item], step_px)
            np.testing.assert_allclose(found[item], expected, atol=1e-6)
            area = (sum(expected) - expected[0] / 2 - expected[-1] / 2) / (len(expected) - 1)
            assert float(curve_area(found)[item]) == pytest.approx(area, abs=1e-6)


def test_defaults_are_hundredths_zero_and_blur(network, x, saliency):
    assert torch.equal(
        deletion_curve(network, x, LABELS, saliency),
        deletion_curve(network, x, LABELS, saliency, Perturbation("zero", 1)),
    )
    assert torch.equal(
        insertion_curve(network, x, LABELS, saliency),
        insertion_curve(network, x, LABELS, saliency, Perturbation("blur", 1)),
    )
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 30, 2))
    curve = deletion_curve(wide, torch.randn(1, 3, 20, 30), torch.tensor([0]), torch.rand(1, 20, 30))
    assert curve.shape == (1, 101)  # 600 pixels, 6 a step


class Share(nn.Module):
    """The probability of class 1 is the mean of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.logit(
                torch.stack([1 - x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1).clamp(1e-7, 1)
            ).nan_to_num(posinf=99)
            / 2
        )


def test_areas_by_hand():
    """Pixels 0.4, 0.3, 0.2, 0.1 (times 2.5 each quarter): probabilities are sums of what is left."""
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 2, 2)
    label = torch.tensor([1])
    deletion = deletion_curve(Share(), x, label, x[:, 0], Perturbation(step_px=1))[0]
    assert deletion.tolist() == pytest.approx([0.25, 0.15, 0.075, 0.025, 0], abs=1e-4)
    insertion = insertion_curve(Share(), x, label, x[:, 0], Perturbation("zero", 1))[0]
    assert insertion.tolist() == pytest.approx([0, 0.1, 0.175, 0.225, 0.25], abs=1e-4)
    assert float(curve_area(deletion[None])) == pytest.approx(0.09375, abs=1e-4)
    # The worst order of pixels has the most left on the way.
    worst = curve_area(deletion_curve(Share(), x, label, -x[:, 0], Perturbation(step_px=1)))
    assert float(worst) == pytest.approx(0.15625, abs=1e-4)


class Counter(nn.Module):
    """The probability of class 1 is the share of the first `pixels` of the image that are still 1."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        share = x.flatten(1)[:, : self.pixels].double().mean(dim=1).clamp(1e-12, 1 - 1e-12)
        return torch.stack([torch.zeros_like(share), torch.logit(share)], dim=1)


def test_areas_in_closed_form():
    """A network that looks at k of N pixels, named in perfect order: k / 2N and 1 - k / 2N; a constant one: itself."""
    x, k, pixels = torch.ones(1, 1, 20, 30), 120, 600
    saliency = torch.arange(pixels, 0, -1).view(1, 20, 30).float()
    deletion = deletion_curve(Counter(k), x, torch.tensor([1]), saliency, Perturbation(step_px=1))
    insertion = insertion_curve(Counter(k), x, torch.tensor([1]), saliency, Perturbation("zero", 1))
    assert float(curve_area(deletion)) == pytest.approx(k / (2 * pixels), abs=1e-6)
    assert float(curve_area(insertion)) == pytest.approx(1 - k / (2 * pixels), abs=1e-6)

    constant = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([0.0, 1.0])
    curve = deletion_curve(constant, x, 1, saliency).detach()
    assert float(curve_area(curve)) == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)


def rise_batch(network: nn.Module, x: Tensor, saliency: Tensor, step: int, insert: bool) -> np.ndarray:
    """RISE's evaluation of a batch: one order for all images, pixels copied step by step, predicted classes."""
    batch, channels, side, _ = x.shape
    probability = network(x).softmax(1).detach()
    top = probability.argmax(1)
    blurred = torch.stack([rise_baseline(image.double(), "blur").float() for image in x])
    start, end = (blurred, x) if insert else (x, torch.zeros_like(x))
    now, goal = (images.numpy().reshape(batch, channels, -1).copy() for images in (start, end))
    order = np.argsort(-saliency.numpy().reshape(batch, -1), axis=1)
    rows = np.arange(batch)[:, None]
    curve = []
    for number in range((side * side + step - 1) // step + 1):
        image = torch.from_numpy(now).view_as(x)
        curve.append(network(image).softmax(1).detach()[range(batch), top].numpy())
        places = order[:, step * number : step * (number + 1)]
        now[rows, :, places] = goal[rows, :, places]
    return np.stack(curve, axis=1)


def test_equals_rise_at_224_px_in_steps_of_1792():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 9, stride=8), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 27 * 27, 5)).eval()
    x, saliency = torch.randn(2, 3, 224, 224), torch.randn(2, 224, 224)
    for function, insert in ((deletion_curve, False), (insertion_curve, True)):
        found = function(network, x, None, saliency, Perturbation(step_px=1792, batch_size=16))
        assert found.shape == (2, 29)
        np.testing.assert_allclose(found, rise_batch(network, x, saliency, 1792, insert), atol=1e-5)


@pytest.mark.parametrize("function", [deletion_curve, insertion_curve])
def test_a_batch_is_its_images_one_by_one(network, x, saliency, function):
    together = function(network, x, LABELS, saliency, Perturbation(batch_size=11))
    alone = [
        function(network, x[i : i + 1], LABELS[i : i + 1], saliency[i : i + 1], Perturbation(batch_size=1))
        for i in range(len(x))
    ]
    np.testing.assert_allclose(together, torch.cat(alone), atol=1e-7)
    predicted = function(network, x, None, saliency)
    np.testing.assert_allclose(predicted, function(network, x, network(x).argmax(1), saliency), atol=1e-7)


def test_similarity_is_the_cosine_with_the_clean_embedding(network, x, saliency):
    """By hand, for embeddings (B, D) and for maps, which are averaged; a negative cosine counts 0."""
    maps = network[:2]
    for encoder, pool in ((network, lambda rows: rows), (maps, lambda rows: rows.mean(dim=(2, 3)))):
        clean = pool(encoder(x))
        middle = x.clone()
        flat = saliency.flatten(1).argsort(dim=1, descending=True)[:, :70]
        for item in range(3):
            middle[item].view(3, -1)[:, flat[item]] = 0
        curve = deletion_curve(encoder, x, None, saliency, Perturbation(step_px=70, score="similarity"))
        expected = nn.functional.cosine_similarity(pool(encoder(middle)), clean).clamp(min=0).detach()
        np.testing.assert_allclose(curve[:, 0], 1, atol=1e-6)
        np.testing.assert_allclose(curve[:, 1], expected, atol=1e-6)
        insertion = insertion_curve(encoder, x, None, saliency, Perturbation("zero", 70, score="similarity"))
        np.testing.assert_allclose(insertion[:, -1], 1, atol=1e-6)
        np.testing.assert_allclose(insertion[:, 0], curve[:, -1], atol=1e-6)
    with pytest.raises(NetworkError, match="class methods need logits"):
        deletion_curve(maps, x, None, saliency)
    with pytest.raises(NetworkError, match=r"similarity needs embeddings"):
        deletion_curve(nn.Flatten(0), x, None, saliency, Perturbation(score="similarity"))
    with pytest.raises(ConfigError, match="score='cosine'"):
        deletion_curve(network, x, None, saliency, Perturbation(score="cosine"))


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(x.is_contiguous(memory_format=torch.channels_last))
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur"])
def test_channels_last_images_stay_so(x, saliency, baseline):
    for images, kept in ((x, False), (x.contiguous(memory_format=torch.channels_last), True)):
        network = Layouts()
        curves = [
            function(network, images, 1, saliency, Perturbation(baseline))
            for function in (deletion_curve, insertion_curve)
        ]
        assert network.seen == {kept}
        plain = deletion_curve(Layouts(), x, 1, saliency, Perturbation(baseline))
        np.testing.assert_allclose(curves[0], plain, atol=1e-7)


def test_bad_input_is_named(network, x, saliency):
    for function in (deletion_curve, insertion_curve):
        with pytest.raises(ConfigError, match="step_px=0"):
            function(network, x, LABELS, saliency, Perturbation(step_px=0))
        with pytest.raises(ConfigError, match="baseline"):
            function(network, x, LABELS, saliency, Perturbation("noise"))
        with pytest.raises(DatasetError, match="finite"):
            function(network, x, LABELS, saliency / 0)
        with pytest.raises(DatasetError, match="a \\(H, W\\) map an image"):
            function(network, x, LABELS, saliency[:, :5])
        with pytest.raises(ConfigError, match="target=3"):
            function(network, x, 3, saliency)


def test_one_logit_has_no_probability():
    one = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    x, saliency = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)
    for curve in (deletion_curve, insertion_curve, masking_curve):
        with pytest.raises(NetworkError, match="one logit, whose softmax is always 1"):
            curve(one, x, torch.tensor([0, 0]), saliency)


def test_a_batch_of_none_is_refused():
    two = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match="batch_size=0: must be a whole number from 1 on"):
        deletion_curve(two, torch.rand(2, 3, 8, 8), 0, torch.rand(2, 8, 8), Perturbation(batch_size=0))


@pytest.mark.parametrize("curve", [deletion_curve, insertion_curve, masking_curve])
def test_what_is_no_image_and_no_map_is_named(network, x, saliency, curve):
    for odd in (x.byte(), x[0], x[:0], x.numpy()):
        with pytest.raises(DatasetError, match=r"^images"):
            curve(network, odd, LABELS, saliency)
    for odd in (saliency > 0, saliency.long(), saliency.numpy()):
        with pytest.raises(DatasetError, match=r"^saliency"):
            curve(network, x, LABELS, odd)
