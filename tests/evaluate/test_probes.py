"""Probes of frozen features: they read off what is there, see no test label, and equal scikit-learn's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.evaluate import probes
from medsd.evaluate.probes import Labelled, features_of, knn_probe, linear_probe, score_probe, standardise
from medsd.networks.classifier import TileClassifier


def drawn(items: int, dim: int, classes: int = 2, apart: float = 1.0, seed: int = 0) -> Labelled:
    """Gaussian clouds along skewed axes, in groups of ten that hold every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(items) % classes
    axes = rng.normal(size=(dim, dim)) * np.exp(-np.arange(dim) / 8)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * apart
    features = (rng.normal(size=(items, dim)) + centres[labels]) @ axes + 3
    return Labelled(features.astype(np.float32), labels, np.arange(items) // 10)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("whiten", [False, True])
def test_classes_that_are_apart_are_told_apart(classes: int, whiten: bool) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % classes
    features = rng.normal(size=(120, 12)) * 0.1
    features[np.arange(120), labels] += 5
    train = Labelled(features[:90], labels[:90], np.arange(90) // 9)
    for scores in (linear_probe(train, features[90:], whiten), knn_probe(train, features[90:], whiten=whiten)):
        found = score_probe(labels[90:], scores, np.arange(30) // 5)
        assert (found.auc.value, found.accuracy.value) == (1, 1) and np.isnan(found.auc.low)
        assert (found.items, found.groups) == (30, 6)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_permuted_labels_are_chance(probe: Any) -> None:
    rng = np.random.default_rng(3)
    one = drawn(300, 8, apart=0)
    train = Labelled(one.features[:200], rng.permutation(one.labels[:200]), one.groups[:200])
    found = score_probe(one.labels[200:], probe(train, one.features[200:]), one.groups[200:])
    assert found.auc.low < 0.5 < found.auc.high and found.accuracy.low < 0.5 < found.accuracy.high


def test_the_probe_is_scikit_learns_with_the_strength_of_held_out_groups() -> None:
    train, test = drawn(200, 6, apart=0.4), drawn(60, 6, apart=0.4, seed=1)
    scores = linear_probe(train, test.features)
    fits = {
        c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-9)).fit(
            train.features.astype(float), train.labels
        )
        for c in probes._STRENGTHS
    }
    x = test.features.astype(float)
    apart = {c: np.abs(fit.decision_function(x) - scores[:, 1]).max() for c, fit in fits.items()}
    chosen = min(apart, key=lambda c: apart[c])
    assert apart[chosen] < 1e-3 and probes._STRENGTHS[0] < chosen
    np.testing.assert_allclose(scores[:, 0], -scores[:, 1])


def test_nothing_of_the_items_beside_it_changes_a_score() -> None:
    """Neither the strength nor the whitening looks at what is scored."""
    train, test = drawn(120, 6), drawn(40, 6, seed=1)
    for probe in (linear_probe, knn_probe):
        for whiten in (False, True):
            alone = probe(train, test.features[:5], whiten=whiten)
            together = probe(train, np.concatenate([test.features[:5], 100 * test.features[5:]]), whiten=whiten)
            np.testing.assert_allclose(together[:5], alone, rtol=1e-9)


def test_held_out_groups_choose_the_strength() -> None:
    """A channel that says the group, and by it the label in training groups alone, is not trusted."""
    rng = np.random.default_rng(0)
    groups = np.arange(240) // 8
    labels = (rng.random(30) < 0.5).astype(int)[groups]
    features = rng.normal(size=(30, 60))[groups] + 0.01 * rng.normal(size=(240, 60))
    train = Labelled(features, labels, groups)
    alone = Labelled(features, labels, np.arange(240))
    assert probes._strength(train, 2, False) < probes._strength(alone, 2, False)


def test_whitening_is_pca_whitening_with_the_shrinkage_of_ledoit_and_wolf() -> None:
    train, test = drawn(150, 10), drawn(30, 10, seed=1)
    scaler = StandardScaler().fit(train.features.astype(float))
    x, x_test = (scaler.transform(each.features.astype(float)) for each in (train, test))
    amount = ledoit_wolf_shrinkage(x, assume_centered=True)
    assert 0 < amount < 0.5
    pca = PCA().fit(x)
    variances = pca.explained_variance_ * (len(x) - 1) / len(x)
    expected = pca.transform(x_test) / np.sqrt((1 - amount) * variances + amount * variances.mean())
    found = standardise(train.features, whiten=True)(test.features)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-4)


def test_standardised_features() -> None:
    train = drawn(50, 5)
    features = np.concatenate([train.features, np.full((50, 1), 7.3)], axis=1)
    for whiten in (False, True):
        mapped = standardise(features, whiten)(features)
        np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(mapped[:, 5], 0, atol=1e-12)
    np.testing.assert_allclose(standardise(features)(features)[:, :5].std(axis=0), 1, atol=1e-5)


