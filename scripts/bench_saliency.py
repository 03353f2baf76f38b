#!/usr/bin/env python
"""What saliency costs, against its peers on the same networks and images in one run.

python scripts/bench_saliency.py --threads 1 --rounds 5

Each round runs every side in turn; printed are medians of the rounds' ratios with their range, as Markdown. Networks
have random weights, which cost what trained ones do.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from timm import create_model
from torch import Tensor, nn

from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import Gradient
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.label_free import maps
from medsd.saliency.metrics.insertion_deletion import deletion_curve, insertion_curve
from medsd.saliency.metrics.perturb import baseline_image
from medsd.saliency.metrics.scoring import Perturbation
from medsd.saliency.registry import make_method

LABEL_FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "eigencam": maps.eigencam,
    "eigencam_reference": partial(maps.eigencam, variant="reference"),
    "multivec_eigencam": maps.multivec_eigencam,
    "tsm": maps.tsm,
    "mtsm": maps.mtsm,
    "mean_map": maps.mean_map,
    "channel_energy": maps.channel_energy,
}
# Channels and side of ResNet-50's layer4, ResNet-18's layer4, and ResNet-50's layer3 at 224 px.
ACTIVATIONS = ((2048, 7), (512, 7), (1024, 14))
PARTS = ("gradient", "deeplift", "label-free", "curves")
_CURVE_PX, _STEP_PX = 96, 192


Work = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """The same work by another library; `wanted` is how many times faster we want to be, None for information."""

    words: str
    work: Work
    wanted: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Works that are timed in turns.

    Attributes:
        where: network, layer, size.
        images: how many a call explains.
        ours: by what they give; each is compared with each peer.
        peers: whom we compare with.
        most_ms: the most milliseconds an image that we want to take.
    """

    where: str
    images: int
    ours: dict[str, Work]
    peers: list[Peer]
    most_ms: float | None = None


def main() -> None:
    """Time the parts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, Callable[[int], Iterator[Comparison]]] = {
        "gradient": gradients,
        "deeplift": paths,
        "label-free": label_free,
        "curves": curves,
    }
    # numpy's SVD in the peers runs on as many threads as torch.
    from threadpoolctl import threadpool_limits

    print(f"CPU, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds\n")
    print("| what | against | ours, ms/image | theirs | times faster (range) | wanted |")
    print("|---|---|---|---|---|---|")
    with threadpool_limits(options.threads):
        for part in options.part:
            for comparison in parts[part](options.batch_size):
                print("\n".join(rows(comparison, options.rounds)), flush=True)


def rows(comparison: Comparison, rounds: int) -> list[str]:
    """Lines of the table."""
    works = [*comparison.ours.values(), *(peer.work for peer in comparison.peers)]
    for work in works:
        work()  # the first call chooses kernels and imports
    times = np.array([[seconds(work) for work in works] for _ in range(rounds)]).T / comparison.images
    peers_times = times[len(comparison.ours) :]
    return [
        line(f"{words}, {comparison.where}", own, peer, theirs, comparison.most_ms)
        for words, own in zip(comparison.ours, times, strict=False)
        for peer, theirs in zip(comparison.peers, peers_times, strict=True)
    ]


def line(
    words: str, ours: npt.NDArray[np.float64], peer: Peer, theirs: npt.NDArray[np.float64], most_ms: float | None
) -> str:
    """A line of the table from seconds an image, one a round."""
    ratios, ms = theirs / ours, 1000 * float(np.median(ours))
    faster = float(np.median(ratios))
    wanted = [(f">= {peer.wanted:g}x", faster >= peer.wanted)] if peer.wanted is not None else []
    wanted += [(f"<= {most_ms:g} ms", ms <= most_ms)] if most_ms is not None else []
    verdict = ", ".join(f"{words}: {'met' if met else 'MISSED'}" for words, met in wanted)
    return (
        f"| {words} | {peer.words} | {ms:.2f} | {1000 * np.median(theirs):.2f} "
        f"| {faster:.2f} ({ratios.min():.2f} to {ratios.max():.2f}) | {verdict} |"
    )


def seconds(work: Work) -> float:
    """Time of a call; short work is repeated until a tenth of a second has passed."""
    started, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - started < 0.1:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls


def network_of(name: str) -> nn.Module:
    """A timm network without in-place ReLUs, which captum's DeepLift does not bear; timm gives each ReLU a module."""
    torch.manual_seed(0)
    network: nn.Module = create_model(name, pretrained=False, num_classes=1000).eval()
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network


