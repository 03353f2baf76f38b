"""The metrics that Quantus has too: equal where the definitions are, and where they are not, by how they differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsd.saliency.gradient import Gradient
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.insertion_deletion import deletion_curve
from medsd.saliency.metrics.pointing import energy_pointing, pointing_game
from medsd.saliency.metrics.randomisation import randomised_cascade
from medsd.saliency.metrics.robustness import Noise, sensitivity
from medsd.saliency.metrics.scoring import Perturbation

quantus = pytest.importorskip("quantus")

QUIET = {"disable_warnings": True, "normalise": False, "abs": False}
LABELS = torch.tensor([0, 2, 1, 1])


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 10 * 10, 3)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def maps() -> Tensor:
    return torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def region() -> Tensor:
    region = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(5)) < 0.4
    region[:2] = ~region[:2]
    return region


def call(metric, network: nn.Module, x: Tensor, maps: Tensor | None, **options) -> np.ndarray:
    """A metric of Quantus on arrays (B, C, H, W) and maps (B, 1, H, W)."""
    given = None if maps is None else maps[:, None].numpy()
    arguments = {"model": network, "x_batch": x.numpy(), "y_batch": LABELS.numpy(), "a_batch": given, **options}
    return metric(**arguments, channel_first=True, device="cpu")


def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_options) -> np.ndarray:
    images = torch.as_tensor(inputs, dtype=torch.float32)
    return Gradient(model, None)(images, torch.as_tensor(targets)).numpy()[:, None]


def test_pixel_flipping_is_deletion(network, x, maps):
    """12 pixels of three channels a step; Quantus has no score before the first step (its area fails with numpy 2)."""
    options = {"features_in_step": 36, "perturb_baseline": 0.0, **QUIET}
    curves = np.array(call(quantus.PixelFlipping(**options), network, x, maps, softmax=True))
    found = deletion_curve(network, x, LABELS, maps, Perturbation("zero", 12))
    np.testing.assert_allclose(found[:, 1:], curves, atol=1e-6)


def test_the_pointing_game(network, x, maps, region):
    hits = call(quantus.PointingGame(**QUIET), network, x, maps, s_batch=region[:, None].numpy())
    assert 0 < sum(hits) < 4  # both happen
    np.testing.assert_array_equal(pointing_game(maps, region), np.array(hits, float))
    # They part where several pixels share the greatest value: any inside is a hit there, here their share counts.
    maps[:, :, :2] = 9
    hits = call(quantus.PointingGame(**QUIET), network, x, maps, s_batch=region[:, None].numpy())
    assert all(hits) and pointing_game(maps, region).max() < 1


def test_attribution_localisation_and_relevance_mass_are_energy_pointing(network, x, maps, region):
    """Of maps without negative values all three agree; else Quantus' mass counts them, localisation clips them."""
    inside = region[:, None].numpy()
    clipped = call(
        quantus.AttributionLocalisation(positive_attributions=True, **QUIET), network, x, maps, s_batch=inside
    )
    np.testing.assert_allclose(energy_pointing(maps, region), clipped, atol=1e-6)
    mass = call(quantus.RelevanceMassAccuracy(**QUIET), network, x, maps.clamp(min=0), s_batch=inside)
    np.testing.assert_allclose(energy_pointing(maps, region), mass, atol=1e-6)


def test_max_sensitivity(network, x):
    generator = torch.Generator().manual_seed(0)
    noise = [0.1 * torch.empty(x.shape[1:]).uniform_(-1, 1, generator=generator).numpy().ravel() for _ in range(3)]
    drawn = iter(noise)
    metric = quantus.MaxSensitivity(nr_samples=3, perturb_func=lambda arr, **_options: arr + next(drawn), **QUIET)
    expected = call(metric, network, x, Gradient(network, None)(x, LABELS), explain_func=explain)
    found = sensitivity(Gradient(network, None), x, LABELS, Noise(0.1, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_parameter_randomisation_from_the_top(network, x):
    """Quantus' MPRT draws the layers from the top, each from seed 43; its copies are ours with the same draws."""
    metric = quantus.MPRT(layer_order="top_down", seed=42, **QUIET)
    maps = Gradient(network, None)(x, LABELS)
    expected = call(metric, network, x, maps, explain_func=explain)
    cascade = randomised_cascade(network, lambda copy: Gradient(copy, None), x, LABELS, ("3", "0"), seed=43)
    np.testing.assert_allclose(expected["original"], 1, atol=1e-6)
    np.testing.assert_allclose(rank_correlation(maps, cascade[1].maps), expected["3"], atol=1e-4)
    # The second stage differs in its draw (a seed of its own here, the same again there), not in what it leaves.
    torch.manual_seed(43)
    network[3].reset_parameters()
    torch.manual_seed(43)
    network[0].reset_parameters()
    np.testing.assert_allclose(rank_correlation(maps, Gradient(network, None)(x, LABELS)), expected["0"], atol=1e-4)


def test_similarities(maps):
    other = maps.flip(0) + maps
    flat = [values.flatten(1).numpy() for values in (maps, other)]
    spearman = quantus.similarity_func.correlation_spearman(*flat, batched=True)
    np.testing.assert_allclose(rank_correlation(maps, other), spearman, atol=1e-7)
