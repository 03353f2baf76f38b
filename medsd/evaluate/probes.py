"""What frozen features say of classes: linear and nearest-neighbour probes, scored with intervals over groups.

Pre-training is judged by how well classes can be read off its features while the encoder stays as it is. Probes learn
on a training part and give scores of other features, whose labels they never see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.evaluate.scores import Floats, Interval, bootstrap_groups, bootstrap_mean, weighted_auc
from medsd.networks.classifier import Normalise
from medsd.networks.modes import encoded_map, evaluating, map_of_layer, recorded
from medsd.networks.whitening import inverse_root

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_STRENGTHS = tuple(10.0**power for power in range(-5, 2))
_FOLDS = 5
_STEPS = 2000
_NEWTON = 1024  # channels
_EPS = 1e-6  # far below the variance 1 of a standardised channel


@dataclass(frozen=True)
class Labelled:
    """Features with their labels.

    Attributes:
        features: (n, d), as `features_of` gives them.
        labels: (n,) class numbers from 0 on.
        groups: (n,) numbers or names that items of one slide, patient or cluster share.

    Raises:
        DatasetError: unequal lengths, features that are not finite, or labels that are no class numbers.
    """

    features: npt.NDArray[np.floating]
    labels: npt.NDArray[np.integer]
    groups: npt.NDArray[Any]

    def __post_init__(self) -> None:
        shapes = np.shape(self.features), np.shape(self.labels), np.shape(self.groups)
        if len(shapes[0]) != 2 or not shapes[0][:1] == shapes[1] == shapes[2]:
            raise DatasetError(
                f"probe: features {shapes[0]}, labels {shapes[1]}, groups {shapes[2]}; give (n, d), (n,) and (n,)"
            )
        _check_finite(self.features)
        if not np.issubdtype(np.asarray(self.labels).dtype, np.integer) or (np.asarray(self.labels) < 0).any():
            raise DatasetError("probe: labels are not all class numbers from 0 on; leave items without a label out")


@dataclass(frozen=True)
class ProbeScores:
    """How well a probe tells classes apart, with 95 % bootstrap intervals over groups.

    Attributes:
        auc: area under the ROC curve; of more than two classes the mean over them, each against the rest.
        accuracy: share of items whose class has the highest score.
        items, groups: how many.
    """

    auc: Interval
    accuracy: Interval
    items: int
    groups: int


def frozen_maps(
    encoder: nn.Module, batches: Iterable[Tensor], layer: str | None = None, normalise: Normalise | None = None
) -> Iterator[Tensor]:
    """The maps (B, d, h, w) float32 of an encoder in eval mode, batch by batch, on its device and without graph.

    Args:
        encoder: a timm network without pooling and head, as `create_encoder` or `open_encoder` gives it.
        batches: (B, 3, H, W) uint8 images.
        layer: whose maps, a name of `encoder.named_modules()` such as "layer2"; None for the last.
        normalise: makes the encoder's input; None for ImageNet's mean and deviation.

    Raises:
        NetworkError: no such layer, or one that gives no map.
    """
    device = next(encoder.parameters()).device
    normalise = (normalise or Normalise()).to(device)
    for images in batches:
        with evaluating(encoder), torch.no_grad():
            inputs = normalise(images.to(device))
            if layer is None:
                maps = encoded_map(encoder, inputs)
            else:
                with recorded(encoder, layer) as outputs:
                    encoder(inputs)
                (maps,) = outputs
        yield map_of_layer(layer or "the last", maps, inputs).float()


def features_of(
    encoder: nn.Module, batches: Iterable[Tensor], layer: str | None = None, normalise: Normalise | None = None
) -> npt.NDArray[np.float32]:
    """Pooled features (n, d) float32 of images, in their order; arguments and errors as in `frozen_maps`.

    Raises:
        DatasetError: no images.

    Example:
        >>> from medsd.networks.classifier import create_encoder
        >>> encoder, _ = create_encoder("test_resnet", pretrained=False)
        >>> images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
        >>> features_of(encoder, images.split(4)).shape
        (8, 96)
    """
    pooled = [maps.mean(dim=(2, 3)).cpu().numpy() for maps in frozen_maps(encoder, batches, layer, normalise)]
    if not pooled:
        raise DatasetError("probe: no images; give at least one")
    return np.concatenate(pooled)


@dataclass(frozen=True)
class Standardised:
    """An affine map of features that was fitted on a training part: (x - mean) @ matrix.

    Attributes:
        mean: (d,) of the training part.
        matrix: (d, d).
    """

    mean: Floats
    matrix: Floats

    def __call__(self, features: npt.NDArray[np.floating]) -> Floats:
        """Features (n, d) mapped."""
        mapped: Floats = (features.astype(np.float64) - self.mean) @ self.matrix
        return mapped


def standardise(features: npt.NDArray[np.floating], whiten: bool = False) -> Standardised:
    """The map that gives features (n, d) mean 0 and each channel variance 1; constant channels become 0.

    Args:
        features: of the training part.
        whiten: channels of unit variance are whitened as well, by ZCA. Their covariance is shrunk towards a multiple
            of the identity first, by the amount of Ledoit and Wolf (2004): directions that n items hardly show would be
            blown up.

    Raises:
        DatasetError: fewer than two items.
    """
    values = features.astype(np.float64)
    if len(values) < 2:
        raise DatasetError(f"probe: {len(values)} training item(s); give at least 2")
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    varies = deviation > _EPS * np.abs(mean)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    if not whiten:
        return Standardised(mean, np.diag(scale))
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf((values - mean) * scale, assume_centered=True)
    return Standardised(mean, scale[:, None] * inverse_root(torch.from_numpy(covariance), _EPS).numpy())


@dataclass(frozen=True)
class LinearHead:
    """Logits (n, K) linear in features (n, d): features @ weight.T + bias.

    Attributes:
        weight: (K, d).
        bias: (K,).
    """

    weight: Floats
    bias: Floats

    def __call__(self, features: npt.NDArray[np.floating]) -> Floats:
        """Logits of features (n, d)."""
        logits: Floats = features.astype(np.float64) @ self.weight.T + self.bias
        return logits


def fit_head(train: Labelled, whiten: bool = False) -> LinearHead:
    """The head of a logistic regression on standardised features, as a linear map of the features themselves.

    Its L2 penalty is weakened tenfold, from C = 1e-5 to at most 10, as long as the log-likelihood rises on training
    groups that are held out in turn, in at most five folds (our choice). All is fitted on the training part.

    Args:
        train: of K classes, numbers 0 to K - 1, each in two groups or more.
        whiten: see `standardise`: the control that tells whether whitening while pre-training did more than the probe
            could do itself.

    Raises:
        DatasetError: classes or groups are too few.
    """
    classes = _check_probe(train, train.features)
    mapping = standardise(train.features, whiten)
    model = _logistic(_strength(train, classes, whiten), classes, train.features.shape[1])
    model.fit(mapping(train.features), train.labels)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes: half of their difference to each
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight @ mapping.matrix.T
    return LinearHead(weight, bias - weight @ mapping.mean)


def linear_probe(train: Labelled, features: npt.NDArray[np.floating], whiten: bool = False) -> Floats:
    """Log-odds (m, K) of each class against the rest, by the regression of `fit_head`, of features (m, d).

    Args:
        train, whiten: see `fit_head`.
        features: to be scored, (m, d).

    Raises:
        DatasetError: as `fit_head`, or features have other channels or are not finite.

    Example:
        >>> train = Labelled(np.array([[0.0], [0.1], [0.9], [1.0]]), np.array([0, 0, 1, 1]), np.array([1, 2, 1, 2]))
        >>> linear_probe(train, np.array([[0.2], [0.7]])).argmax(axis=1).tolist()
        [0, 1]
    """
    from scipy.special import logsumexp

    classes = _check_probe(train, features)
    logits = fit_head(train, whiten)(features)
    # Not probabilities, which round to 0 and 1 and lose the ranks of sure answers.
    rest = [logsumexp(np.delete(logits, number, axis=1), axis=1) for number in range(classes)]
    found: Floats = logits - np.stack(rest, axis=1)
    return found


def knn_probe(
    train: Labelled,
    features: npt.NDArray[np.floating],
    k: int = 20,
    temperature: float = 0.07,
    whiten: bool = False,
) -> Floats:
    """Shares (m, K) of the votes of the k training items nearest by cosine, each of weight exp(cosine / temperature).

    After Wu et al. (CVPR 2018), by scikit-learn. Features are taken as they are unless they are whitened.

    Args:
        train: of K classes, numbers 0 to K - 1.
        features: to be scored, (m, d).
        k: neighbours; all where there are fewer.
        temperature: above 0.
        whiten: see `standardise`.

    Raises:
        DatasetError: as `linear_probe`; one group a class will do.
        ConfigError: `k` or `temperature` is out of its range.
    """
    from sklearn.neighbors import KNeighborsClassifier

    check_number("k", k, "[1, inf)", whole=True)
    check_number("temperature", temperature, "(0, inf)")
    _check_probe(train, features)
    mapping = standardise(train.features, whiten=True) if whiten else np.asarray
    # scikit-learn's distance is 1 - cosine; what all weights share cancels.
    model = KNeighborsClassifier(
        min(k, len(train.labels)), metric="cosine", weights=lambda distance: np.exp(-distance / temperature)
    )
    votes: Floats = model.fit(mapping(train.features), train.labels).predict_proba(mapping(features))
    return votes


def score_probe(
    labels: npt.NDArray[np.integer], scores: npt.NDArray[np.floating], groups: npt.NDArray[Any]
) -> ProbeScores:
    """Score a probe on the part that it did not see.

    Args:
        labels: (m,) class numbers below K.
        scores: (m, K), as the probes give them.
        groups: (m,) what is resampled whole: slides, patients, clusters.

    Raises:
        DatasetError: a label that is no class of the scores, or scores that are not finite.
    """
    classes = scores.shape[1]
    if not np.isin(labels, np.arange(classes)).all():
        raise DatasetError(f"probe: test labels {np.unique(labels).tolist()}; the training part has {classes} classes")
    # Of two classes one tells all: the other's curve is the same.
    numbers = (1,) if classes == 2 else range(classes)
    each = [weighted_auc(labels == number, scores[:, number]) for number in numbers]
    auc = bootstrap_groups(lambda weight: math.fsum(of(weight) for of in each) / len(each), groups)
    accuracy = bootstrap_mean(scores.argmax(axis=1) == labels, groups=groups)
    return ProbeScores(auc, accuracy, len(labels), len(np.unique(groups)))


def _strength(train: Labelled, classes: int, whiten: bool) -> float:
    """The C of the best log-likelihood on training groups that are held out."""
    from scipy.special import log_softmax

    folds = []
    for kept, held_out in _folds(train, classes):
        mapping = standardise(train.features[kept], whiten)
        x, x_out = (mapping(train.features[rows]) for rows in (kept, held_out))
        folds.append((x, x_out, train.labels[kept], train.labels[held_out]))
    best, chosen = -math.inf, _STRENGTHS[0]
    for strength in _STRENGTHS:
        likelihood = 0.0
        for x, x_out, y, y_out in folds:
            logits = _logits(_logistic(strength, classes, x.shape[1]).fit(x, y), x_out)
            likelihood += float(log_softmax(logits, axis=1)[np.arange(len(y_out)), y_out].sum())
        if likelihood <= best:
            break  # it rises to one top and falls; weak penalties take the most time
        best, chosen = likelihood, strength
    return chosen


def _logistic(strength: float, classes: int, channels: int) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    # Newton's steps are few where channels are alike, but dear where there are many.
    solver = "newton-cholesky" if classes == 2 and channels <= _NEWTON else "lbfgs"
    return LogisticRegression(C=strength, solver=solver, max_iter=_STEPS)


def _logits(model: LogisticRegression, x: Floats) -> Floats:
    found: Floats = model.decision_function(x)
    return found if found.ndim == 2 else np.stack([np.zeros_like(found), found], axis=1)


def _folds(train: Labelled, classes: int) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Training and held-out rows; of every fold the training side has all classes."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = [len(np.unique(train.groups[train.labels == number])) for number in range(classes)]
    if min(groups) < 2:
        raise DatasetError(
            f"probe: class {groups.index(min(groups))} is in one training group only; the probe holds groups out in "
            "turn, give at least 2 of each class"
        )
    splitter = StratifiedGroupKFold(min(_FOLDS, *groups))
    folds = splitter.split(train.features, train.labels, train.groups)
    whole = [fold for fold in folds if len(np.unique(train.labels[fold[0]])) == classes]
    if not whole:
        raise DatasetError("probe: without the groups that are held out a class is missing; give more groups")
    return whole


def _check_probe(train: Labelled, features: npt.NDArray[np.floating]) -> int:
    found = np.unique(train.labels).tolist()
    if len(found) < 2 or found != list(range(len(found))):
        raise DatasetError(f"probe: training labels are {found}; give at least two classes, numbers from 0 without gap")
    if features.ndim != 2 or features.shape[1] != train.features.shape[1] or not len(features):
        raise DatasetError(
            f"probe: features {features.shape} beside training features {train.features.shape}; give (m, d), m >= 1"
        )
    _check_finite(features)
    return len(found)


def _check_finite(features: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(features).all():
        raise DatasetError("probe: features are not all finite; check the weights and compute them in float32")
