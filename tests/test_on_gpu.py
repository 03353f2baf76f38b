"""The pretended GPU is like one; on it the default bundle's steps and maps have everything on one device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from monai.losses import DiceCELoss

from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier, create_encoder
from medsd.objectives.aim import AimObjective
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.pretrain.med_moco import MedMoCo, MedMoCoSettings
from medsd.pretrain.step import PretrainStep
from medsd.pretrain.views import ViewSettings
from medsd.saliency.registry import make_method
from medsd.segment.network import SegmentationNetwork
from medsd.segment.step import SegmentationStep
from medsd.slides.tissue import TissueMask
from medsd.training.predict import predict_logits
from medsd.training.step import ObjectiveStep
from tests.pretended_gpu import GPU, OnGpu, OtherDeviceError, waits

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


REFUSED: dict[str, tuple[type[Exception], Callable[[torch.Tensor, torch.Tensor], object]]] = {
    "sum": (OtherDeviceError, lambda here, there: here + there),
    "written into": (OtherDeviceError, lambda here, there: here.add_(there)),
    "its indices": (OtherDeviceError, lambda here, there: here[there.long()]),
    "a layer": (OtherDeviceError, lambda here, there: torch.nn.Linear(4, 2)(there)),
    "a number of the CPU written into": (OtherDeviceError, lambda here, there: torch.zeros(()).add_(there.sum())),
    "numpy": (TypeError, lambda here, there: np.asarray(there)),
    "draws": (RuntimeError, lambda here, there: torch.rand(4, device=GPU, generator=torch.Generator())),
    "draws in place": (RuntimeError, lambda here, there: there.normal_(generator=torch.Generator())),
    "backward": (OtherDeviceError, lambda here, there: _returns_of_the_cpu(there)),
}


def _returns_of_the_cpu(there: torch.Tensor) -> None:
    leaf = there.clone().requires_grad_()
    middle = leaf * 2
    middle.register_hook(lambda gradient: torch.ones(4))
    (middle * leaf).sum().backward()


@pytest.mark.parametrize("what", REFUSED)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu: torch.device, what: str) -> None:
    error, attempt = REFUSED[what]
    with pytest.raises(error):
        attempt(torch.zeros(4), torch.ones(4, device=gpu))


def test_what_a_gpu_allows_is_the_cpus(gpu: torch.device) -> None:
    there = torch.arange(6.0).to(gpu).view(2, 3)
    assert there.device == gpu and isinstance(there, OnGpu)
    assert (there * torch.tensor(2.0))[:, torch.tensor([1])].cpu().tolist() == [[2.0], [8.0]]
    there[0, 0] = 7.0
    assert torch.zeros(2, 3).copy_(there).sum().item() == 22.0
    assert torch.rand(3, device=gpu, generator=torch.Generator(gpu).manual_seed(1)).device == gpu
    first, second = (timm.create_model("test_resnet").eval().requires_grad_() for _ in range(2))
    second.load_state_dict(first.state_dict())
    second.to(gpu)
    first(IMAGES).logsumexp(1).sum().backward()
    second(IMAGES.to(gpu)).logsumexp(1).sum().backward()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(b.grad.device == gpu and torch.equal(a.grad, b.grad.cpu()) for a, b in pairs)


def test_what_has_the_host_wait_is_counted(gpu: torch.device) -> None:
    there = torch.arange(6.0).to(gpu, non_blocking=True)
    with waits() as waited:
        assert not there[torch.tensor([1]).to(gpu, non_blocking=True)].sum().isnan().is_cpu
        there[there > 3] = 0.0  # a fill
    assert not waited
    with waits() as waited:
        assert float(there.sum()) == 6.0 and there[there > 0].cpu().tolist() == [1.0, 2.0, 3.0]
        torch.tensor([1.0], device=gpu)
    assert sum(waited.values()) == 4
    late = there.to("cpu", non_blocking=True)
    assert late.sum() == 0.0  # not there yet
    torch.cuda.synchronize()
    assert late.sum() == 6.0


def _batch(side_px: int) -> dict[str, torch.Tensor]:
    images = torch.randint(256, (8, 3, side_px, side_px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.arange(8) % 2, "group": torch.arange(8) // 2}


def _waits_a_step(
    step: Any, network: torch.nn.Module, batch: dict[str, torch.Tensor], loss: Any = None
) -> Counter[str]:
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad])
    state = SimpleNamespace(device=GPU, epoch=1, iteration=1, epoch_length=4, max_epochs=2)
    engine = SimpleNamespace(network=network, optimizer=optimizer, state=state, loss_function=loss)
    step(engine, batch)  # what is measured once
    state.iteration += 1
    with waits() as waited:
        output = step(engine, batch)
    assert isinstance(output["loss"], float) and math.isfinite(output["loss"])
    return waited


@pytest.mark.parametrize(
    "loss", [SaliencyDecor(consistency=0, decorrelation=0), SaliencyDecor(warm_epochs=0), AimObjective(max_epochs=2)]
)
def test_a_training_step_waits_for_the_device_once(gpu: torch.device, loss: Any) -> None:
    kind = AimClassifier if isinstance(loss, AimObjective) else TileClassifier
    waited = _waits_a_step(ObjectiveStep(stain_apart=0.2), kind("resnet10t").to(gpu), _batch(64), loss)
    assert list(waited.values()) == [1], waited


def test_a_step_of_segmentation_waits_for_the_device_once(gpu: torch.device) -> None:
    network, batch = SegmentationNetwork("test_resnet", ("background", "gland")).to(gpu), _batch(64)
    batch["label"] = batch["image"][:, :1] // 128
    waited = _waits_a_step(SegmentationStep(crop_px=32), network, batch, DiceCELoss(to_onehot_y=True, softmax=True))
    assert list(waited.values()) == [1], waited


def test_a_step_of_pretraining_waits_for_its_loss_and_decompositions_alone(gpu: torch.device) -> None:
    encoder, _ = create_encoder("resnet10t", pretrained=False)
    network = MedMoCo(encoder, MedMoCoSettings(queue=16, group_size=8, local_layer="layer2")).to(gpu)
    waited = _waits_a_step(PretrainStep(views=ViewSettings(size_px=64)), network, _batch(96))
    assert Counter(what.partition(" ")[0] for what in waited.elements()) == {"event": 1, "_linalg_eigh": 3}, waited


def test_no_function_of_deeplift_waits_for_the_device(gpu: torch.device) -> None:
    network = timm.create_model("resnet10t").eval().to(gpu)
    method = make_method("deeplift", network, "layer2", "evidence")
    with waits() as waited:
        maps = method(IMAGES.to(gpu), 1)
    # Logits, sum, cancelling channels and maps are looked at, each once.
    assert len(waited) == sum(waited.values()) == 5, waited
    expected = make_method("deeplift", network.to("cpu"), "layer2", "evidence")(IMAGES, 1)
    assert torch.equal(maps.cpu(), expected)


def test_tiles_are_predicted_without_waiting_for_each_batch(gpu: torch.device) -> None:
    network = TileClassifier("test_resnet")
    items = [{"image": image, "label": 0} for image in _batch(64)["image"]]
    expected = predict_logits(network, items, batch_size=2)
    network.to(gpu)
    with waits() as waited:
        found = predict_logits(network, items, batch_size=2)
    assert sum(waited.values()) == 1 and np.array_equal(found, expected), waited


@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_maps_of_slides_are_the_cpus_and_pixels_are_read_ahead(
    gpu: torch.device, way: Any, array_slide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[int] = []
    monkeypatch.setattr(
        "medsd.slides.reading.ThreadPoolExecutor", lambda threads: pools.append(threads) or ThreadPoolExecutor(threads)
    )
    slide = array_slide(np.random.default_rng(0).integers(0, 256, (200, 264, 3), dtype=np.uint8))
    tissue = TissueMask(np.ones((33, 41), bool), 8.0)
    settings = MapSettings(("gradient_x_activation",), "layer2", block_px=128, way=way)
    engine = make_engine(TileClassifier("test_resnet"), 64, 1.0, settings=settings)
    expected = engine.map(slide, tissue)
    engine = make_engine(engine.classifier.to(gpu), 64, 1.0, settings=settings)
    with waits() as waited:
        found = engine.map(slide, tissue)
    for mine, theirs in ((found.probability, expected.probability), (found.saliency, expected.saliency)):
        np.testing.assert_allclose(mine.values, theirs.values, rtol=0, atol=1e-5 * np.nanmax(np.abs(theirs.values)))
    assert set(pools) == {1, 4}
    assert not [what for what in waited if "cascade.py" in what or "rules.py" in what]
