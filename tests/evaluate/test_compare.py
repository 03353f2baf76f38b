"""Runs side by side: what the tables say of complete, partial, foreign and damaged runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from medsd.errors import DatasetError
from medsd.evaluate import compare, plots
from medsd.evaluate.compare import METRICS, compare_runs
from medsd.evaluate.runs import number_text, read_runs
from medsd.evaluate.scores import Interval

MAP_MEASURES = ("gap", "masking_area", "deletion", "insertion", "magnitude", "total_variation", "gini", "entropy")


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "level": 0.95, "resamples": 2000}


def scores(auc: float = 0.8) -> dict[str, Any]:
    """As a run with explanations, calibration and mapped slides leaves them."""
    curve = [interval(0.9 - share / 20) for share in range(10)]
    maps = {name: interval(0.3) for name in MAP_MEASURES} | {"pointing": interval(0.6), "accuracy": curve}
    pointing = {
        "one": {"positive_inside": 0.5, "area_share": 0.2, "ratio": 2.5},
        "two": {"positive_inside": 0.7, "area_share": 0.4, "ratio": 1.75},
        "none": {"positive_inside": None, "area_share": 0.0, "ratio": None},
        "of another class": {"positive_inside": 0.0, "area_share": 0.0, "ratio": None},
    }
    return {
        "data_sha256": "abc",
        "target": "tumour",
        "tiles": {"patch_auc": interval(auc), "patch_auc_by_group": interval(auc) | {"low": 0.55}, "items": 40},
        "calibration": {"ece": 0.03, "ece_before": 0.09, "brier": 0.1, "temperature": 1.5, "threshold": 0.4},
        "explanations": {
            "settings": {"items": 12, "draws": 2, "fill": "mean", "steps": 4, "batch_size": 8, "seed": 0, "target": 1},
            "shares": [share / 10 for share in range(10)],
            "area_share": interval(0.25),
            "random": {"masking_area": interval(0.85), "accuracy": curve},
            "maps": {"gradient": maps},
            "features": {
                "mean_abs_correlation": 0.21,
                "correlation_by_chance": 0.08,
                "effective_rank": 12.34,
                "dead_channels": 3,
            },
        },
        "slides": {"pointing": pointing, "mean_pointing_ratio": 2.125},
    }


def write_run(
    folder: Path, content: dict[str, Any], settings: dict[str, Any] | None = None, seconds: tuple[float, ...] = ()
) -> Path:
    (folder / "training").mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(content))
    if settings is not None:
        (folder / "training" / "settings.json").write_text(json.dumps(settings))
    if seconds:
        rows = "".join(f"{epoch},{value}\n" for epoch, value in enumerate(seconds, start=1))
        (folder / "training" / "pace.csv").write_text(f"epoch,seconds_per_step\n{rows}")
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Path:
    settings = {"encoder": "resnet18", "seed": 0, "decorrelation": 0.1, "weights": {"head": 1}}
    return write_run(tmp_path / "full", scores(), settings, (9.0, 0.25, 0.35))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An AUC and nothing else."""
    content = {"data_sha256": "abc", "tiles": {"patch_auc_by_group": interval(0.7), "items": 40}}
    return write_run(tmp_path / "bare", content, {"encoder": "resnet18", "seed": 0, "decorrelation": 0.0})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def table_of(path: Path) -> dict[str, list[str]]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").replace(r"\|", "!").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables only; the figure takes seconds."""
    monkeypatch.setattr(compare, "draw_comparison", lambda _path, _runs: None)


