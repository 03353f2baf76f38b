"""`medsd spectrum`: pre-training runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from medsd.errors import DatasetError
from medsd.evaluate.spectra import _draw_panel, compare_spectra
from medsd.tables import read_table, write_table


def pretrained(folder: Path, values: list[float], rank: float | None = 2.5) -> Path:
    """What the stage leaves, as far as it is read."""
    kept = folder / "pretraining"
    kept.mkdir(parents=True)
    rows = [{"features": value, "embeddings": value if number < 2 else None} for number, value in enumerate(values)]
    write_table(kept / "spectrum.csv", rows)
    row = dict.fromkeys(
        ("participation_ratio", "mean_abs_correlation", "embedding_rank", "alignment", "uniformity"), 0.5
    )
    write_table(kept / "history.csv", [{"epoch": epoch, "effective_rank": rank, **row} for epoch in (1, 2)])
    settings = {"network": {"decorrelation": "w2", "local": 0.5}}
    (kept / "settings.json").write_text(json.dumps(settings), "utf-8")
    return folder


def test_runs_side_by_side(tmp_path):
    folders = [pretrained(tmp_path / "moco", [1.0, 0.1, 1e-12]), pretrained(tmp_path / "med", [0.0, 0.0], None)]
    history = folders[0] / "pretraining" / "history.csv"
    write_table(history, [{**row, "held_out_images": 40} for row in read_table(history).to_dict("records")])
    first, second = compare_spectra(folders, tmp_path / "out")
    assert first.label == "moco: decorrelation w2, local 0.5" and first.epoch == 2
    assert first.singular_values["features"].tolist() == [1.0, 0.1, 1e-12]
    assert first.singular_values["embeddings"].tolist() == [1.0, 0.1]
    assert second.measures["effective_rank"] != second.measures["effective_rank"]  # nothing varies: nan
    table = read_table(tmp_path / "out" / "spectrum.csv")
    assert table["effective_rank"].tolist() == ["2.5", ""]
    text = (tmp_path / "out" / "spectrum.md").read_text("utf-8")
    assert "| dimensions of embeddings | 2 | 2 |" in text and "| effective rank of features | 2.500 |" in text
    figure = Figure()
    _draw_panel(figure.subplots(), [first, second], "features", "effective_rank")
    assert [text.get_text().rpartition("(")[2] for text in figure.axes[0].get_legend().get_texts()] == [
        "rank 2.500 of at most 3)",
        "nothing varies: no curve)",
    ]
    assert "| held-out images | 40 | nan |" in text  # one of before it was kept
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 10_000


@pytest.mark.parametrize("file", ["spectrum.csv", "history.csv", "settings.json"])
def test_what_a_run_lacks_is_named(tmp_path, file):
    folder = pretrained(tmp_path / "run", [1.0, 0.5])
    (folder / "pretraining" / file).write_text("{", "utf-8")
    with pytest.raises(DatasetError, match="run"):
        compare_spectra([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_what_is_no_singular_value_is_damage_and_no_collapse(tmp_path, value):
    folder = pretrained(tmp_path / "run", [1.0, value])
    path = folder / "pretraining" / "spectrum.csv"
    path.write_text(f"features,embeddings\n1.0,1.0\n{value},0.5\n", "utf-8")
    with pytest.raises(DatasetError, match="features are no singular values"):
        compare_spectra([folder], tmp_path / "out")


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(DatasetError, match="stage pretrain"):
        compare_spectra([tmp_path], tmp_path / "out")
    folder = pretrained(tmp_path / "run", [1.0, 0.5])
    with pytest.raises(DatasetError, match="twice"):
        compare_spectra([folder, folder / ".." / "run"], tmp_path / "out")
