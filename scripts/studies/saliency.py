"""Saliency methods judged: what smoothing does, and randomised weights.

(a) `smoothing`: gradient, DeepLift and integrated gradients in hidden layers, with and without each smoothing. (b)
`cascade`: maps as weights are randomised.
Networks: SqueezeNet with ImageNet weights on photographs; a classifier of PatchCamelyon on test patches; classifiers of
phantom slides on regions with exact masks. The last two are finished runs of the bundles.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.metrics
import torch
import torch.nn.functional as F
from studies import natural, regions
from studies.regions import Images
from studies.saliency_tables import draw, tables
from torch import Tensor, nn

from medsd.bundle.surrogates import SURROGATE, SURROGATE_SCORES
from medsd.explain.surrogates import load_surrogate
from medsd.files import sha256_of
from medsd.networks.classifier import Classifier
from medsd.networks.modes import evaluating
from medsd.networks.weights import load_classifier
from medsd.saliency import smooth
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import Gradient
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.method import Method
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.perturb import unit_range, unit_strength
from medsd.saliency.metrics.pointing import energy_pointing
from medsd.saliency.metrics.randomisation import randomised_cascade
from medsd.saliency.metrics.scoring import Perturbation
from medsd.saliency.metrics.smoothness import normalised_variation, nyquist_energy
from medsd.saliency.registry import make_method

__all__ = ["PARTS", "add_arguments", "draw", "jobs_of", "key_of", "prepare", "recipe_of", "run_job", "tables"]

PARTS = ("cascade", "smoothing")
STEPS, IG_STEPS, BATCH = 12, 10, 8
SMOOTHED, RANDOMISED = 24, 8
Hidden = Gradient | DeepLift | IntegratedGradients


@dataclass(frozen=True)
class Subject:
    """A network with the images it is explained on.

    Attributes:
        network: in eval mode, takes float images.
        x: (n, 3, H, W) as it takes them.
        images: what they are made of.
        layers: hidden layers to explain, finest first.
        target: (n,) class numbers that are explained and scored.
        output: see `medsd.saliency.method.Output`.
        also: what the smoothing treats beside convolutions of stride 2.
        surrogate: its trained surrogate, if any.
        surrogate_scores: what the stage that trained it measured on validation tiles.
    """

    network: nn.Module
    x: Tensor
    images: Images
    layers: tuple[str, ...]
    target: Tensor
    output: Any
    also: tuple[Any, ...] = ()
    surrogate: smooth.Surrogate | None = None
    surrogate_scores: dict[str, Any] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Modules to randomise, from the top."""
        if isinstance(self.network, Classifier):
            return ("head", *(f"encoder.layer{number}" for number in (4, 3, 2, 1)), "encoder.conv1")
        return ("classifier.1", *(f"features.{number}" for number in (12, 10, 7, 4, 0)))


@dataclass(frozen=True)
class Job:
    """One part for one network."""

    part: str
    name: str
    patches: str
    weights: str
    runs: str
    folder: str


NETWORKS = {
    "smoothing": ("squeezenet", "pcam-resnet18", "camelyon-resnet18", "pcam"),
    "cascade": ("squeezenet", "pcam", "camelyon"),
}
HIDDEN: dict[str, Callable[[Subject, str], Hidden]] = {
    "gradient": lambda subject, layer: Gradient(subject.network, layer, subject.output),
    "deeplift": lambda subject, layer: DeepLift(subject.network, layer, subject.output),
    "integrated_gradients": lambda subject, layer: IntegratedGradients(
        subject.network, layer, subject.output, steps=IG_STEPS
    ),
}
CASCADE = (
    "gradient",
    "gradient_x_activation",
    "deeplift",
    "integrated_gradients",
    "gradcam",
    "smoothgrad",
    "eigencam",
    "tsm",
    "mtsm",
    "mean_map",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("patches", type=Path, help="Folder of PatchCamelyon patches with labels.csv.")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of SqueezeNet (.npz).")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Holds runs of the bundles.")


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """The parts asked for, for every network."""
    paths = (str(arguments.patches), str(arguments.weights), str(arguments.runs), str(folder))
    return [Job(part, name, *paths) for part in arguments.part for name in NETWORKS[part]]


def key_of(job: Job) -> tuple[str, str]:
    """What the tables find a job's results by."""
    return job.part, job.name


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    files = {job.name: Path(job.weights) if job.name == "squeezenet" else run_of(job) / "model.safetensors"}
    if job.part == "smoothing":
        files["surrogate"] = run_of(job) / SURROGATE
    return {
        "steps": STEPS,
        "ig_steps": IG_STEPS,
        "images": [SMOOTHED, RANDOMISED],
        "regions": regions.VERSION,
        **{name: sha256_of(path) for name, path in files.items() if path.is_file()},
    }