@pytest.mark.usefixtures("undrawn")
def test_every_number_of_a_run_reaches_the_tables(full, tmp_path):
    compare_runs([full], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "compare.csv")
    assert (float(row["auc"]), float(row["auc_low"]), float(row["auc_high"])) == pytest.approx((0.8, 0.55, 0.85))
    expected = {"ece": 0.03, "ece_before": 0.09, "brier": 0.1, "gap": 0.3, "random_area": 0.85, "pointing": 0.6}
    expected |= {"area_share": 0.25, "correlation": 0.21, "effective_rank": 12.34, "dead_channels": 3}
    expected |= {"slide_pointing": 0.6, "slide_area_share": 0.3, "slide_pointing_ratio": 2.125}
    expected |= {"seconds_per_step": 0.35}  # the median: the first epoch warms up
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
    assert 0.5 <= float(row["slide_pointing_low"]) <= 0.6 <= float(row["slide_pointing_high"]) <= 0.7
    table = table_of(tmp_path / "out" / "compare.md")
    assert table["patch AUC, interval over slides or groups"] == ["higher", "0.800 (0.550 to 0.850)"]
    assert table["the same, over tiles (too narrow)"] == ["higher", "0.800 (0.750 to 0.850)"]
    assert table["calibration error (ECE)"] == ["lower", "0.030"]
    assert table["dead channels"] == ["lower", "3"]
    assert table["mean !correlation! of features"] == ["lower", "0.210"]
    assert row["label"] == "full"  # one run differs from nothing


@pytest.mark.usefixtures("undrawn")
def test_what_a_run_lacks_is_a_dash_and_never_a_zero(full, bare, tmp_path):
    runs = compare_runs([full, bare], tmp_path / "out")
    lacking = rows_of(tmp_path / "out" / "compare.csv")[1]
    assert lacking.pop("auc") == "0.7"
    assert {value for key, value in lacking.items() if not key.startswith(("auc_", "run", "label"))} == {""}
    table = table_of(tmp_path / "out" / "compare.md")
    assert all(cells[2] == "–" for title, cells in table.items() if title in {m.title for m in METRICS[1:]})
    assert len(table) > 15 and "mask: deletion" not in table  # no run has masks
    assert runs[1].estimate("explanations.maps.gradient.gap") is None
    assert runs[0].estimate("tiles.patch_auc") == Interval(0.8, pytest.approx(0.75), pytest.approx(0.85))


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_tested_on_what_it_learnt_from_is_told(full, tmp_path):
    leaky = write_run(tmp_path / "leaky", scores(0.99) | {"learnt_before": ["patient p07"]})
    compare_runs([full, leaky], tmp_path / "out")
    (line,) = [line for line in (tmp_path / "out" / "compare.md").read_text("utf-8").splitlines() if "Beware" in line]
    assert line.startswith("**Beware, leaky**") and "patient p07" in line
    assert [row["learnt_before"] for row in rows_of(tmp_path / "out" / "compare.csv")] == ["", "1"]


@pytest.mark.usefixtures("undrawn")
def test_labels_are_the_settings_that_differ(full, bare, tmp_path):
    first, second = read_runs([full, bare])
    assert first.label == "decorrelation=0.1, weights.head=1" and second.label == "decorrelation=0.0"
    compare_runs([full, bare], tmp_path / "out")
    table = table_of(tmp_path / "out" / "compare.md")
    assert table["decorrelation"] == ["0.1", "0.0"] and table["weights.head"] == ["1", "–"] and "seed" not in table


def test_labels_that_say_too_little_or_too_much_are_folder_names(full, tmp_path):
    same = write_run(tmp_path / "again", scores(), json.loads((full / "training" / "settings.json").read_text()))
    assert [run.label for run in read_runs([full, same])] == ["full", "again"]
    wordy = write_run(tmp_path / "wordy", scores(), {f"a_long_setting_{number}": number for number in range(9)})
    assert [run.label for run in read_runs([full, wordy])] == ["full", "wordy"]
    unknown = write_run(tmp_path / "unknown", scores())
    assert [run.label for run in read_runs([full, unknown])] == ["full", "unknown"]
    twin = write_run(tmp_path / "other" / "full", scores())
    assert [run.label for run in read_runs([full, twin])] == [str(full), str(twin)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(data_sha256="xyz"), "another split of the data"),
        (lambda c: c["tiles"].update(items=41), "another number of test tiles"),
        (lambda c: c.update(target="polyp"), "scores of polyp, those of .* of tumour; compare runs of one target"),
        (lambda c: c.pop("data_sha256"), "no data_sha256; run its stage 'evaluate' again"),
        (lambda c: c["tiles"].pop("items"), "no tiles.items"),
        (lambda c: c["explanations"]["settings"].update(steps=9), "steps=9"),
    ],
)
def test_runs_on_other_test_sets_are_refused(full, tmp_path, change, words):
    content = scores()
    change(content)
    other = write_run(tmp_path / "other", content)
    with pytest.raises(DatasetError, match=words) as caught:
        compare_runs([full, other], tmp_path / "out")
    assert str(other) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_before_the_class_was_told_is_no_obstacle(full, tmp_path):
    content = scores()
    del content["target"]
    assert len(read_runs([full, write_run(tmp_path / "other", content)])) == 2


