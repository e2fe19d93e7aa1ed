"""The reviewer's checklist: it holds for sound tables, and sees each fault; and the committed tables pass it."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from study_tables import tables, write_study

from backsight.tables.checks import CHECKLIST_COLUMNS, checklist
from backsight.tables.claims import LEAST_SEEDS
from backsight.tables.read import EFFICIENCY, STUDIES, read_study

SPLIT, NULLS, INTERVALS = (
    "the split reported is test",
    "nulls stand beside every score",
    "every number has an interval",
)
SEEDS, SEED, MATCHED = (
    f"at least {LEAST_SEEDS} training seeds",
    "the seed is recorded",
    "compared families are matched",
)
REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


def failed(folder: Path) -> dict[str, str]:
    """{check that does not hold: detail}."""
    rows = checklist(read_study(folder))
    wrong = rows[~rows["holds"]]
    return dict(zip(wrong["check"], wrong["detail"], strict=True))


def write_changed(folder: Path, study: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    for name, table in tables((study,)):
        (folder / name).mkdir()
        change(table).to_csv(folder / name / "metrics.csv", index=False)
    return folder


def test_sound_tables_pass(tmp_path: Path) -> None:
    rows = checklist(read_study(write_study(tmp_path)))
    assert list(rows.columns) == list(CHECKLIST_COLUMNS)
    assert rows["holds"].all(), rows[~rows["holds"]].to_string()
    assert set(rows.loc[rows["run"] == "modular_vs_direct-scenes-vit", "check"]) == {
        SPLIT,
        NULLS,
        INTERVALS,
        SEEDS,
        SEED,
        MATCHED,
    }


@pytest.mark.parametrize(
    ("study", "change", "check", "told"),
    [
        ("quality", lambda t: t.assign(split="train"), SPLIT, "train"),
        ("quality", lambda t: t[~t["inverse"].str.startswith("null_")], NULLS, "factor_score"),
        ("quality", lambda t: t[~(t["inverse"].str.startswith("null_") & (t["tap"] == "norm"))], NULLS, "norm"),
        ("quality", lambda t: t.assign(low=float("nan")), INTERVALS, "no interval"),
        ("quality", lambda t: t.assign(low=t["value"] + 1), INTERVALS, "outside its interval"),
        ("quality", lambda t: t.assign(n=1), INTERVALS, "fewer than two images"),
        ("quality", lambda t: t.assign(seeds=1), SEEDS, "modular has 1"),
        ("quality", lambda t: t.assign(seed=float("nan")), SEED, "no seed"),
        ("modular_vs_direct", lambda t: t[~((t["inverse"] == "direct") & (t["steps"] == 10))], MATCHED, "steps"),
        ("modular_vs_direct", lambda t: t[t["inverse"] != "direct"], MATCHED, "nothing is compared"),
    ],
)
def test_each_fault_is_seen(
    tmp_path: Path, study: str, change: Callable[[pd.DataFrame], pd.DataFrame], check: str, told: str
) -> None:
    faults = failed(write_changed(tmp_path, study, change))
    assert check in faults
    assert told in faults[check]


def test_values_that_could_not_be_measured_need_no_interval(tmp_path: Path) -> None:
    def grey(table: pd.DataFrame) -> pd.DataFrame:
        hue = table["measure"] == "hue_error"
        return table.assign(**{column: table[column].mask(hue) for column in ("value", "low", "high")})

    assert failed(write_changed(tmp_path, "quality", grey)) == {}


def test_the_committed_tables_pass() -> None:
    rows = checklist(read_study(REFERENCE), STUDIES)
    wrong = rows[~rows["holds"]]
    assert len(rows)
    assert wrong.empty, wrong[["run", "check", "detail"]].to_string()


def test_the_efficiency_study_is_asked_for_matched_families(tmp_path: Path) -> None:
    rows = checklist(read_study(write_study(tmp_path)))
    study = read_study(tmp_path)
    assert set(rows.loc[rows["check"] == MATCHED, "run"]) == set(study.runs(EFFICIENCY))
