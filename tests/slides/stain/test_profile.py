"""Stain profiles: fitted as tiatoolbox fits, kept as JSON, refused where there is nothing to fit."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from medsd.errors import ConfigError, NoTissueError
from medsd.slides.slide import open_slide
from medsd.slides.stain import (
    METHODS,
    LabColours,
    Method,
    StainProfile,
    TwoStains,
    fit_picture,
    profile_from_dict,
    profile_from_file,
    transform_between,
)

TWO = TwoStains("macenko", (0.70, 0.62, 0.35), (0.12, 0.87, 0.47), (2.9, 1.8))
LAB = LabColours((56.0, 24.8, -10.4), (23.7, 14.3, 8.8))
TISSUE = [
    "tissue-level2-1784-6289-5880-10386.png",
    "tissue-level2-4640-4649-8736-8746.png",
    "high-nuclei-score-level2.png",
    "low-nuclei-score-level0.png",
]
NO_TISSUE = ["almost-white-1.png", "no-tissue.png", "no-tissue-line.png", "no-tissue-green-pen.png"]


def he_tile(shared_data: Path, name: str) -> np.ndarray:
    return np.array(Image.open(shared_data / "he_tiles" / name).convert("RGB"))


@pytest.fixture(scope="module")
def skin(shared_data: Path) -> np.ndarray:
    """Real H&E of another laboratory than the tiles: the target."""
    with open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        return slide.read(900, 1500, 512, 512)


def is_stained(picture: np.ndarray) -> np.ndarray:
    """Where the transforms change pixels in full; paler ones are ours alone (see `stain_transform`)."""
    values = picture.astype(int)
    return 255 + values.max(axis=-1) - 2 * values.min(axis=-1) >= 60


finite = st.floats(-50, 50, allow_subnormal=False)
triples = st.tuples(finite, finite, finite)


@given(
    method=st.sampled_from(["macenko", "vahadane"]),
    h=triples,
    e=triples,
    strongest=st.tuples(*[st.floats(0.01, 9)] * 2),
)
def test_two_stains_survive_json(method: Method, h: tuple, e: tuple, strongest: tuple) -> None:
    lengths = np.linalg.norm(h) * np.linalg.norm(e)
    assume(lengths > 1e-3 and abs(np.dot(h, e)) / lengths < 0.99)
    profile = TwoStains(method, h, e, strongest)
    again = profile_from_dict(json.loads(json.dumps(asdict(profile))))
    assert again == profile and hash(again) == hash(profile)


@given(mean=triples, std=st.tuples(*[st.floats(0.2, 60)] * 3))
def test_lab_colours_survive_json(mean: tuple, std: tuple) -> None:
    profile = LabColours(mean, std)
    again = profile_from_dict(json.loads(json.dumps(asdict(profile))))
    assert again == profile and hash(again) == hash(profile)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "macenco"}, "did you mean 'macenko'"),
        ({"method": None}, "use one of macenko"),
        ({"method": "reinhard"}, "unknown"),
        ({"haematoxylin": [0.7, 0.6]}, "haematoxylin"),
        ({"eosin": "pink"}, "eosin"),
        ({"eosin": None}, "eosin"),
        ({"strongest": [float("nan"), 1.0]}, "strongest"),
        ({"strongest": [0.0, 1.0]}, "told apart"),
        ({"eosin": [0.70, 0.62, 0.35]}, "told apart"),
        ({"eosin": [0.0, 0.0, 0.0]}, "told apart"),
        ({"hematoxylin": [0.7, 0.6, 0.3]}, "did you mean 'haematoxylin'"),
    ],
)
def test_a_bad_target_is_named(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        profile_from_dict({**asdict(TWO), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000, "{}", '{"stain_target": {"method": "reinhard", "x": 1}}'])
def test_a_file_that_holds_no_target_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "stain.json").write_text(text)
    with pytest.raises(ConfigError, match=r"stain\.json: no stain target"):
        profile_from_file(tmp_path / "stain.json")


def test_missing_key_one_colour_and_two_methods_are_named() -> None:
    values = asdict(LAB)
    del values["std"]
    with pytest.raises(ConfigError, match="'std' missing"):
        profile_from_dict(values)
    with pytest.raises(ConfigError, match="one colour"):
        replace(LAB, std=(9.0, 0.0, 9.0))
    with pytest.raises(ConfigError, match="'macenko', the target by 'reinhard'"):
        transform_between(TWO, LAB)
    with pytest.raises(ConfigError, match="'macenko', the target by 'vahadane'"):
        transform_between(TWO, replace(TWO, method="vahadane"))
    with pytest.raises(ConfigError, match="stain method='ruifrok': use one of macenko"):
        fit_picture(np.zeros((9, 9, 3), np.uint8), "ruifrok")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_fitted_to_what_has_no_stain(method: Method) -> None:
    generator = np.random.default_rng(0)
    pictures = {
        "white": np.full((64, 64, 3), 255),
        "black": np.zeros((64, 64, 3)),
        "one colour": np.full((64, 64, 3), (200, 120, 180)),
        "noisy glass": 240 + generator.integers(-4, 5, (64, 64, 3)),
        "one pixel": np.full((1, 1, 3), (150, 60, 130)),
        "no pixel": np.zeros((0, 4, 3)),
    }
    for name, picture in pictures.items():
        # Told before LAPACK complains of it on the terminal.
        words = "one colour only" if name == "one colour" else "pixels are stained"
        with pytest.raises(NoTissueError, match=f"'{method}' .*{words}"):
            fit_picture(picture.astype(np.uint8), method)


@pytest.mark.parametrize("name", NO_TISSUE)
def test_real_glass_and_ink_are_refused(shared_data: Path, name: str) -> None:
    for method in METHODS:
        with pytest.raises(NoTissueError, match="stained"):
            fit_picture(he_tile(shared_data, name), method)


def test_one_stain_is_refused_where_two_are_wanted() -> None:
    strength = np.random.default_rng(0).uniform(0.3, 2, (4096, 1))
    picture = np.rint(255 * np.exp(-strength * [[0.3, 0.9, 0.3]])).astype(np.uint8).reshape(64, 64, 3)
    with pytest.raises(NoTissueError, match="told apart"):
        fit_picture(picture, "macenko")


@pytest.mark.parametrize("method", METHODS)
def test_transform_is_tiatoolboxs(shared_data: Path, skin: np.ndarray, method: Method) -> None:
    from tiatoolbox.tools.stainnorm import get_normalizer

    reference = get_normalizer(method)
    reference.fit(skin.copy())
    target = fit_picture(skin, method)
    for name in TISSUE:
        picture = he_tile(shared_data, name)
        expected = reference.transform(picture.copy()).astype(int)
        mine = transform_between(fit_picture(picture, method), target)(picture)
        difference = np.abs(mine - expected)[is_stained(picture)]
        if method == "reinhard":
            # tiatoolbox truncates L*a*b* to 8 bits on the way, and a narrow spread is widened by then.
            assert difference.mean() < 1.2
            assert np.percentile(difference, 99) < 8
        else:
            assert difference.max() <= 1


def test_fitting_leaves_picture_and_logging_as_they_are(skin: np.ndarray) -> None:
    picture = np.maximum(skin, 1)
    picture[:20] = 0  # tiatoolbox writes ones here
    before = picture.copy()
    root = logging.getLogger()
    state = root.handlers[:], root.level, root.filters[:], warnings.showwarning
    first = fit_picture(picture, "macenko")
    assert np.array_equal(picture, before)
    assert (root.handlers[:], root.level, root.filters[:], warnings.showwarning) == state
    assert fit_picture(picture, "macenko") == first


def synthetic(gains: tuple[float, float], seed: int = 0) -> np.ndarray:
    """Nuclei (haematoxylin), stroma (eosin) and mixtures under known vectors."""
    generator = np.random.default_rng(seed)
    share = generator.choice([0.0, 0.0, 1.0, 1.0, 0.5], 128 * 128)
    strength = generator.uniform(0.3, 1.5, 128 * 128)
    concentrations = strength[:, None] * np.stack([share, 1 - share], 1) * gains
    light = 255 * np.exp(-concentrations @ [[0.65, 0.70, 0.29], [0.20, 0.95, 0.24]])
    return np.rint(light).astype(np.uint8).reshape(128, 128, 3)


@pytest.mark.parametrize("gains", [(0.6, 0.7), (1.3, 0.8), (0.8, 1.4)])
def test_a_weaker_or_stronger_slide_is_normalised_back(gains: tuple[float, float]) -> None:
    reference, other = synthetic((1, 1)), synthetic(gains)
    fits: list[StainProfile] = [fit_picture(picture, "macenko") for picture in (other, reference)]
    source, target = fits
    assert isinstance(source, TwoStains) and isinstance(target, TwoStains)
    assert np.allclose(
        target.haematoxylin, np.array([0.65, 0.70, 0.29]) / np.linalg.norm([0.65, 0.70, 0.29]), atol=0.02
    )
    assert np.allclose(np.divide(source.strongest, target.strongest), gains, rtol=0.03)
    back = transform_between(source, target)(other).astype(int)
    both = is_stained(other)
    assert np.abs(back - reference)[both].max() <= 5
    assert np.abs(other.astype(int) - reference)[both].max() > 20