def test_another_seed_of_the_explanations_is_no_obstacle(full, tmp_path):
    content = scores()
    content["explanations"]["settings"].update(seed=7, batch_size=64)
    assert len(read_runs([full, write_run(tmp_path / "other", content)])) == 2


def test_what_is_no_run_is_one_line(full, tmp_path):
    broken = write_run(tmp_path / "broken", scores())
    (broken / "scores.json").write_text("{")
    listed = write_run(tmp_path / "listed", [])  # type: ignore[arg-type]
    pace = write_run(tmp_path / "pace", scores(), seconds=(0.1,))
    (pace / "training" / "pace.csv").write_text("epoch,seconds_per_step\n1,fast\n")
    binary = write_run(tmp_path / "binary", scores())
    (binary / "training" / "settings.json").write_bytes(b"\xff\xfe")
    for folder in (tmp_path / "nowhere", tmp_path, full / "training", broken, listed, pace, binary):
        with pytest.raises(DatasetError) as caught:
            read_runs([full, folder])
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="no runs"):
        read_runs([])


def test_odd_values_are_dashes(tmp_path):
    content = scores()
    content["tiles"]["patch_auc"] = {"value": None, "low": None, "high": None}
    content["calibration"] = [1, 2]
    content["explanations"]["features"]["effective_rank"] = "many"
    content["explanations"]["features"]["dead_channels"] = True
    content["slides"] = None
    (run,) = read_runs([write_run(tmp_path / "odd", content)])
    for path in ("tiles.patch_auc", "calibration.ece", "slide_pointing.saliency.positive_inside", "nothing.at.all"):
        assert run.estimate(path) is None
    assert run.estimate("explanations.features.effective_rank") is None
    assert run.estimate("explanations.features.dead_channels") is None


@pytest.mark.parametrize("count", [1, 6])
def test_the_figure_is_drawn_for_few_and_many(full, bare, tmp_path, count):
    compare_runs([full, bare] + [full] * (count - 2) if count > 1 else [full], tmp_path / "out")
    picture = imread(tmp_path / "out" / "compare.png")
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05


def test_bars_stand_at_their_values_with_their_intervals(full, bare):
    runs = read_runs([full, bare])
    figure = plots.Figure()
    axes = figure.subplots()
    plots._draw_bars(axes, runs, "tiles.patch_auc_by_group", None)
    assert [bar.get_width() for bar in axes.patches] == [0.8, 0.7]
    ends = [line.get_xdata() for line in axes.lines[:2]]
    np.testing.assert_allclose(ends, [[0.55, 0.85], [0.65, 0.75]])
    figure = plots.Figure()
    axes = figure.subplots()
    plots._draw_bars(axes, runs, "calibration.ece", None)
    assert len(axes.patches) == 1 and "not measured" in axes.texts[1].get_text()


def test_numbers_keep_about_three_digits():
    assert [number_text(value) for value in (0.0, 0.8, -0.25, 12.345, 1234.5, 0.00123)] == [
        "0.000", "0.800", "-0.250", "12.3", "1234", "0.0012",
    ]  # fmt: skip
    assert number_text(0.0003, beside=0.02) == "0.000" and number_text(3) == "3"
