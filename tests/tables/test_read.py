"""Reading the runs of a study, and drawing its figures from tables and pictures alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from study_tables import DETR_TAPS, VIT_TAPS, tables, write_study

from backsight.errors import BacksightError
from backsight.plots.scheme import method_scheme
from backsight.studies.figures import modular_minus_direct, quality_of_targets
from backsight.tables.read import (
    COLOUR,
    CROSS_LAYER,
    EFFICIENCY,
    EXACT,
    QUALITY,
    TRADEOFF,
    Study,
    fullest_run,
    notebook_of,
    read_study,
    study_folder,
)
from backsight.tables.values import METRIC_COLUMNS


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_study(write_study(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def quality_rows(study: Study) -> pd.DataFrame:
    return study.rows(QUALITY)


def pictures(count: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    images = random.random((count, 3, 16, 16)).astype(np.float32)
    return images, {tap: random.random((count, 3, 16, 16)).astype(np.float32) for tap in VIT_TAPS}


# ------------------------------------------------------------------------------------------------------------- reading


def test_every_run_is_read_with_its_notebook(study: Study) -> None:
    assert study.runs(QUALITY) == ["quality-scenes-detr", "quality-scenes-vit"]
    for notebook in (CROSS_LAYER, COLOUR, EFFICIENCY, TRADEOFF, EXACT):
        assert len(study.runs(notebook)) == 2, notebook
    rows = study.rows(COLOUR, "hue_error_shown")
    assert set(rows["measure"]) == {"hue_error_shown"}
    assert set(METRIC_COLUMNS) <= set(rows)
    assert "flops" not in rows
    assert set(rows["run"]) == {"colour-scenes-vit", "colour-scenes-detr"}
    assert len(study.overview()) == len(study.tables) == 12


def test_a_study_without_such_runs_has_no_rows(study: Study) -> None:
    rows = study.rows("18_targets")
    assert rows.empty
    assert set(METRIC_COLUMNS) <= set(rows)


def finished(folder: Path, name: str, **record: Any) -> None:
    (folder / name).mkdir()
    table = next(tables(("quality",)))[1]
    table.to_csv(folder / name / "metrics.csv", index=False)
    for file, content in record.items():
        (folder / name / f"{file}.json").write_text(json.dumps(content))


def test_unfinished_and_broken_runs_are_left_out_by_name(tmp_path: Path) -> None:
    finished(tmp_path, "done", started={"notebook": "03_quality"}, run={"notebook": "03_quality"})
    finished(tmp_path, "running", started={"notebook": "03_quality"})
    finished(tmp_path, "figures", started={"notebook": "07_figures"})
    finished(tmp_path, "short")
    (tmp_path / "short" / "metrics.csv").write_text("target,value\nscenes-vit,1\n")
    study = read_study(tmp_path)
    assert list(study.tables) == ["done"]
    assert set(study.left_out) == {"running", "short"}
    assert "did not finish" in study.left_out["running"]
    assert "lacks the columns" in study.left_out["short"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="no finished run"):
        read_study(tmp_path)
    with pytest.raises(BacksightError, match="is not a folder"):
        read_study(tmp_path / "absent")


def test_seeds_are_one_where_a_table_does_not_say(tmp_path: Path) -> None:
    name, table = next(tables(("quality",)))
    (tmp_path / name).mkdir()
    table.drop(columns="seeds").to_csv(tmp_path / name / "metrics.csv", index=False)
    assert set(read_study(tmp_path).rows(QUALITY)["seeds"]) == {1}


@pytest.mark.parametrize(
    ("run", "columns", "record", "expected"),
    [
        ("anything", {}, {"notebook": "03_quality"}, QUALITY),
        ("anything", {"perturbation": ["none"]}, None, COLOUR),
        ("quality-scenes-vit-scenes", {}, None, QUALITY),
        ("train-scenes-vit-linear-seed0", {}, None, "02_train_inverse"),
        ("unheard-of", {}, None, ""),
    ],
)
def test_the_notebook_of_a_run(run: str, columns: dict[str, Any], record: Any, expected: str) -> None:
    assert notebook_of(run, pd.DataFrame(columns), record) == expected


def test_of_several_runs_the_fullest_speaks(quality_rows: pd.DataFrame) -> None:
    small = quality_rows.assign(run="a-smaller-run", seeds=1)
    chosen = fullest_run(pd.concat([small, quality_rows]))
    assert "a-smaller-run" not in set(chosen["run"])
    assert len(chosen) == len(quality_rows)


def test_the_reference_is_the_default() -> None:
    assert study_folder("").parts[-2:] == ("results", "reference")
    assert study_folder("results/default").name == "default"


# ------------------------------------------------------------------------------------------- what several runs show


def test_targets_are_compared_by_one_family_along_their_relative_depth(study: Study) -> None:
    rows = quality_of_targets(study)
    assert set(rows["inverse"]) == {"modular"}
    assert set(rows["target"]) == {"scenes-vit", "scenes-detr"}
    for _, of in rows[rows["measure"] == "psnr"].groupby("target"):
        assert list(of["place"]) == sorted(of["place"])
        assert (of["place"].min(), of["place"].max()) == (0, 1)
        assert of["mean"].nunique() == 1
    with pytest.raises(BacksightError, match="run it on photographs"):
        quality_of_targets(study, "photographs")


def test_the_chain_is_held_against_the_direct_decoder_tap_by_tap(study: Study, quality_rows: pd.DataFrame) -> None:
    gains = modular_minus_direct(study).set_index(["target", "tap"])
    assert set(gains.index.get_level_values("tap")) == {*VIT_TAPS, *DETR_TAPS}
    psnr = quality_rows[quality_rows["measure"] == "psnr"].set_index(["target", "tap"])
    both = [psnr.loc[psnr["inverse"] == name, "value"] for name in ("modular", "direct")]
    expected = (both[0] - both[1]).loc[gains.index]
    np.testing.assert_allclose(gains["value"], expected)
    assert (gains["low"] < gains["value"]).all()


def test_the_scheme_shows_every_tap() -> None:
    images, made = pictures(1)
    figure = method_scheme(images[0], {tap: values[0] for tap, values in made.items()}, "scenes-vit")
    assert len(figure.axes) == 2 + len(VIT_TAPS)  # the page, the image, a picture a tap
    assert all(tap in figure.description for tap in VIT_TAPS)
    with pytest.raises(BacksightError, match="no reconstruction to draw"):
        method_scheme(images[0], {})
