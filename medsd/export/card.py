"""The model card of an exported bundle: what it is for, what it was trained on, how it did, what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import medsd
from medsd.export.source import TrainedClassifier
from medsd.heatmap.findings import prevalence_words, verdict
from medsd.heatmap.legend import ADDITIVE
from medsd.networks.calibrated import Calibration

_SCORES = (
    ("tiles.patch_auc", "Patch AUC, resampling tiles"),
    ("tiles.patch_auc_by_group", "Patch AUC, resampling slides or groups"),
    ("slides.slide_auc", "Slide AUC"),
    ("lesions.maps.model.froc", "Lesion FROC (CAMELYON16)"),
    ("calibration.ece", "Expected calibration error"),
    ("calibration.ece_by_chance", "the same of true probabilities (chance)"),
)


def model_card(trained: TrainedClassifier, name: str, scores: Mapping[str, Any] | None, has_training: bool) -> str:
    """`docs/README.md` of a bundle, Markdown.

    Args:
        trained: the classifier.
        name: of the bundle.
        scores: `scores.json` of the run, of these very weights; None where there is none.
        has_training: whether the bundle has the run's configuration.
    """
    card = trained.card
    parts = [
        f"# {name}",
        "**Research use only. Not a medical device, not for diagnosis.**",
        f"A classifier of tiles ({', '.join(card.classes)}) that maps whole slides: probability, and a saliency map of "
        f"what the answer rests on. Made with medsd {medsd.__version__}.",
        "## Use",
        _use(has_training),
        "## Intended use",
        f"Research on {card.tissue or 'the tissue it was trained on (nobody said which)'}, on slides like those below. "
        "The maps show what the classifier reacts to; they are no diagnosis, and saliency is not a probability.",
        "## Data",
        "\n".join(f"- {line}" for line in _data(trained)),
        "## Scores",
        _scores(scores),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(trained, has_training)),
        "## Files",
        _FILES,
    ]
    return "\n\n".join(parts) + "\n"


_FILES = """\
| file | what |
|---|---|
| `models/model.pt` | the weights alone, a state dict for `network_def` |
| `models/model.ts` | TorchScript of `network_def`: normalised float images (B, 3, H, W) to logits |
| `models/model.safetensors` | the weights with what validation data fixed: calibration, threshold, scale, reference |
| `configs/metadata.json` | what goes in and comes out, by MONAI's schema |

`model.pt` and `model.ts` give logits of the network as it was trained. Calibrated are the `pred` of the evaluator in
`configs/inference.json`, and the maps."""


def _use(has_training: bool) -> str:
    lines = [
        "Install medsd, then in this folder:",
        "    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SLIDE_OR_FOLDER",
        "leaves `output/heatmaps/index.html` and a folder a slide. `python -m monai.bundle run tiles ...` writes the "
        "probabilities of each tile to `output/tiles.csv` instead. In Python: "
        '`monai.bundle.create_workflow(config_file="configs/inference.json", workflow_type="infer")`, or the network '
        'alone by `monai.bundle.load(NAME, bundle_dir=FOLDER, workflow_type="inference").eval()`, where this folder is '
        "FOLDER/NAME. `ckpt_export` and `onnx_export` trace it: add `--use_trace True`.",
    ]
    if has_training:
        lines.append("`configs/train.json` is the configuration that it was trained by.")
    return "\n\n".join(lines)


def _data(trained: TrainedClassifier) -> Iterator[str]:
    card = trained.card
    yield f"Trained on: {card.trained_on}."
    yield f"Tissue and stain: {card.tissue or 'not stated'}."
    yield f"Tiles of {card.tile_px} px at {card.mpp:g} um per pixel ({card.tile_px * card.mpp:g} um across)."
    yield f"Encoder: {card.encoder} (timm), started from {card.start or 'weights of which nobody said'}."
    if card.stain_target is not None:
        yield f"Slides are normalised to a stain first ({card.stain_target.get('method', 'its numbers')}), here too."
    yield f"Weights: SHA-256 of tensors and card {trained.sha256}."


def _scores(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "None were measured, or not of these weights."
    rows = ["| on test data | value | 95 % interval |", "|---|---|---|"]
    for path, words in _SCORES:
        found: Any = scores
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        low = high = None
        if isinstance(found, Mapping):
            found, low, high = (found.get(key) for key in ("value", "low", "high"))
        if found is not None:
            interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            rows.append(f"| {words} | {found:.3f} | {interval} |")
    tiles = scores.get("tiles", {})
    said = f"{tiles.get('items', '?')} tiles of {tiles.get('groups', '?')} slides or groups"
    return "\n".join([*rows, "", f"Target: {scores.get('target', 'not stated')}. Test data: {said}."])


def _limits(trained: TrainedClassifier, has_training: bool) -> Iterator[str]:
    card = trained.card
    if "phantom" in card.trained_on:
        yield "Phantom slides are drawn: scores on them say nothing of real tissue."
    yield "On other tissue, stains or scanners than its own it was not tested, and its scores mean little there."
    named: dict[str, Calibration | None] = {card.classes[1]: card.calibration, **card.others}
    for word, calibration in named.items():
        yield prevalence_words(card, card.classes.index(word), calibration)
        if calibration is not None:
            begins = f"A region of {word} begins at probability {calibration.threshold:.3g}"
            yield f"{begins}, fixed on {calibration.source}."
            yield _map_words(calibration, word)
            yield _cut_off_words(calibration, word)
    if card.calibration is None:
        yield "It was never calibrated: there are no maps of slides, and probabilities are those of the softmax."
    if not has_training:
        yield "The configuration that it was trained by was not kept, so there is no `configs/train.json`."


def _map_words(calibration: Calibration, word: str) -> str:
    first = next(iter(calibration.limits), None)
    adds_up = " and adds up to a tile's log-odds" if first == ADDITIVE else ", and does not add up to log-odds"
    blurred = (
        f", then a Gaussian of {calibration.smooth_um:g} um" if calibration.smooth_um and first == ADDITIVE else ""
    )
    return f"The map of {word} is by {first} at {calibration.layer}{adds_up}{blurred}."


def _cut_off_words(calibration: Calibration, word: str) -> str:
    cut_off = calibration.cut_off
    if cut_off is None:
        return f"No cut-off of slide scores is known for {word}."
    said = verdict(cut_off.score, cut_off, word)
    return f"Slide scores: {said[0][:1].lower()}{said[0][1:]} {said[1]}"
