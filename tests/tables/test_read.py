"""Reading the runs of a study, and drawing its figures from tables and pictures alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from study_tables import DETR_TAPS, VIT_TAPS, tables, write_study

from backsight.errors import BacksightError
from backsight.plots.grids import reconstruction_grid
from backsight.plots.scheme import method_scheme
from backsight.plots.targets import (
    leading_family,
    modular_against_direct,
    plain_rows,
    stacked_pictures,
    targets_by_depth,
)
from backsight.studies.figures import StudyFigure, caption, save_figure, study_figures, write_figures
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
    rows = study.rows("01_targets")
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


# ------------------------------------------------------------------------------------------------------------- figures


def test_every_study_has_figures_and_what_is_absent_is_told(study: Study, tmp_path: Path) -> None:
    said: list[str] = []
    names = [drawn.name for drawn in study_figures(study, scheme=False, say=said.append)]
    assert {"quality-targets", "modular-against-direct", "psnr-scenes-vit", "psnr-scenes-detr"} <= set(names)
    assert len(names) == len(set(names))
    assert [text for text in said if "quality-scenes-vit" in text and "pictures" in text]

    said.clear()
    alone = read_study(write_study(tmp_path, ("quality",)))
    assert study_figures(alone, scheme=False, say=said.append)
    for notebook in (CROSS_LAYER, COLOUR, EFFICIENCY, TRADEOFF):
        assert any(notebook in text for text in said), notebook


def test_captions_state_n_seeds_intervals_and_runs(study: Study, quality_rows: pd.DataFrame) -> None:
    rows = quality_rows[quality_rows["measure"] == "psnr"]
    text = caption(StudyFigure("psnr", "PSNR", targets_by_depth(rows, ["psnr"]), rows))
    for said in ("**PSNR.**", "n = 50 images", "3 training seeds", "95 % bootstrap intervals", "scenes (test)"):
        assert said in text
    assert "Runs: `quality-scenes-detr`, `quality-scenes-vit`." in text
    without = caption(StudyFigure("psnr", "PSNR", targets_by_depth(rows, ["psnr"]), rows.assign(low=np.nan)))
    assert "no intervals" in without


def test_two_figures_of_one_name_are_refused(study: Study, quality_rows: pd.DataFrame, tmp_path: Path) -> None:
    drawn = StudyFigure("psnr", "PSNR", targets_by_depth(quality_rows, ["psnr"]), quality_rows)
    with pytest.raises(BacksightError, match="two figures are called psnr"):
        write_figures(tmp_path, [drawn, drawn], study)


def test_one_null_of_each_kind_is_drawn(quality_rows: pd.DataFrame) -> None:
    null = quality_rows[quality_rows["inverse"] == "null_shuffled"]
    each = pd.concat([quality_rows.drop(null.index), null.assign(family="linear"), null.assign(family="modular")])
    kept = plain_rows(each)
    assert set(kept.loc[kept["inverse"] == "null_shuffled", "family"]) == {"modular"}
    assert len(kept) == len(quality_rows)


def test_targets_are_compared_by_one_family(quality_rows: pd.DataFrame) -> None:
    assert leading_family(quality_rows) == "modular"
    partly = quality_rows[(quality_rows["target"] == "scenes-vit") | (quality_rows["inverse"] != "modular")]
    assert leading_family(partly) == "direct"
    with pytest.raises(BacksightError, match="share no inverse family"):
        leading_family(quality_rows[quality_rows["inverse"] == "null_mean"])


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda rows: targets_by_depth(rows, ["top1"]), "none of these measures"),
        (lambda rows: modular_against_direct(rows[rows["inverse"] == "modular"]), "no target has both"),
        (lambda rows: stacked_pictures({}), "no picture to stack"),
        (lambda rows: method_scheme(np.zeros((3, 4, 4)), {}), "no reconstruction to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    quality_rows: pd.DataFrame, draw: Callable[[pd.DataFrame], object], match: str
) -> None:
    with pytest.raises(BacksightError, match=match):
        draw(quality_rows)


def test_the_first_rows_of_saved_grids_are_stacked(tmp_path: Path) -> None:
    images, made = pictures(3)
    path = save_figure(tmp_path, "grid", reconstruction_grid(images, made))[0]
    heights = [stacked_pictures({"grid": path}, rows=rows).get_size_inches()[1] for rows in (1, 2, 3, None)]
    assert heights[0] < heights[1] < heights[2] < heights[3]
    # A row of pictures more is the same height more, whichever row it is.
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.12)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BacksightError, match="no picture that can be read"):
        stacked_pictures({"text": tmp_path / "text.png"})


def test_the_scheme_shows_every_tap() -> None:
    images, made = pictures(1)
    figure = method_scheme(images[0], {tap: values[0] for tap, values in made.items()}, "scenes-vit")
    assert len(figure.axes) == 2 + len(VIT_TAPS)  # the page, the image, a picture a tap
    assert figure.shows_images
    assert all(tap in figure.description for tap in VIT_TAPS)


def test_the_depth_is_relative(quality_rows: pd.DataFrame) -> None:
    axes = targets_by_depth(quality_rows, ["psnr"]).axes[0]
    lengths = {len(line.get_xdata()) for line in axes.lines}
    assert lengths == {len(VIT_TAPS), len(DETR_TAPS)}
    assert all(min(line.get_xdata()) == 0 and max(line.get_xdata()) == 1 for line in axes.lines)
