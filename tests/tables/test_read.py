"""Reading the runs of a study, and drawing its figures from tables and pictures alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from study_tables import DETR_TAPS, VIT_TAPS, tables, write_run, write_study

from backsight.errors import BacksightError
from backsight.plots.scheme import method_scheme
from backsight.project import write_json
from backsight.tables.pooling import pool
from backsight.tables.read import QUALITY, Study, read_study, study_folder
from backsight.tables.values import METRIC_COLUMNS, write_values


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_study(write_study(tmp_path_factory.mktemp("results")))


def pictures(count: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    images = random.random((count, 3, 16, 16)).astype(np.float32)
    return images, {tap: random.random((count, 3, 16, 16)).astype(np.float32) for tap in VIT_TAPS}


# ------------------------------------------------------------------------------------------------------------- reading


def test_values_come_back_as_they_were_pooled_from_a_small_file(tmp_path: Path) -> None:
    values = next(tables((QUALITY,)))[2]
    written = write_values(tmp_path / "values.parquet", values)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "values.parquet"), written)
    values.to_parquet(tmp_path / "plain.parquet", index=False, compression="zstd")
    assert (tmp_path / "values.parquet").stat().st_size < 0.7 * (tmp_path / "plain.parquet").stat().st_size


def test_every_run_is_read_with_its_notebook(study: Study) -> None:
    rows = study.rows("05_colour", ["hue_error_shown"])
    assert set(rows["measure"]) == {"hue_error_shown"}
    assert set(METRIC_COLUMNS) <= set(rows)
    assert set(rows["run"]) == {"colour-scenes-vit", "colour-scenes-detr"}
    assert study.table["run"].nunique() == 12
    values = study.values([QUALITY, "05_colour"])
    assert set(values["notebook"]) == {QUALITY, "05_colour"}
    assert {"image", "train_seed", "value"} <= set(values)
    of_some = study.values([QUALITY, "05_colour"], ["psnr"])
    pd.testing.assert_frame_equal(of_some, values[values["measure"] == "psnr"].reset_index(drop=True))


def test_a_study_without_such_runs_has_no_rows(study: Study) -> None:
    rows = study.rows("01_method", ["psnr"])
    assert rows.empty
    assert set(METRIC_COLUMNS) <= set(rows)
    assert study.values(["01_method"]).empty


def finished(folder: Path, name: str, **record: Any) -> None:
    write_run(folder / name, QUALITY, next(tables((QUALITY,)))[2])
    (folder / name / "run.json").unlink()
    for file, content in record.items():
        write_json(folder / name / f"{file}.json", content)


def test_unfinished_and_broken_runs_are_left_out_by_name(tmp_path: Path) -> None:
    finished(tmp_path, "done", started={"notebook": QUALITY}, run={"notebook": QUALITY})
    finished(tmp_path, "running", started={"notebook": QUALITY})
    finished(tmp_path, "figures", started={"notebook": "07_figures"})
    finished(tmp_path, "short", run={"notebook": QUALITY})
    finished(tmp_path, "no-run")
    finished(tmp_path, "half", run={"notebook": QUALITY})
    (tmp_path / "half" / "values.parquet").write_bytes(b"PAR1")
    (tmp_path / "short" / "metrics.csv").write_text("target,value\nscenes-vit,1\n")
    study = read_study(tmp_path)
    assert set(study.table["run"]) == {"done"}
    assert set(study.left_out) == {"running", "short", "half"}
    assert "values.parquet cannot be read" in study.left_out["half"]
    assert "did not finish" in study.left_out["running"]
    assert "lacks the columns" in study.left_out["short"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="no finished run"):
        read_study(tmp_path)
    with pytest.raises(BacksightError, match="is not a folder"):
        read_study(tmp_path / "absent")


def test_the_reference_is_the_default() -> None:
    assert study_folder("").parts[-2:] == ("results", "reference")
    assert study_folder("results/default").name == "default"


# ------------------------------------------------------------------------------------------- what several runs show


def test_the_chain_is_held_against_the_direct_decoder_image_by_image(study: Study) -> None:
    values = study.values([QUALITY])
    values = values[(values["measure"] == "psnr") & values["inverse"].isin(["modular", "direct"])]
    gains = pool(values, ["target", "tap"], {"inverse": "direct"}).set_index(["target", "tap"])
    assert set(gains.index.get_level_values("tap")) == {*VIT_TAPS, *DETR_TAPS}
    np.testing.assert_allclose(gains["value"], 1.0, atol=0.2)
    assert (gains["high"] - gains["low"]).max() < 0.8  # images alone vary by 2 dB


def test_the_scheme_shows_every_tap() -> None:
    images, made = pictures(1)
    figure = method_scheme(images[0], {tap: values[0] for tap, values in made.items()}, "scenes-vit")
    assert len(figure.axes) == 2 + len(VIT_TAPS)  # the page, the image, a picture a tap
    assert all(tap in figure.description for tap in VIT_TAPS)
    with pytest.raises(BacksightError, match="no reconstruction to draw"):
        method_scheme(images[0], {})
