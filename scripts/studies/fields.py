"""Fields of real tissue with tumour masks, as small slides; classifiers of PatchCamelyon to map them with."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from medsd.cohort.patches import PatchDataset, read_patch_table, split_groups
from medsd.evaluate.scores import auc
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.phantom.files import write_pyramid

PATCH_PX, PATCH_MPP = 64, 0.97
MARGIN_UM = 64.0
"""Mirrored tissue around a field, so that maps see no glass at its border; it is not judged."""
CHECK_UM = 4.0
"""Side of the squares in which masks are known and maps judged."""
_CAMELYON16_PX = 256
_SPLIT = (0.15, 0.25)  # as configs/pcam.json, seed 0
_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Field:
    """A field with its tumour.

    Attributes:
        name: unique among the fields of its group.
        image: (H, W, 3) uint8.
        tumour: (H, W) bool.
        mpp: of both.
        chooses: choices are made on it; else it is judged.
    """

    name: str
    image: npt.NDArray[np.uint8]
    tumour: npt.NDArray[np.bool_]
    mpp: float
    chooses: bool = False

    @property
    def margin_px(self) -> int:
        """Mirrored pixels on each side of the field in its slide."""
        return round(MARGIN_UM / self.mpp)

    def write(self, path: Path) -> None:
        """The field as a pyramidal TIFF of its own, JPEG inside, in its mirrored margin."""
        margin = self.margin_px
        write_pyramid(path, np.pad(self.image, ((margin, margin), (margin, margin), (0, 0)), "reflect"), self.mpp, 2)

    def places(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Rows (h,) and columns (w,) of the middles of the judged squares on the slide, and whether most is tumour."""
        side = round(CHECK_UM / self.mpp)
        rows, columns = (length // side for length in self.tumour.shape)
        share = self.tumour[: rows * side, : columns * side].reshape(rows, side, columns, side).mean(axis=(1, 3))
        middles = [self.margin_px + (np.arange(count) + 0.5) * side for count in (rows, columns)]
        return middles[0], middles[1], share > 0.5


def camelyon_tiles(data: Path) -> Iterator[Field]:
    """Tiles of 512 px, group A, those with tumour; tiles of even number choose."""
    for row, image, mask in _rows(data / "camelyon_tiles_tumour_masks"):
        if row["label"] == "1" and row["group"] == "A":
            name = Path(row["file"]).stem
            yield Field(name, image, mask, PATCH_MPP, chooses=int(name) % 2 == 0)


def camelyon16_patches(data: Path) -> Iterator[Field]:
    """Patches of 256 px at 0.243 um/px that tumour covers in part; some overlap (`camelyon16_places`)."""
    for row, image, mask in _rows(data / "camelyon16_patches_40x"):
        if mask.any() and not mask.all():
            yield Field(Path(row["file"]).stem, image, mask, 0.243)


def camelyon16_places(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Number of the place of each patch of CAMELYON16, by names SLIDE_X_Y: patches that overlap share one.

    Their maps tell of the same cells, so that intervals are to be drawn over places.
    """
    parts = [name.rsplit("_", 2) for name in names]
    corners = np.array([[int(x), int(y)] for _, x, y in parts])
    places = np.arange(len(names))
    for later, earlier in combinations(range(len(names)), 2):
        apart = np.abs(corners[later] - corners[earlier]).max()
        if parts[later][0] == parts[earlier][0] and apart < _CAMELYON16_PX:
            places[places == places[later]] = places[earlier]
    return np.unique(places, return_inverse=True)[1]


def breast_regions(data: Path) -> Iterator[Field]:
    """Regions of breast tissue, which no classifier here was trained on."""
    for row, image, mask in _rows(data / "bcss_tumour_regions"):
        yield Field(Path(row["file"]).stem, image, mask, 0.25)


GROUPS = {"camelyon": camelyon_tiles, "camelyon16": camelyon16_patches, "breast": breast_regions}


def _rows(folder: Path) -> Iterator[tuple[dict[str, str], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]:
    with open(folder / "index.csv", encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            if row["mask"]:
                image = np.asarray(Image.open(folder / row["file"]).convert("RGB"))
                yield row, image, np.asarray(Image.open(folder / row["mask"]).convert("L")) > 0


@dataclass(frozen=True)
class Subject:
    """A classifier to map with.

    Attributes:
        words: in tables.
        layers: hidden layers, finest first.
        default: that of them whose maps are the default.
        scale: how much PatchCamelyon's patches are enlarged for it.
    """

    words: str
    layers: tuple[str, ...]
    default: str
    scale: int = 1


@dataclass(frozen=True)
class _Frozen:
    """An encoder that is not trained: timm name, file, what it takes off images and divides by, norms' epsilon."""

    encoder: str
    file: str
    mean: float
    deviation: float
    eps: float
    stem: tuple[str, str]


SUBJECTS = {
    "resnet18d": Subject("ResNet-18-D, PCam recipe", ("layer1", "layer2", "layer3"), "layer3"),
    # On uniform maps of lower blocks no vector near tissue is neutral.
    "lite0": Subject(
        "EfficientNet-Lite0 (ImageNet), head on PCam", ("blocks.3", "blocks.4", "blocks.5"), "blocks.4", 2
    ),
    "densenet": Subject(
        "DenseNet-121 (H&E), head on PCam",
        ("features.transition2", "features.denseblock3", "features.transition3"),
        "features.denseblock3",
        2,
    ),
}
_FROZEN = {
    "lite0": _Frozen(
        "tf_efficientnet_lite0",
        "tf_efficientnet_lite0.in1k.fp16.safetensors",
        0.5,
        0.5,
        1e-3,
        ("conv_stem", "bn1"),
    ),
    "densenet": _Frozen(
        "densenet121",
        "densenet121.capricorn_pathmnist.fp16.safetensors",
        0.0,
        1.0,
        1.001e-5,
        ("features.conv0", "features.norm0"),
    ),
}


def patches(data: Path, part: int, scale: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) uint8 and labels (n,) of a part (0 training, 1 validation) of `configs/pcam.json`."""
    table = read_patch_table(data / "pcam_patches", "stain_cluster")
    dataset = PatchDataset(table.rows(split_groups(table, _SPLIT, 0)[part]), PATCH_PX)
    images = torch.stack([dataset[row]["image"] for row in range(len(dataset))]).float()
    images = F.interpolate(images, scale_factor=scale, mode="bilinear") if scale > 1 else images
    return images.round().to(torch.uint8), torch.from_numpy(dataset.labels.astype(np.int64))


def with_head(data: Path, name: str, path: Path) -> None:
    """Write a classifier: a frozen encoder with logistic regression on PatchCamelyon, its strength by validation."""
    frozen, scale = _FROZEN[name], SUBJECTS[name].scale
    classifier = TileClassifier(frozen.encoder).eval()
    state = {key: value.float() for key, value in load_file(data / "weights_encoders" / frozen.file).items()}
    known = classifier.encoder.state_dict()
    classifier.encoder.load_state_dict({key: value for key, value in state.items() if key in known})
    _take_images(classifier, frozen)
    fit_head(classifier, data, scale)
    words = "PatchCamelyon, the head alone"
    card = ModelCard(frozen.encoder, classifier.classes, PATCH_PX * scale, PATCH_MPP / scale, words)
    save_classifier(path, classifier, card)


def fit_head(classifier: TileClassifier, data: Path, scale: int) -> None:
    """Give a classifier a head by logistic regression on PatchCamelyon, its strength chosen on validation patches."""
    parts = []
    for part in (0, 1):
        images, labels = patches(data, part, scale)
        with torch.no_grad():
            parts.append((torch.cat([classifier.features(some) for some in images.split(32)]).numpy(), labels.numpy()))
    (features, labels), (held, held_labels) = parts
    middle, width = features.mean(axis=0), features.std(axis=0) + 1e-6
    fits = [
        LogisticRegression(C=strength, max_iter=2000).fit((features - middle) / width, labels)
        for strength in _STRENGTHS
    ]
    best = max(fits, key=lambda fit: auc(held_labels, fit.decision_function((held - middle) / width)))
    weight = torch.from_numpy(best.coef_[0] / width).float() / 2
    bias = float(best.intercept_[0] - (best.coef_[0] * middle / width).sum()) / 2
    assert isinstance(classifier.head, nn.Linear)
    with torch.no_grad():
        classifier.head.weight.copy_(torch.stack([-weight, weight]))
        classifier.head.bias.copy_(torch.tensor([-bias, bias]))


def imagenet_lite0(data: Path) -> nn.Module:
    """EfficientNet-Lite0 with its 1,000 classes, in eval mode; takes RGB less 0.5, over 0.5."""
    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    weights = load_file(data / "weights_encoders" / _FROZEN["lite0"].file)
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    return network.eval()


def _take_images(classifier: Classifier, frozen: _Frozen) -> None:
    """Fold what the encoder takes off images into its first layers, and its norms' epsilon into their variances."""
    convolution, norm = (classifier.encoder.get_submodule(name) for name in frozen.stem)
    mean, deviation = (getattr(classifier.normalise, name).flatten() for name in ("mean", "std"))
    with torch.no_grad():
        shift = (mean - frozen.mean) / frozen.deviation
        norm.running_mean -= (convolution.weight.sum(dim=(2, 3)) * shift).sum(dim=1)
        convolution.weight *= (deviation / frozen.deviation)[None, :, None, None]
        for module in classifier.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var += frozen.eps - module.eps


def load_subject(path: Path) -> tuple[TileClassifier, ModelCard]:
    """A classifier and its card."""
    classifier, card, _ = load_classifier(path)
    assert isinstance(classifier, TileClassifier)
    return classifier, card
