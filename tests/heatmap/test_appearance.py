"""Whether tiles look like those of validation: images whose stain and detail are known."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from medsd.cohort.entry import SlideEntry
from medsd.heatmap.appearance import (
    STATISTICS,
    Appearance,
    AppearanceCheck,
    appearance_card,
    statistics,
    usual_appearance,
)
from medsd.heatmap.cohort import map_slides, read_slide_record
from medsd.heatmap.model import MapRequest
from medsd.networks.weights import load_classifier, save_classifier
from medsd.slides.stain.augment import RUIFROK, restain


@pytest.fixture(scope="module")
def tiles() -> Tensor:
    """Forty tiles of two stains in known amounts, with grain."""
    random = np.random.default_rng(0)
    amounts = random.uniform(0.4, 0.9, (40, 2, 1, 1)) * random.uniform(0.5, 1.5, (40, 2, 48, 48))
    return as_bytes(np.einsum("bshw,sc->bchw", amounts, np.array(RUIFROK)))


def as_bytes(density: np.ndarray) -> Tensor:
    return torch.from_numpy(np.round(255 * np.exp(-density)).astype(np.uint8))


def test_stains_are_measured_as_they_were_mixed() -> None:
    for amounts in ((0.5, 0.3), (0.2, 0.8)):
        density = np.broadcast_to((np.array(amounts) @ np.array(RUIFROK))[None, :, None, None], (1, 3, 16, 16)).copy()
        density[..., :6] = 0  # glass is no weak stain
        (found,) = statistics(as_bytes(density))
        assert found[:2] == pytest.approx(amounts, abs=0.02)
        assert found[2:4] == pytest.approx(0, abs=0.02)  # neither yellow nor blue; one tone has no contrast


def test_glass_is_not_measured(tiles: Tensor) -> None:
    white = torch.full_like(tiles, 250)
    assert statistics(white).shape == (0, 5) and usual_appearance(white) is None
    usual = usual_appearance(tiles)
    assert usual is not None and usual.compare(white) is None
    assert len(statistics(torch.cat([tiles, white]))) == len(tiles)


def test_the_tiles_themselves_are_within_their_range(tiles: Tensor) -> None:
    usual = usual_appearance(tiles)
    assert usual is not None and usual.tiles == 40
    values = statistics(tiles)
    assert np.allclose(usual.low, np.percentile(values, 1, axis=0))
    found = usual.compare(tiles)
    assert found is not None and found.odd == [] and found.warning == ""
    assert found.below == dict.fromkeys(STATISTICS, 1) == found.above  # 1 % of 40, the one beyond it
    assert "Stain, contrast and sharpness of 40 tiles are within the range" in found.words


def test_what_lies_outside_is_told_before_it_is_odd() -> None:
    for count, words in (
        (3, "are within the range"),
        (4, "4 of 30 tiles have a bluer stain than 99 %"),
        (16, "unlike"),
    ):
        check = AppearanceCheck(30, dict.fromkeys(STATISTICS, 0) | {"yellow": count}, dict.fromkeys(STATISTICS, 1))
        assert words in check.words
        assert ("within the range" in check.words) == (count == 3)
        assert bool(check.warning) == (count == 16)


def blurred(images: Tensor) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy().astype(np.float32), (0, 0, 1.5, 1.5)).astype(np.uint8))


def stained(images: Tensor, haematoxylin: float, eosin: float) -> Tensor:
    shifts = torch.tensor([[haematoxylin, eosin]]).expand(len(images), 2)
    return restain(images, torch.tensor(RUIFROK), torch.ones(len(images), 2), shifts)


def dyed(images: Tensor) -> Tensor:
    """Red alone is taken away, as neither stain does."""
    return (images * torch.tensor([0.3, 1, 1]).view(3, 1, 1)).to(torch.uint8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (blurred, "less sharpness"),
        (lambda images: stained(images, 0.8, 0), "more haematoxylin"),
        (lambda images: stained(images, -0.5, 0), "less haematoxylin"),
        (lambda images: stained(images, 0, 0.8), "more eosin"),
        (lambda images: stained(images, 0, -0.4), "less eosin"),
        (dyed, "a bluer stain"),
        (lambda images: (images * torch.tensor([1, 1, 0.4]).view(3, 1, 1)).to(torch.uint8), "a yellower stain"),
    ],
)
def test_what_is_odd_is_named(tiles: Tensor, changed, words: str) -> None:
    usual = usual_appearance(tiles[:20])
    assert usual is not None
    found = usual.compare(changed(tiles[20:]))
    assert found is not None and any(one.endswith(words) for one in found.odd)
    assert found.warning.startswith("Looks unlike the tiles that the network was validated on: ")
    assert words in found.warning and found.words == found.warning
    same = usual.compare(tiles[20:])
    assert same is not None and same.warning == ""


def test_more_than_half_of_the_tiles_make_a_slide_odd(tiles: Tensor) -> None:
    usual = usual_appearance(tiles)
    assert usual is not None
    for count, odd in ((8, False), (12, True)):
        mixed = torch.cat([blurred(tiles[:count]), tiles[count:20]])
        found = usual.compare(mixed)
        assert found is not None and bool(found.odd) == odd


def test_a_card_keeps_the_range_of_tiles_evenly(tiles: Tensor) -> None:
    dataset = [{"image": tiles[number % 40]} for number in range(2000)]
    card = appearance_card(dataset, 2000)  # type: ignore[arg-type]
    assert card is not None and Appearance(**card).tiles == 512
    assert appearance_card(dataset[:5], 5) is None  # type: ignore[arg-type]


def test_every_output_of_a_slide_that_looks_odd_says_so(tmp_path, fiducial_slide, green_weights) -> None:
    classifier, card, _ = load_classifier(green_weights)
    wide = Appearance((-9.0,) * 5, (9.0,) * 5, 100)
    for name, usual in (("fits", wide), ("odd", replace(wide, low=(-9.0, 5.0, -9.0, -9.0, -9.0)))):
        path = tmp_path / f"{name}.safetensors"
        save_classifier(path, classifier, replace(card, appearance=asdict(usual)))
        slide, request = SlideEntry("small", fiducial_slide), MapRequest(faithful_tiles=0)
        results = map_slides([slide], path, tmp_path / name, request, isolate=False)
        record = read_slide_record(tmp_path / name / "small")
        page = (tmp_path / name / "small" / "report.html").read_text().replace("\u00a0", " ")
        assert record["appearance"]["tiles"] >= 8
        if name == "fits":
            assert results[0].misfit == "" and record["misfits"] == []
            assert "within the range of the validation tiles" in page
        else:
            assert "have less eosin than 99 % of those" in results[0].misfit
            assert record["misfits"] == [results[0].misfit] and results[0].misfit in page
            assert results[0].misfit in (tmp_path / name / "slides.csv").read_text()
            assert "99\u00a0% of those" in (tmp_path / name / "small" / "report.html").read_text()  # no line ends there