def run_of(job: Job) -> Path:
    """The finished run of a bundle whose classifier the job explains."""
    return Path(job.runs) / (job.name)


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Draw the regions, once."""
    regions.phantom_regions(folder / "slides")


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """The part's numbers, one list of images each."""
    torch.set_num_threads(1)
    subject = subject_of(job)
    return job, smoothing(subject) if job.part == "smoothing" else cascade(subject)


def subject_of(job: Job) -> Subject:
    """The network of a job and what it is explained on."""
    if job.name == "squeezenet":
        network = natural.squeezenet(Path(job.weights))
        crops = natural.images()
        photographs = Images(crops.images, np.unique(crops.sources, return_inverse=True)[1]).some(SMOOTHED)
        x = natural.normalise(photographs.images)
        target = predicted(network, x)
        layers = ("features.4", "features.7", "features.10")
        return Subject(network, x, photographs, layers, target, "logit", also=("max_pool",))
    run = run_of(job)
    network, _, digest = load_classifier(run / "model.safetensors")
    if job.name.startswith("pcam"):
        images = regions.held_out_patches(Path(job.patches), SMOOTHED)
        x = network.normalise(images.images)
        target = predicted(network, x)
    else:
        images = regions.phantom_regions(Path(job.folder) / "slides").some(SMOOTHED)
        x = network.normalise(images.images)
        target = torch.ones(len(x), dtype=torch.int64)  # tumour, which lies in every region
    layers = tuple(f"encoder.layer{number}" for number in (1, 2, 3))
    surrogate, _ = load_surrogate(run / SURROGATE, digest)
    scores = json.loads((run / SURROGATE_SCORES).read_text("utf-8"))
    return Subject(network, x, images, layers, target, "evidence", surrogate=surrogate, surrogate_scores=scores)


@torch.no_grad()
def predicted(network: nn.Module, x: Tensor) -> Tensor:
    """The classes that the network predicts, (n,)."""
    with evaluating(network):
        return torch.cat([network(part).flatten(1).argmax(dim=1) for part in x.split(BATCH)])


