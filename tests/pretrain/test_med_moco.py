"""Med-MoCo: plain MoCo v2 bit for bit, what each part reaches, resuming, what leaves, and two processes against one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError, TrainingError
from medsd.networks.classifier import TileClassifier, create_encoder
from medsd.networks.start import load_encoder, save_encoder
from medsd.pretrain.contrast import shuffle_ranks, unshuffle_ranks
from medsd.pretrain.med_moco import MedMoCo, MedMoCoSettings, PretrainTerms
from medsd.pretrain.views import ViewSettings, draw_views

PLAIN: dict[str, Any] = {"local": 0.0, "decorrelation": "none"}


def tiny(norm: bool = True) -> nn.Module:
    """Stride 4, 8 channels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU())


def made(encoder: nn.Module, **settings: Any) -> MedMoCo:
    torch.manual_seed(1)
    chosen = {"dim": 5, "queue": 16, "group_size": 4, **settings}
    return MedMoCo(encoder, MedMoCoSettings(**chosen)).double()


def pairs(batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two views of each image, as float64, and where they are from."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, 3, 48, 48), dtype=torch.uint8, generator=generator)
    images = F.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    one, other = (draw_views(images, generator, ViewSettings(32, scale=(0.5, 1.0))) for _ in range(2))
    return one.images.double() / 255, other.images.double() / 255, one.to_source, other.to_source


def step(
    moco: MedMoCo, batch: tuple[Tensor, ...], seed: int = 0, progress: float = 0.0, groups: Tensor | None = None
) -> PretrainTerms:
    groups = torch.full((len(batch[0]),), -1) if groups is None else groups
    moco.train()
    moco.follow(progress)
    terms: PretrainTerms = moco(*batch, groups, torch.Generator().manual_seed(seed))
    terms.total.backward()
    return terms


class ReferenceMoCo(nn.Module):
    """MoCo v2 as its authors wrote it (facebookresearch/moco, main_moco --mlp), of one process."""

    def __init__(self, encoder: nn.Module, mlp: nn.Module, queue: Tensor, m: float, temperature: float) -> None:
        super().__init__()
        self.encoder_q = nn.Sequential(encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten(), mlp)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for param in self.encoder_k.parameters():
            param.requires_grad = False
        self.m, self.T, self.ptr = m, temperature, 0
        self.queue = queue

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)
            k = F.normalize(self.encoder_k(im_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / self.T
        self.queue[:, self.ptr : self.ptr + len(k)] = k.T
        self.ptr = (self.ptr + len(k)) % self.queue.shape[1]
        return logits


def test_without_its_parts_it_is_moco_v2_bit_for_bit() -> None:
    encoder = tiny()
    moco = made(encoder, **PLAIN, momentum=0.9)
    queue = F.normalize(torch.randn(5, 16, dtype=torch.float64), dim=0)
    moco.queue.keys.copy_(queue)
    moco.queue.filled.fill_(16)
    reference = ReferenceMoCo(copy.deepcopy(encoder), copy.deepcopy(moco.projector), queue.clone(), 0.9, 0.2).train()
    with torch.no_grad():  # twins that differ, so that the average is seen
        for ours, theirs in zip(
            [*moco.key_encoder.parameters(), *moco.key_projector.parameters()],
            reference.encoder_k.parameters(),
            strict=True,
        ):
            ours.add_(0.01)
            theirs.add_(0.01)
    ours = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(reference.encoder_q.parameters(), lr=0.1, momentum=0.9)
    for number in range(6):  # once round the queue and more
        first, second, *places = pairs(seed=number)
        logits = reference(first, second)
        expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        ours.zero_grad()
        terms = step(moco, (first, second, *places))
        ours.step()
        moco.enqueue(terms.keys, torch.full((4,), -1))
        assert torch.equal(terms.total, expected)
        assert torch.equal(moco.queue.keys, reference.queue)
        assert float(terms.parts["accuracy"]) == float((logits.argmax(1) == 0).float().mean())
    for mine, other in ((moco.encoder, reference.encoder_q[0]), (moco.key_encoder, reference.encoder_k[0])):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("layer", [None, "0"])
@pytest.mark.parametrize("reading", ["c", "b"])
def test_the_local_term_reaches_the_encoder(layer: str | None, reading: str) -> None:
    moco = made(tiny(), decorrelation="none", local_layer=layer, local=0.5, reading=reading, regions=2)
    terms = step(moco, pairs())
    gradients = {name: p.grad for name, p in moco.named_parameters() if p.requires_grad}
    torch.testing.assert_close(terms.total, terms.parts["contrast"] + 0.5 * terms.parts["local"])
    alone = made(tiny(), **PLAIN)
    step(alone, pairs())
    for name in ("encoder.0.weight", "encoder.2.weight"):
        ours, without = gradients[name], dict(alone.named_parameters())[name].grad
        assert ours is not None and without is not None
        above = layer == "0" and name == "encoder.2.weight"  # the layer's map does not depend on it
        assert torch.allclose(ours, without) == above


def test_each_batch_norm_sees_each_batch_once_and_keys_take_no_gradient() -> None:
    moco = made(tiny(), local_layer="0", regions=2)
    batches = [pairs(seed=seed) for seed in range(3)]
    for batch in batches:
        terms = step(moco, batch)
        moco.enqueue(terms.keys, torch.full((4,), -1))
    assert not terms.keys.requires_grad
    for encoder in (moco.encoder, moco.key_encoder):
        assert int(encoder[3].num_batches_tracked) == 3  # type: ignore[index, arg-type]
    twins = (moco.key_encoder, moco.key_projector, moco.key_local_projector)
    assert all(p.grad is None and not p.requires_grad for twin in twins for p in twin.parameters())
    assert all(p.grad is not None for p in moco.parameters() if p.requires_grad)
    assert {"contrast", "local", "accuracy", "rank"} == set(terms.parts)
    assert 1 <= float(terms.parts["rank"]) <= 3


@pytest.mark.parametrize(
    "change", [{"regions": 2}, {"decorrelation": "w1", "local_layer": "0"}, {"reading": "b", "regions": 2}]
)
def test_statistics_and_losses_are_in_single_precision_under_autocast(change: dict[str, Any]) -> None:
    moco = made(tiny(), **change).float().train()
    first, second, *places = pairs()
    with torch.autocast("cpu", torch.bfloat16):
        terms = moco(first.float(), second.float(), *places, torch.full((4,), -1), torch.Generator())
    terms.total.backward()
    assert terms.total.dtype == terms.keys.dtype == torch.float32
    gradients = [p.grad for p in moco.parameters() if p.requires_grad]
    assert all(each is not None and bool(each.isfinite().all()) for each in gradients)
    exact = moco(first.float(), second.float(), *places, torch.full((4,), -1), torch.Generator())
    torch.testing.assert_close(terms.total, exact.total, rtol=0.05, atol=0.05)


def test_forward_changes_neither_queue_nor_twins() -> None:
    moco = made(tiny(norm=False), regions=2).train()
    before = copy.deepcopy(moco.state_dict())
    moco(*pairs(), torch.full((4,), -1), torch.Generator())
    assert all(torch.equal(value, before[name]) for name, value in moco.state_dict().items())


def test_whitening_is_alike_in_both_branches_and_drawn_by_the_generator() -> None:
    moco = made(tiny(), local=0.0)
    first, _, place, _ = pairs()
    terms = step(moco, (first, first, place, place))
    q = moco.train()(first, first, place, place, torch.full((4,), -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.keys, terms.keys)  # twins are equal, and so are their groups
    other = step(moco, (first, first, place, place), seed=1)
    assert not torch.allclose(other.keys, terms.keys)


def test_keys_of_the_same_slide_are_no_negatives_by_option() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    losses = []
    for separate in (False, True):
        moco = made(tiny(), **PLAIN, separate_slides=separate)
        moco.enqueue(step(moco, pairs()).keys, torch.zeros(4, dtype=torch.int64))
        moco.zero_grad()
        batch = pairs(seed=1)
        losses.append(float(step(moco, batch, groups=groups).parts["contrast"].detach()))
    assert losses[1] < losses[0]


def test_a_batch_in_pieces_has_one_queue() -> None:
    """Without norms over the batch, pieces give the gradient of the whole."""
    whole, pieces = (made(tiny(norm=False), **PLAIN) for _ in range(2))
    for moco in (whole, pieces):
        moco.enqueue(F.normalize(torch.ones(8, 5).double().cumsum(0), dim=1), torch.full((8,), -1))
    batch = pairs(8)
    step(whole, batch)
    pieces.follow(0.0)
    for rows in (slice(0, 4), slice(4, 8)):
        terms = pieces(*(each[rows] for each in batch), torch.full((4,), -1), torch.Generator())
        (terms.total / 2).backward()
    for (name, ours), theirs in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: name + text)


def test_the_state_resumes_to_the_bit() -> None:
    def trained(moco: MedMoCo, steps: range) -> None:
        for number in steps:
            moco.zero_grad()
            terms = step(moco, pairs(seed=number), number, number / 4)
            with torch.no_grad():
                for parameter in moco.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
            moco.enqueue(terms.keys, torch.full((4,), number))

    whole = made(tiny(), decorrelation="w1", regions=2)
    trained(whole, range(4))
    start = made(tiny(), decorrelation="w1", regions=2)
    trained(start, range(2))
    resumed = made(tiny(), decorrelation="w1", regions=2)
    resumed.load_state_dict(start.state_dict())
    trained(resumed, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("decorrelation", ["w2", "w1"])
def test_what_leaves_starts_a_classifier(decorrelation: str, tmp_path: Path) -> None:
    encoder, _ = create_encoder("test_resnet", pretrained=False)
    moco = MedMoCo(encoder, MedMoCoSettings(queue=8, group_size=8, decorrelation=decorrelation, local=0.0)).train()  # type: ignore[arg-type]
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    views = draw_views(images, torch.Generator(), ViewSettings(64))
    x = moco.normalise(views.images)
    moco(x, x, views.to_source, views.to_source, torch.full((4,), -1), torch.Generator())
    moco.eval()
    save_encoder(tmp_path / "encoder.safetensors", moco.plain_encoder(), "test_resnet", "a test")
    classifier = TileClassifier("test_resnet").eval()
    load_encoder(classifier.encoder, tmp_path / "encoder.safetensors")
    with torch.no_grad():
        features, embeddings = moco.embed(x)
        torch.testing.assert_close(classifier.features(views.images), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    plain = timm.create_model("test_resnet", num_classes=0, global_pool="")
    assert moco.plain_encoder().state_dict().keys() == plain.state_dict().keys()


def test_where_cells_look_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    assert made(tiny(), regions=2)._centre_px == 0.5
    assert made(tiny(), regions=2, local_layer="0")._centre_px == 0.5
    assert made(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), regions=2)._centre_px == 2.0

    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean(dim=(2, 3), keepdim=True).sigmoid()

    assert not caplog.records
    assert made(nn.Sequential(nn.Conv2d(3, 8, 4, 4), Gated()), regions=2)._centre_px is None
    assert "local regions: map cells are taken to tile the view evenly" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queue": 0}, "queue=0"),
        ({"dim": 0}, "dim=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"local": -1}, "local=-1"),
        ({"regions": 1}, "regions=1"),
        ({"least_overlap": 2}, "least_overlap=2"),
        ({"decorrelation": "w3"}, "decorrelation='w3'"),
        ({"group_size": 1}, "group_size=1"),
        ({"eps": 0}, "eps=0"),
        ({"reading": "a"}, "reading='a'"),
    ],
)
def test_settings_out_of_range_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MedMoCoSettings(**change)


def test_bad_networks_and_batches_in_words() -> None:
    with pytest.raises(NetworkError, match="layer 'layer9'"):
        made(tiny(), local_layer="layer9")
    with pytest.raises(NetworkError, match=r"no map \(B, C, h, w\)"):
        made(nn.Sequential(tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    moco = made(tiny(), **PLAIN)
    with pytest.raises(ConfigError, match=r"queue=16: .* multiple of pretrain_batch_size \(of all processes: 3\)"):
        moco.enqueue(torch.ones(3, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TrainingError, match="cannot be whitened"):
        first, *rest = pairs()
        step(made(tiny(), local=0.0), (first * float("nan"), *rest))
    first, *rest = pairs()
    loss = moco.train()(first * float("nan"), *rest, torch.full((4,), -1), torch.Generator()).total
    assert not bool(loss.isfinite())  # the step refuses it


# Two processes against one.
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "w2": {"regions": 2},
    "w1": {"decorrelation": "w1", "regions": 2, "local_layer": "0"},
    "corr": {"decorrelation": "corr", "penalty": 0.5, "local": 0.0},
}
BATCH = 8


def run_case(name: str, rows: slice, seed: int) -> dict[str, Tensor]:
    """Loss, gradients (averaged as DistributedDataParallel does) and state after two steps."""
    moco = made(tiny(norm=name == "w1"), **CASES[name])  # IterNorm takes the place of the only norm
    results = {}
    for number in range(2):
        batch = pairs(BATCH, seed=number)
        moco.zero_grad()
        terms = step(moco, tuple(each[rows] for each in batch), seed + number, 0.5)
        loss = terms.total.detach().clone()
        for value in (loss, *(p.grad for p in moco.parameters() if p.grad is not None)):
            if dist.is_initialized():
                dist.all_reduce(value)
                value /= dist.get_world_size()
        with torch.no_grad():
            for parameter in moco.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        moco.enqueue(terms.keys, torch.arange(BATCH)[rows])
        results[f"loss {number}"] = loss
    return results | dict(moco.state_dict())


def run_process(rank: int, meeting: Path, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    mine = slice(0, 4) if rank == 0 else slice(4, 8)
    # The processes' generators differ; the first one's draws count.
    results = {name: run_case(name, mine, seed=100 * rank) for name in CASES}
    x = torch.arange(8.0).view(8, 1, 1, 1)[mine]
    shuffled, order = shuffle_ranks(x, torch.Generator().manual_seed(rank))
    norm = nn.BatchNorm2d(1)
    results["shuffle"] = {
        "shuffled": shuffled,
        "back": unshuffle_ranks(shuffled, order),
        "norm": unshuffle_ranks(norm(shuffled).detach(), order),
        "plain": norm(x).detach(),
    }
    torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory, run_apart: Callable[..., list[int]]
) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("two")
    outs = [folder / "0.pt", folder / "1.pt"]
    assert run_apart(run_process, *((rank, folder / "meeting", out) for rank, out in enumerate(outs))) == [0, 0]
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, processes: list[dict[str, dict[str, Tensor]]]) -> None:
    one = run_case(name, slice(0, 8), seed=0)
    for other in (results[name] for results in processes):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: key + text)


def test_samples_are_dealt_out_anew_and_come_back(processes: list[dict[str, dict[str, Tensor]]]) -> None:
    found = [results["shuffle"] for results in processes]
    dealt = torch.cat([each["shuffled"] for each in found]).flatten()
    assert dealt.sort().values.tolist() == list(range(8))
    assert set(found[0]["shuffled"].flatten().tolist()) != {0, 1, 2, 3}
    assert torch.cat([each["back"] for each in found]).flatten().tolist() == list(range(8))
    # BatchNorm saw other companions: its results differ from those of the samples that were here.
    assert not torch.allclose(found[0]["norm"], found[0]["plain"], atol=0.05)
