"""Tables of the long studies say what is compared with what."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"
OVERLAPPING = ["tumor_001_0_0", "tumor_001_300_0", "tumor_001_200_100", "tumor_002_0_0", "tumor_002_0_256"]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(f"studies.{name}")


def test_maps_are_compared_with_the_probability_of_their_own_smoothness(study: Any) -> None:
    areas = {
        "probability": [0.7, 0.6, 0.7, 0.6, 0.7],
        "probability/after": [0.8, 0.8, 0.8, 0.8, 0.8],
        "layer3/deeplift/none": [0.6, 0.5, 0.6, 0.5, 0.6],
        "layer3/deeplift/after": [0.75, 0.75, 0.75, 0.75, 0.75],
        "layer3/gradcam/after": [0.77, 0.77, 0.77, 0.77, 0.77],
    }
    results = {}
    for field in range(5):
        found = _found({key: values[field] for key, values in areas.items()})
        results["breast", "resnet18d", str(field)] = found
    rows = _rows(study("maps_tables").tables(results))
    assert [row["less the probability's"] for row in rows] == ["", "", "-0.100", "-0.050", "-0.030"]
    assert [row["less the plain probability's"][:6] for row in rows] == ["", "+0.140", "", "+0.090", "+0.110"]
    assert [row["the additive map's less this"] for row in rows] == ["", "", "", "", "-0.020"]
    assert [row["um a pixel"] for row in rows] == ["", "", "16", "16", "16"]
    assert [row["map"].endswith("then a Gaussian") for row in rows] == [False, True, False, True, True]


def test_methods_asked_for_are_mapped_at_the_default_layer_and_files_of_their_own(study: Any) -> None:
    maps = study("maps")
    whole, some = (
        maps.Job("camelyon", "lite0", "10072", "", "", "", methods) for methods in ((), ("deeplift", "gradcam"))
    )
    assert whole.layers == ("blocks.3", "blocks.4", "blocks.5") and some.layers == ("blocks.4",)
    assert whole.runs == maps.RUNS and some.runs == (("none", ("deeplift",)), ("none", ("gradcam",)))
    assert (whole.name, some.name) == ("lite0-10072", "lite0-deeplift-gradcam-10072")


def test_patches_that_overlap_are_one_place(study: Any) -> None:
    # The third lies over both of the first two, which do not meet; another slide is another place.
    assert study("fields").camelyon16_places(OVERLAPPING).tolist() == [0, 0, 0, 1, 2]
    values = [0.9, 0.9, 0.9, 0.5, 0.5]
    groups = {}
    for part in ("camelyon16", "breast"):
        results = {
            (part, "resnet18d", name): _found({"probability": value})
            for name, value in zip(OVERLAPPING, values, strict=True)
        }
        text = study("maps_tables").tables(results)
        assert ("of 3 places" in text) == (part == "camelyon16")
        groups[part] = _rows(text)[0]["pixel AUC"]
    assert groups["camelyon16"] == "0.740 (0.500 to 0.900)" and groups["breast"] == "0.740 (0.580 to 0.900)"


def test_places_of_fields_that_results_do_not_name(study: Any, shared_data: Path) -> None:
    fields, tables = study("fields"), study("objectives_tables")
    of_folder = list(fields.camelyon16_patches(shared_data))
    for scale in (1, 2):
        shares = [
            (np.asarray(Image.fromarray(field.tumour).convert("L").reduce(4 // scale)) > 127).mean()
            for field in of_folder
        ]
        kept = [field.name for field, share in zip(of_folder, shares, strict=True) if 0.01 < share < 0.99]
        assert tables.OTHER_PLACES[len(kept)] == tuple(fields.camelyon16_places(kept))


def test_gains_in_fields_of_one_place_are_not_independent(study: Any) -> None:
    tables = study("objectives_tables")
    gains = np.array([0.1, 0.1, 0.1, 0.0, 0.0, 0.05, 0.02, 0.03, 0.04, 0.01, 0.06])
    of = {
        ("ce", 0, 0): {"pixel_auc_each": [0.5] * 11, "pixel_auc_other_each": [0.5] * 11},
        ("sgt", 0, 0): {"pixel_auc_each": list(0.5 + gains), "pixel_auc_other_each": list(0.5 + gains)},
    }
    each, _, other, _ = tables._by_field(of, "sgt")
    assert "+0.046 (+0.020 to +0.073) over fields" in each
    assert "+0.046 (+0.002 to +0.091) over their 8 places" in other and "above 0 in 9 fields" in other


def _found(areas: dict[str, float]) -> dict[str, Any]:
    maps = {key: {"auc": area, "pointing": 0.5} for key, area in areas.items()}
    return {"chooses": False, "share": 0.5, "map_um": {"layer3": 16.0}, "maps": maps}


def _rows(text: str) -> list[dict[str, str]]:
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]