def smoothings(subject: Subject) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Ways of smoothing by name, as context managers."""
    network, also = subject.network, subject.also
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "none": nullcontext,
        "backward hook": lambda: smooth.backward_hook(network, also=also),
        "backward hook, symmetric": lambda: smooth.backward_hook(network, "symmetric", also=also),
        "forward hook": lambda: smooth.forward_hook(network, also=also),
    }
    if subject.surrogate is not None:
        surrogate = subject.surrogate
        ways["surrogate"] = lambda: smooth.surrogate(network, surrogate)
    return ways


def smoothing(subject: Subject) -> dict[str, Any]:
    """Per layer, method and smoothing: variation, Nyquist energy, insertion, deletion and pointing of every image.

    Noise, smoothed as the backward hook smooths gradients, shows what smoothing alone does to insertion and deletion.
    """
    found: dict[str, Any] = {"groups": subject.images.groups.tolist()}
    for layer in subject.layers:
        for name, build in HIDDEN.items():
            for way, context in smoothings(subject).items():
                with context():
                    parts = [
                        build(subject, layer).attribute(x, target)
                        for x, target in zip(subject.x.split(BATCH), subject.target.split(BATCH), strict=True)
                    ]
                found[f"{layer}/{name}/{way}"] = measured(subject, torch.cat(parts))
        plane = parts[0].shape[2:]
        noise = torch.randn((len(subject.x), 1, *plane), generator=seeded())
        found[f"{layer}/noise/none"] = measured(subject, noise)
        found[f"{layer}/noise/backward hook"] = measured(subject, smooth.Box((2, 2), "circular")(noise))
    if subject.surrogate_scores:
        found["surrogate"] = subject.surrogate_scores
    found["example"] = example(subject)
    found["constant"] = {boundary: constant_upstream(subject, boundary) for boundary in ("circular", "symmetric")}
    return found


def seeded() -> torch.Generator:
    """The same draws wherever it is called."""
    return torch.Generator().manual_seed(0)


def example(subject: Subject) -> dict[str, Any]:
    """The first image and its DeepLift maps in the finest layer, under each smoothing."""
    layer = subject.layers[0]
    maps = {}
    for way, context in smoothings(subject).items():
        with context():
            maps[way] = DeepLift(subject.network, layer, subject.output)(subject.x[:1], subject.target[:1])[0].tolist()
    image = subject.images.images[0].permute(1, 2, 0).tolist()
    return {"words": f"DeepLift, {layer}", "image": image, "maps": maps}


def measured(subject: Subject, attribution: Tensor) -> dict[str, list[float]]:
    """Measures of attributions (n, C, h, w), scored on the unchanged network."""
    # So that the bounds of the measures, which are absolute, do not depend on how small gradients are.
    attribution = attribution / attribution.abs().amax(dim=(1, 2, 3), keepdim=True)
    maps = attribution.mean(dim=1)
    # Nearest, as the released code resizes.
    pixels = F.interpolate(maps[:, None], subject.x.shape[2:])[:, 0]
    step = -(-pixels.shape[1] * pixels.shape[2] // STEPS)
    x = subject.x.contiguous(memory_format=torch.channels_last)  # the faster on a CPU
    curves = {
        "insertion": insertion_curve(subject.network, x, subject.target, pixels, Perturbation("blur", step, seeded())),
        "deletion": deletion_curve(subject.network, x, subject.target, pixels, Perturbation("zero", step, seeded())),
        "deletion_blur": deletion_curve(
            subject.network, x, subject.target, pixels, Perturbation("blur", step, seeded())
        ),
    }
    scores = {
        "variation": normalised_variation(attribution),
        "nyquist": nyquist_energy(attribution),
        **{name: curve_area(curve) for name, curve in curves.items()},
    }
    if subject.images.masks is not None:
        scores["pointing"] = energy_pointing(pixels, subject.images.masks).nan_to_num(0.0)
    return {name: values.tolist() for name, values in scores.items()}


def constant_upstream(subject: Subject, boundary: Any) -> dict[str, float]:
    """By strided convolution: Nyquist energy of its input gradient over that without smoothing, equal ones above."""
    sizes: dict[str, torch.Size] = {}
    names = [
        name
        for name, module in subject.network.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2
    ]
    modules = dict(subject.network.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _module, inputs, name=name: sizes.update({name: inputs[0].shape})
        )
        for name in names
    ]
    with torch.no_grad():
        subject.network(subject.x[:1])
    for handle in handles:
        handle.remove()
    ratios = {}
    for name in names:
        energies = []
        for context in (nullcontext(), smooth.backward_hook(modules[name], boundary)):
            u = torch.zeros(sizes[name], requires_grad=True)
            with context:
                (gradient,) = torch.autograd.grad(modules[name](u).sum(), u)
            energies.append(float(nyquist_energy(gradient)[0]) * float(gradient.double().square().sum()))
        ratios[name] = energies[1] / energies[0]
    return ratios


def cascade(subject: Subject) -> dict[str, Any]:
    """By method and stage: how far maps agree with those of the trained network, randomised down to that stage."""
    rows = torch.linspace(0, len(subject.x) - 1, RANDOMISED).round().long()
    x, target, layer = subject.x[rows], subject.target[rows], subject.layers[1]
    found: dict[str, Any] = {}
    for name in CASCADE:

        def build(network: nn.Module, name: str = name) -> Method:
            if name == "integrated_gradients":
                return IntegratedGradients(network, layer, subject.output, steps=IG_STEPS)
            return make_method(name, network, layer, subject.output)

        stages = randomised_cascade(subject.network, build, x, target, subject.stages)
        found[name] = {
            "stages": [stage.name for stage in stages],
            "rank_correlation": [defined(rank_correlation(stages[0].maps, stage.maps)) for stage in stages],
            # What unrelated images have in common (smoothness, borders) is no agreement.
            "other_image": [defined(rank_correlation(stages[0].maps, stage.maps.roll(1, 0))) for stage in stages],
            "structural_similarity": [defined(structural_similarity(stages[0].maps, stage.maps)) for stage in stages],
        }
    return found


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of maps (B, h, w) brought to 0 to 1, (B,); nan where either is constant."""
    pairs = [unit_range(unit_strength(maps.double())).cpu().numpy() for maps in (first, second)]
    return torch.tensor(
        [
            skimage.metrics.structural_similarity(a, b, data_range=1.0) if a.any() and b.any() else math.nan
            for a, b in zip(*pairs, strict=True)
        ]
    )


def defined(values: Tensor) -> list[float | None]:
    """Values (n,) as JSON has them; None for nan."""
    return [None if value != value else value for value in values.tolist()]
