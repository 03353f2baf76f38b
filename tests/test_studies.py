"""Tables of the studies: intervals over deals of the same groups, and what cells are of."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats

SCRIPTS = Path(__file__).parents[1] / "scripts"
STUDIES = (
    "redealt", "pretrain_data", "pretrain_tables", "objectives_data", "objectives_tables", "finetune_tables",
    "segment_tables", "appearance",
)  # fmt: skip


@pytest.fixture(scope="module")
def studies() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        found = {name: importlib.import_module(f"studies.{name}") for name in STUDIES}
        return found | {"evidence": importlib.import_module("evidence")}


def test_interval_of_deals_that_share_nothing_is_student_s(studies: dict[str, ModuleType]) -> None:
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert studies["redealt"].half_width(values, 0.0) == pytest.approx((high - low) / 2)


def test_interval_by_hand(studies: dict[str, ModuleType]) -> None:
    # Mean 2, variance 1, three deals that test on half as many as they train on: 4.3027 sqrt(1/3 + 1/2).
    assert studies["redealt"].half_width(np.array([1.0, 2, 3]), 0.5) == pytest.approx(4.302653 * (5 / 6) ** 0.5)
    assert studies["redealt"].difference_of(np.array([1.0, 2, 3, np.nan]), 1, 0.5) == "+2.0 (-1.9 to +5.9)"


@pytest.mark.parametrize(("values", "text"), [([], ""), ([np.nan], ""), ([0.5], "+0.5"), ([0.5, 0.5], "+0.5")])
def test_difference_without_spread(studies: dict[str, ModuleType], values: list[float], text: str) -> None:
    assert studies["redealt"].difference_of(np.array(values), 1, 0.5) == text


def test_corrected_interval_holds_the_truth_where_deals_share_groups(studies: dict[str, ModuleType]) -> None:
    """Six deals of 24 groups, ten of them tested on; groups differ at random, and 0 is the mean of all there could be.

    Trainings differ beside, by nothing and by twice what deals differ by for their groups.
    """
    random, tested, groups, deals, trials = np.random.default_rng(0), 10, 24, 6, 700
    sides = np.stack([random.permuted(np.arange(groups) < tested) for _ in range(deals)]) / tested
    held = {}
    for noise in (0.0, 2.0):
        results = random.normal(size=(trials, groups)) @ sides.T
        results += noise / np.sqrt(tested) * random.normal(size=(trials, deals))
        for name, ratio in (("student", 0.0), ("corrected", tested / (groups - tested))):
            halves = np.array([studies["redealt"].half_width(found, ratio) for found in results])
            held[name, noise] = float((abs(results.mean(axis=1)) <= halves).mean())
    # Student's misses, however alike trainings are. The corrected one is right, and too wide where they differ most.
    assert held["student", 0.0] == pytest.approx(0.7, abs=0.04)
    assert held["corrected", 0.0] == pytest.approx(0.95, abs=0.02)
    assert held["student", 2.0] == pytest.approx(0.91, abs=0.02)
    assert held["corrected", 2.0] == pytest.approx(0.99, abs=0.01)


def test_ratio_of_three_folds_of_which_a_quarter_calibrates(studies: dict[str, ModuleType]) -> None:
    # Twelve groups of ten: four are tested on, and of the other eight two calibrate.
    groups = np.repeat([f"{number:02d}" for number in range(12)], 10)
    labels = np.tile(np.array([0, 1], np.int8), 60)
    assert studies["objectives_data"].ratio_of_sides(labels, groups, 0, 1) == pytest.approx(40 / 60)


def test_ratios_of_biopsies_count_what_a_measure_is_of(studies: dict[str, ModuleType], tmp_path: Path) -> None:
    # Ten patients of three images, four of them tested on; a probe knows one image of each of the first five alone.
    lines = [
        f"{number},{'normal' if number < 5 and not image else 'polyp'}" for number in range(10) for image in range(3)
    ]
    (tmp_path / "ebhi_seg").mkdir()
    (tmp_path / "ebhi_seg" / "index.csv").write_text("\n".join(["patient,label", *lines]), "utf-8")
    ratios = studies["pretrain_data"].ratios_of("ebhi", tmp_path, 0)
    assert ratios["masks"] == pytest.approx(12 / 18)
    tested = 5 * ratios["testing"] / (1 + ratios["testing"])
    assert tested == pytest.approx(round(tested))


@pytest.mark.parametrize("deals", [True, False])
def test_results_have_the_ratio_of_studies_that_deal(
    studies: dict[str, ModuleType], tmp_path: Path, deals: bool
) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "job.json").write_text('{"recipe": {}, "scores": {"auc": 1.0}}', "utf-8")
    study = SimpleNamespace(**({"dealt": lambda _: {"testing": 0.5}} if deals else {}))
    found = studies["evidence"].scores_of(study, SimpleNamespace(part="part", name="job"), tmp_path)
    assert found == {"auc": 1.0, **({studies["redealt"].RATIOS: {"testing": 0.5}} if deals else {})}


def _rows(text: str) -> dict[str, dict[str, str]]:
    """Cells of the tables of a text by row and column; rows of one name by the last table."""
    found, head = {}, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif line.startswith("|---"):
            continue
        else:
            found[cells[0].strip("* ")] = dict(zip(head, cells, strict=True))
    return found


def test_pretrain_tables_take_the_ratio_of_what_a_measure_is_of(studies: dict[str, ModuleType]) -> None:
    ratios = {"testing": 0.5, "masks": 2.0, "validation": 0.0}
    results = {
        ("pcam-resnet10t", variant, seed): {
            "rank": 10.0, **dict.fromkeys(("probe", "dice", "validation_probe"), base + gain),
            "singular": [1.0], studies["redealt"].RATIOS: ratios,
        }
        for variant, base in (("moco", 0.0), ("local", 0.1))
        for seed, gain in enumerate((0.0, 0.3, 0.3) if variant == "moco" else (0.0, 0.2, 0.4))
    }  # fmt: skip
    row = _rows(studies["pretrain_tables"].tables(results))["+ local"]
    differences = np.array([0.1, 0.0, 0.2])
    halves = [studies["redealt"].half_width(differences, ratio) for ratio in (0.5, 2.0, 0.0)]
    for title, half in zip(("probe AUC", "decoder Dice", "probe AUC, validation"), halves, strict=True):
        assert row[title] == f"+0.100 ({0.1 - half:+.3f} to {0.1 + half:+.3f})"
    assert row["times its rank"] == "1.00"


def test_objectives_cells_say_of_how_many_trainings_they_are(studies: dict[str, ModuleType]) -> None:
    results: dict[tuple[str, str, str, int, int], dict[str, Any]] = {
        ("pcam", "lite0", method, 0, fold): {
            "auc": 0.9 + fold / 100 + gain * (1 + fold) / 100,
            **({"auc_held": 0.8 + fold / 10} if fold < 2 else {}),
            studies["redealt"].RATIOS: {"testing": 0.5},
        }
        for method, gain in (("ce", 0), ("sgt", 1))
        for fold in range(3)
    }
    rows = _rows(studies["objectives_tables"].tables(results))
    assert rows["cross-entropy (CE)"]["AUC, held-out side"] == "0.850 ± 0.050 (2)"
    assert rows["SGT"]["AUC"] == "0.930 ± 0.012"
    assert rows["SGT less CE"]["AUC"] == "+0.020 (-0.019 to +0.059)"
    assert rows["SGT less CE"]["AUC, held-out side"] == "+0.000 (2)"
    assert rows["SGT less CE"]["ECE, tempered"] == "-"


def test_finetune_table_is_over_deals(studies: dict[str, ModuleType]) -> None:
    results = {
        ("ebhi", method, seed): {"testing_accuracy": gain * seed / 100, studies["redealt"].RATIOS: {"testing": 0.5}}
        for method, gain in (("ce", 1), ("twin", 2))
        for seed in (1, 2, 3)
    }
    row = _rows(studies["finetune_tables"].tables(results))["AIM's twin without masks"]
    assert row["accuracy %"] == "+2.0 (-1.9 to +5.9)"


class Setting(NamedTuple):
    """What tables ask of a setting of the study of segmentation."""

    start: str
    kind: str = "full"
    fraction: float = 1.0


@pytest.mark.parametrize(
    ("part", "starts", "ratio", "shown"),
    [
        ("nuinsseg", ("moco", "med-moco"), 0.5, "+0.200 (-0.193 to +0.593)"),
        # Slides are drawn anew for each seed: Student's t.
        ("weak", ("masks", "weak then masks"), 0.0, "+0.200 (-0.048 to +0.448)"),
    ],
)
def test_segmentation_table_is_over_what_was_dealt(
    studies: dict[str, ModuleType], part: str, starts: tuple[str, str], ratio: float, shown: str
) -> None:
    results = {
        (part, Setting(start), seed): {"dice": gain * (1 + seed) / 10, studies["redealt"].RATIOS: {"testing": ratio}}
        for start, gain in zip(starts, (1, 2), strict=True)
        for seed in range(3)
    }
    assert shown in studies["segment_tables"].tables(results)


def test_warnings_count_clusters_of_each_deal_and_tell_the_different_ones(studies: dict[str, ModuleType]) -> None:
    aucs = {"as it is": (0.8, 0.9, 0.7), "blurred, 1 px": (0.7, 0.9, 0.5)}
    results = {
        ("pcam", deal): {
            name: {
                "auc": aucs.get(name, (0.8, 0.9, 0.7))[deal],
                "clusters": {cluster: {"odd": ["blur"], "auc": None} for cluster in (str(deal), "9")},
            }
            for name in studies["appearance"].CHANGES
        }
        | {studies["redealt"].RATIOS: {"testing": 0.5}}
        for deal in range(3)
    }
    text = studies["appearance"].tables(results)
    assert "6 clusters in 3 deals, 4 different." in text
    row = _rows(text)["blurred, 1 px"]
    assert row["warned of"] == "6 of 6"
    assert row["change"] == "-0.100 (-0.493 to +0.293)"
