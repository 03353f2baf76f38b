"""Inverse roots against scipy; the whitening head against numpy and its own folding."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError, TrainingError
from medsd.networks.whitening import WhitenedHead, inverse_root


def features(batch: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated, off centre, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(batch, dim, dtype=torch.float64, generator=generator)
    return draw @ torch.randn(dim, dim, dtype=torch.float64, generator=generator) / 3 + 2


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 20), dim=st.integers(1, 10), seed=st.integers(0, 1000), eps=st.sampled_from([1e-3, 1e-1]))
def test_inverse_root_is_that_of_scipy(batch: int, dim: int, seed: int, eps: float) -> None:
    covariance = torch.cov(features(batch, dim, seed).T).reshape(dim, dim)
    root = inverse_root(covariance, eps)
    expected = np.linalg.inv(scipy.linalg.sqrtm(covariance.numpy() + eps * np.eye(dim)))
    np.testing.assert_allclose(root, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(root, root.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(root).min()) > 0


def test_whitened_covariance_has_eigenvalues_just_below_one() -> None:
    f, eps = features(40, 8), 1e-2
    whitened = (f - f.mean(dim=0)) @ inverse_root(torch.cov(f.T), eps)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(f.T))
    expected = eigenvalues / (eigenvalues + eps)
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(whitened.T)), expected, rtol=0, atol=1e-9)


def test_leading_dimensions_are_a_batch_of_matrices() -> None:
    stack = torch.stack([torch.cov(features(9, 4, seed).T) for seed in range(3)])
    one_by_one = torch.stack([inverse_root(one, 1e-3) for one in stack])
    torch.testing.assert_close(inverse_root(stack, 1e-3), one_by_one, rtol=1e-11, atol=1e-11)


def test_gradchecks() -> None:
    covariance = torch.cov(features(9, 4).T).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: inverse_root(s, 1e-2), covariance)

    def zca(f: Tensor) -> Tensor:
        return (f - f.mean(dim=0)) @ inverse_root(torch.cov(f.T), 1e-2)

    assert torch.autograd.gradcheck(zca, features(7, 4).requires_grad_())
    assert torch.autograd.gradcheck(zca, features(3, 4).requires_grad_())  # fewer samples than channels


def test_gradient_where_eigenvalues_coincide() -> None:
    weights = features(4, 4)
    covariance = (2 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad((inverse_root(covariance, 1e-9) * weights).sum(), covariance)
    expected = -(2**-1.5) / 2 * (weights + weights.T) / 2  # W(2I + E) = W(2I) - E 2^(-3/2) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)

    eigenvalues, vectors = torch.linalg.eigh(covariance)  # what the closed form is for
    (naive,) = torch.autograd.grad((vectors * eigenvalues.rsqrt() @ vectors.T * weights).sum(), covariance)
    assert not naive.isfinite().all()


def test_gradient_cannot_be_taken_twice_in_silence() -> None:
    covariance = torch.cov(features(9, 3).T).requires_grad_()
    (gradient,) = torch.autograd.grad(inverse_root(covariance, 1e-2).square().sum(), covariance, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_rounding_below_zero_does_no_harm() -> None:
    direction = features(64, 1).float()
    covariance = (1e4 * direction @ direction.T).requires_grad_()
    assert float(torch.linalg.eigvalsh(covariance.detach()).min()) < -1e-5  # whose root would be nan
    root = inverse_root(covariance, 1e-5)
    root.sum().backward()
    assert root.isfinite().all() and covariance.grad is not None and covariance.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision() -> None:
    covariance = torch.cov(features(9, 4).T.float()).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = inverse_root(covariance, 1e-3)
    assert inside.dtype == torch.float32 and torch.equal(inside, inverse_root(covariance, 1e-3))
    (plain,) = torch.autograd.grad(inverse_root(covariance, 1e-3).square().sum(), covariance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(inverse_root(covariance, 1e-3).square().sum(), covariance)
    assert torch.equal(gradient, plain)


def test_bad_arguments_in_words() -> None:
    identity = torch.eye(3)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"eps=.*: must be a number above 0"):
            inverse_root(identity, eps)
    with pytest.raises(TrainingError, match=r"features: .* not finite; lower the learning rate") as caught:
        inverse_root(torch.full((3, 3), torch.nan), 1e-5)
    assert "\n" not in str(caught.value)


# The head. Its reference is written in numpy, group by group.


def reference_logits(f: Tensor, mean: Tensor, covariance: Tensor, head: WhitenedHead, groups: list[slice]) -> Tensor:
    whitened = np.zeros(f.shape)
    for group in groups:
        block = covariance.numpy()[group, group]
        root = np.linalg.inv(scipy.linalg.sqrtm(block + head.eps * np.eye(len(block))))
        whitened[:, group] = (f.numpy()[:, group] - mean.numpy()[group]) @ root
    return torch.from_numpy(whitened @ head.linear.weight.detach().numpy().T + head.linear.bias.detach().numpy())


GROUPS = {None: [slice(0, 7)], 3: [slice(0, 3), slice(3, 5), slice(5, 7)]}


def trained(group_size: int | None = 3, batches: int = 3) -> WhitenedHead:
    torch.manual_seed(0)
    head = WhitenedHead(7, 2, group_size, eps=1e-3).double()
    for seed in range(batches):
        head(features(16, 7, seed))
    return head


@pytest.mark.parametrize("group_size", [None, 3])
def test_training_whitens_by_the_batch(group_size: int | None) -> None:
    head, f = trained(group_size), features(16, 7, 9)
    expected = reference_logits(f, f.mean(dim=0), torch.cov(f.T), head, GROUPS[group_size])
    torch.testing.assert_close(head(f).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group_size", [None, 3])
def test_evaluation_whitens_by_the_running_moments_and_folds(group_size: int | None) -> None:
    head = trained(group_size).eval()
    f = features(5, 7, 9)
    buffers = {name: value.clone() for name, value in head.named_buffers()}
    expected = reference_logits(f, head.running_mean, head.running_covariance, head, GROUPS[group_size])
    torch.testing.assert_close(head(f).detach(), expected, rtol=1e-9, atol=1e-9)
    folded = head.folded()
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(f), head(f), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.linear(f[:1], head.weight, head.bias), head(f[:1]), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, buffers[name]) for name, value in head.named_buffers())


def test_folded_layer_stands_on_its_own() -> None:
    head = trained().eval()
    state = torch.get_rng_state()
    folded = head.folded()
    assert torch.equal(torch.get_rng_state(), state)
    before = head.weight.clone()
    folded(features(4, 7)).square().sum().backward()
    assert folded.weight.grad is not None and folded.bias.grad is not None
    with torch.no_grad():
        folded.weight.zero_()
    assert torch.equal(head.weight, before)


def test_running_moments_average_evenly_then_with_momentum() -> None:
    batches = [features(16, 7, seed) for seed in range(12)]
    head = WhitenedHead(7, 2, 3, momentum=0.25).double()
    for number, f in enumerate(batches):
        if number == 4:
            expected = torch.stack([torch.cov(one.T) for one in batches[:4]]).mean(dim=0)
            torch.testing.assert_close(head.running_covariance, expected, rtol=1e-12, atol=1e-12)
        head(f)
    mean = torch.stack([one.mean(dim=0) for one in batches[:4]]).mean(dim=0)
    for one in batches[4:]:
        mean = 0.75 * mean + 0.25 * one.mean(dim=0)
    torch.testing.assert_close(head.running_mean, mean, rtol=1e-12, atol=1e-12)


def test_running_covariance_spans_what_no_batch_spans() -> None:
    """Batches of 4 in a group of 16: the mean of their whitening matrices would amplify what they do not span."""
    mix = features(16, 16)
    head = WhitenedHead(16, 2, 16, momentum=0.01).double()
    for seed in range(200):
        head(torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) @ mix)
    truth = mix.T @ mix
    relative = head.eval().weight @ truth @ head.weight.T
    plain = head.linear.weight @ head.linear.weight.T
    torch.testing.assert_close(relative, plain, rtol=0.5, atol=0.1)


def test_without_a_batch_it_is_nearly_a_plain_layer() -> None:
    head, f = WhitenedHead(7, 2, 3).double().eval(), features(5, 7)
    torch.testing.assert_close(head(f), head.linear(f), rtol=1e-4, atol=1e-4)


def test_gradients_in_both_modes() -> None:
    head = trained()
    assert torch.autograd.gradcheck(head, features(6, 7).requires_grad_())
    head.eval()
    f = features(6, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(head(f)[:, 1].sum(), f)
    torch.testing.assert_close(gradient, head.weight[1].expand(6, 7))


def test_state_is_kept() -> None:
    head, other = trained(), WhitenedHead(7, 2, 3, eps=1e-3).double()
    assert set(head.state_dict()) == {"linear.weight", "linear.bias", "running_mean", "running_covariance", "batches"}
    other.load_state_dict(head.state_dict())
    f = features(16, 7, 8)
    assert torch.equal(other(f), head(f))  # one more batch each, which counts the batches seen before
    assert torch.equal(other.eval()(f), head.eval()(f))


def test_half_features_under_autocast() -> None:
    head = trained().float().eval()
    for training in (True, False):
        head.train(training)
        f = features(16, 7).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(f)
        assert logits.dtype == torch.float32
        if not training:
            assert torch.equal(logits, head(f.float()))


def test_head_refuses_in_words() -> None:
    for batch in (0, 1):
        head = trained()
        with pytest.raises(TrainingError, match=f"batch_size={batch} at once: .* raise batch_size"):
            head(features(batch, 7))
        assert head.eval()(features(batch, 7)).shape == (batch, 2)
    with pytest.raises(ConfigError, match="group_size=8: must lie in 2 to 7"):
        WhitenedHead(7, 2, 8)
    with pytest.raises(ConfigError, match="eps=0: must be a number above 0"):
        WhitenedHead(7, 2, 3, eps=0)
    for momentum in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"momentum={momentum}: must be a number from 0 to 1, 0 excluded"):
            WhitenedHead(7, 2, 3, momentum=momentum)