@given(st.integers(1, 40), st.sampled_from([0.05, 0.07, 1.0]), st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_votes_of_neighbours_by_hand(k: int, temperature: float, seed: int) -> None:
    train, test = drawn(30, 4, 3, seed=seed), drawn(7, 4, 3, seed=9)
    unit, unit_test = (x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (train, test))
    cosine = (unit_test @ unit.T).astype(float)
    votes = np.zeros((7, 3))
    for row in range(7):
        for item in np.argsort(-cosine[row], kind="stable")[:k]:
            votes[row, train.labels[item]] += np.exp(cosine[row, item] / temperature)
    expected = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(knn_probe(train, test.features, k, temperature), expected, atol=1e-4)


def test_neighbours_equal_scikit_learns_on_unit_vectors() -> None:
    train, test = drawn(80, 5), drawn(20, 5, seed=1)
    unit, unit_test = (x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (train, test))
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit, train.labels)
    np.testing.assert_allclose(knn_probe(train, test.features), theirs.predict_proba(unit_test), atol=1e-4)


def test_more_classes_are_scored_each_against_the_rest() -> None:
    train, test = drawn(150, 6, 3, 0.5), drawn(60, 6, 3, 0.5, seed=1)
    scores = linear_probe(train, test.features)
    found = score_probe(test.labels, scores, test.groups)
    shares = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-9)
    assert found.auc.value == pytest.approx(roc_auc_score(test.labels, shares, multi_class="ovr"), abs=1e-9)
    assert found.auc.low < found.auc.value < found.auc.high
    assert found.accuracy.value == pytest.approx((scores.argmax(axis=1) == test.labels).mean())


def test_sure_answers_keep_their_ranks() -> None:
    """Probabilities would all round to 1."""
    features = np.array([[-1.0], [-0.9], [0.9], [1.0]]).repeat(20, axis=0)
    train = Labelled(features, np.array([0, 0, 1, 1]).repeat(20), np.arange(80) % 5)
    scores = linear_probe(train, np.array([[500.0], [600.0], [700.0]]))
    assert np.unique(scores[:, 1]).size == np.unique(scores[:, 0]).size == 3


def test_features_are_those_of_the_classifier() -> None:
    classifier = TileClassifier("test_resnet").train()
    images = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features_of(classifier.encoder, images.split(4))
    assert classifier.encoder.training and found.dtype == np.float32
    with torch.no_grad():
        expected = classifier.eval().features(images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert features_of(classifier.encoder, [images], "layer2").shape == (6, 48)
    with pytest.raises(NetworkError, match=r"layer 'layr2'.*layer2"):
        features_of(classifier.encoder, [images], "layr2")
    with pytest.raises(NetworkError, match="no map"):
        features_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), [images])
    with pytest.raises(DatasetError, match="no images"):
        features_of(classifier.encoder, [])


X = np.zeros((4, 2))
ONE, TWO = np.array([0, 0, 1, 1]), np.array([1, 2, 1, 2])


@pytest.mark.parametrize(
    ("features", "labels", "groups", "words"),
    [
        (X, ONE[:3], TWO, r"features \(4, 2\), labels \(3,\), groups \(4,\)"),
        (X[0], ONE, TWO, r"features \(2,\)"),
        (X + np.nan, ONE, TWO, "not all finite"),
        (X, -ONE, TWO, "class numbers from 0 on"),
        (X, ONE + 0.5, TWO, "class numbers from 0 on"),
    ],
)
def test_features_without_their_labels_are_refused(features: Any, labels: Any, groups: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        Labelled(features, labels, groups)


@pytest.mark.parametrize(
    ("labels", "groups", "features", "words"),
    [
        (ONE * 0, TWO, X, r"training labels are \[0\]"),
        (ONE * 2, TWO, X, r"training labels are \[0, 2\]"),
        (ONE, ONE, X, "class 0 is in one training group only"),
        (ONE, np.array([1, 2, 1, 1]), X, "class 1 is in one training group only"),
        (ONE, TWO, X[:, :1], r"features \(4, 1\) beside training features \(4, 2\)"),
        (ONE, TWO, X[:0], "m >= 1"),
        (ONE, TWO, X + np.inf, "not all finite"),
    ],
)
def test_a_probe_says_what_it_lacks(labels: Any, groups: Any, features: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        linear_probe(Labelled(X, labels, groups), features)


def test_bad_numbers_and_labels_are_told() -> None:
    train = Labelled(X, ONE, TWO)
    for wrong in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=0"):
            knn_probe(train, X, **wrong)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"test labels \[0, 2\]; the training part has 2 classes"):
        score_probe(ONE * 2, np.zeros((4, 2)), TWO)
    with pytest.raises(DatasetError, match="not finite"):
        score_probe(ONE, np.full((4, 2), np.nan), TWO)