def images(count: int, side_px: int = 224) -> Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def gradients(batch: int) -> Iterator[Comparison]:
    """Logits and the gradient map of the predicted class from one call, against captum, which needs another pass."""
    from captum.attr import LayerGradientXActivation

    for name, layers in (("resnet50", ("layer4", "layer3", "layer2")), ("resnet18", ("layer4", "layer3", "layer2"))):
        network, x = network_of(name), images(batch)
        for layer in layers:
            ours = partial(Gradient(network, layer).explain, x)
            captum = LayerGradientXActivation(network, network.get_submodule(layer), multiply_by_inputs=False)
            batched = partial(captums_map_and_logits, network, captum, x)
            single = partial(one_by_one, partial(captums_map_and_logits, network, captum), x)
            peers = [Peer("captum and a pass for logits", batched, 1.3), Peer("the same, image by image", single, 2)]
            yield Comparison(f"{name} {layer}, batch {batch}", batch, {"logits and gradient": ours}, peers)


def captums_map_and_logits(network: nn.Module, captum: object, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = network(x)
    attributed: Tensor = captum.attribute(x, target=logits.argmax(dim=1))  # type: ignore[attr-defined]
    return attributed.mean(dim=1), logits


def one_by_one(work: Callable[[Tensor], object], x: Tensor) -> list[object]:
    return [work(image) for image in x.split(1)]


def paths(batch: int) -> Iterator[Comparison]:
    """DeepLift and integrated gradients with zeros as baseline, against captum with the class given to both."""
    from captum.attr import LayerDeepLift, LayerIntegratedGradients

    network, x = network_of("resnet18"), images(batch)
    zeros, target, steps = torch.zeros_like(x), torch.zeros(batch, dtype=torch.long), 50

    def captums_deeplift(layer: nn.Module) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # of its hooks
            attributed: Tensor = LayerDeepLift(network, layer).attribute(x, zeros, target=target)
        return attributed

    def captums_gradients(layer: nn.Module) -> Tensor:
        path = LayerIntegratedGradients(network, layer)
        attributed: Tensor = path.attribute(x, zeros, target=target, n_steps=steps, internal_batch_size=4 * batch)
        return attributed

    for layer in ("layer4", "layer3", "layer2"):
        deeplift = partial(DeepLift(network, layer), x, target)
        peer = Peer("captum", partial(captums_deeplift, network.get_submodule(layer)))
        yield Comparison(f"resnet18 {layer}, batch {batch}", batch, {"DeepLift": deeplift}, [peer])
    integrated = partial(IntegratedGradients(network, "layer3", steps=steps), x, target)
    peer = Peer("captum", partial(captums_gradients, network.get_submodule("layer3")))
    yield Comparison(f"{steps} steps, resnet18 layer3, batch {batch}", batch, {"IG": integrated}, [peer])


def label_free(batch: int) -> Iterator[Comparison]:
    """The step from activations to maps, then whole calls, against pytorch-grad-cam."""
    from pytorch_grad_cam import EigenCAM
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

    for channels, side in ACTIVATIONS:
        activations = blobs(batch, channels, side)
        ours: dict[str, Work] = {name: partial(decompose, activations) for name, decompose in LABEL_FREE.items()}
        peer = Peer("grad-cam's SVD", partial(get_2d_projection, activations.numpy()), 20)
        yield Comparison(f"activations ({channels}, {side}, {side})", batch, ours, [peer], most_ms=5)
    for name in ("resnet50", "resnet18"):
        network, x = network_of(name), images(batch)
        eigencam = partial(make_method("eigencam", network, "layer4"), x)
        with EigenCAM(model=network, target_layers=[network.get_submodule("layer4")]) as cam:
            whole = Peer("grad-cam", partial(cam, input_tensor=x))
            yield Comparison(f"{name} layer4, batch {batch}", batch, {"EigenCAM, the whole call": eigencam}, [whole])


def blobs(batch: int, channels: int, side: int) -> Tensor:
    """Activations (batch, channels, side, side) after a ReLU: eight maps of falling strength, and noise.

    Noise alone has no first singular vector to speak of.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(batch, channels, 8, generator=generator) / torch.arange(1, 9)
    maps = torch.rand(batch, 8, side * side, generator=generator)
    noise = 0.1 * torch.randn(batch, channels, side * side, generator=generator)
    return (weights @ maps + noise).relu().view(batch, channels, side, side)


def curves(batch: int) -> Iterator[Comparison]:
    """Deletion and insertion in 48 steps of 192 px, against Quantus's PixelFlipping.

    Both score the same 48 perturbed images; ours scores the clean one too. Quantus has no insertion: its own loop runs
    from the blurred image with a function that puts pixels back. Its areas need numpy below 2, so it gives curves.
    """
    network, x = network_of("resnet18"), images(batch, _CURVE_PX)
    saliency = torch.randn(batch, _CURVE_PX, _CURVE_PX, generator=torch.Generator().manual_seed(1))
    blurred = baseline_image(x, "blur")
    with torch.no_grad():
        labels = network(x).argmax(dim=1)
    for count in (batch, 1):
        given = x[:count], labels[:count], saliency[:count]
        where = f"resnet18, {_CURVE_PX} px, steps of {_STEP_PX} px, batch {count}"
        deletion, insertion = (
            partial(curve, network, *given, Perturbation(step_px=_STEP_PX))
            for curve in (deletion_curve, insertion_curve)
        )
        removed = partial(quantus_curve, network, *given)
        put = partial(quantus_curve, network, blurred[:count], *given[1:], end=x[:count])
        yield Comparison(where, count, {"deletion": deletion}, [Peer("Quantus", removed, 5)])
        yield Comparison(where, count, {"insertion": insertion}, [Peer("Quantus's loop", put, 5)])


def quantus_curve(
    network: nn.Module, start: Tensor, labels: Tensor, saliency: Tensor, end: Tensor | None = None
) -> list[list[float]]:
    """Probabilities (B, 48) by PixelFlipping; to zeros, or to the images `end`."""
    import quantus

    metric = quantus.PixelFlipping(
        features_in_step=3 * _STEP_PX,  # it ranks the channels of a pixel, whose values are equal, one after the other
        normalise=False,
        perturb_baseline=0.0,
        perturb_func=None if end is None else put_back,
        perturb_func_kwargs=None if end is None else {"end": end.flatten(1).numpy()},
        disable_warnings=True,
    )
    maps = saliency[:, None].numpy()
    scores: list[list[float]] = metric(
        network, start.numpy(), labels.numpy(), maps, channel_first=True, device="cpu", batch_size=len(start)
    )
    return scores


def put_back(
    arr: npt.NDArray[np.float32], indices: npt.NDArray[np.int64], end: npt.NDArray[np.float32], perturb_baseline: float
) -> npt.NDArray[np.float32]:
    """For Quantus, which names the arguments: `arr` (B, F) with the features `indices` (B, I) of `end`."""
    arr = arr.copy()
    np.put_along_axis(arr, indices, np.take_along_axis(end, indices, axis=1), axis=1)
    return arr


if __name__ == "__main__":
    main()
