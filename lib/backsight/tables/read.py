"""All finished runs below one folder: their pooled tables, and the values of single images behind these."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow.parquet import read_schema
from pydantic import BaseModel, ValidationError

from backsight.errors import BacksightError
from backsight.project import FINISHED, METRICS, STARTED, VALUES, project_root, read_json, shown, write_atomically
from backsight.tables.values import METRIC_COLUMNS

QUALITY, FIGURES = "03_quality", "07_figures"


class Record(BaseModel):
    """What is read of a run's record: everything in it may be absent."""

    parameters: dict[str, Any] = {}
    weights: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    hardware: dict[str, Any] = {}
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Study:
    """folder: where the runs lie; table: the rows of their metrics.csv, with `seeds`, `run` and `notebook`, which made
    the run; left_out: {run: why it is not read}."""

    folder: Path
    table: pd.DataFrame
    left_out: Mapping[str, str]

    def rows(self, notebook: str, measures: Sequence[str]) -> pd.DataFrame:
        """The pooled rows of all runs of one notebook and of some measures; `inverse` is "" where a row is of none."""
        rows = self.table[(self.table["notebook"] == notebook) & self.table["measure"].isin(measures)]
        return rows.fillna({"inverse": ""})

    def values(self, notebooks: Collection[str], measures: Collection[str] | None = None) -> pd.DataFrame:
        """One value an image (`tables.values`) of all runs of these notebooks, of these measures where some are given,
        with the column `notebook`."""
        filters = None if measures is None else [("measure", "in", measures)]
        parts = [
            pd.read_parquet(path, filters=filters).assign(notebook=notebook)
            for run, notebook in self.table[["run", "notebook"]].drop_duplicates().itertuples(index=False)
            if notebook in notebooks and (path := self.folder / run / VALUES).is_file()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["target", "notebook"])


def study_folder(results: str | Path = "") -> Path:
    """The folder of a study's runs: `results`, relative to the project, or the committed results/reference."""
    return project_root() / (results or "results/reference")


def read_study(folder: str | Path) -> Study:
    """Read every finished run (run.json says so) in the sub-folders of `folder`.

    A run that did not finish, or whose table cannot be read, is left out and named in `left_out`; what is made of a
    study (07_figures) is no part of it, and runs without a table count for nothing. Raises BacksightError where the
    folder does not exist or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BacksightError(f"{shown(folder)} is not a folder: give the folder that holds the runs.")
    tables, left_out = [], {}
    for place in sorted(folder.iterdir()):
        record = read_json(place / FINISHED)
        notebook = str((record or read_json(place / STARTED) or {}).get("notebook", ""))
        if not notebook or notebook == FIGURES:
            continue
        table = _table(place, record)
        if isinstance(table, str):
            left_out[place.name] = table
        elif len(table):
            tables.append(table.assign(run=place.name, notebook=notebook))
    if not tables:
        raise BacksightError(f"{shown(folder)} holds no finished run: make one with `make run` or name another folder.")
    return Study(folder, pd.concat(tables, ignore_index=True), left_out)


def _table(place: Path, record: dict[str, Any] | None) -> pd.DataFrame | str:
    """A run's table, empty where it has none, or why the run is left out."""
    if record is None:
        return "it was started and did not finish"
    file = METRICS
    try:
        Record.model_validate(record)
        if not (place / METRICS).is_file():
            return pd.DataFrame()
        table = pd.read_csv(place / METRICS, low_memory=False, dtype=dict.fromkeys(("value", "low", "high"), float))
        if (place / (file := VALUES)).is_file():
            read_schema(place / VALUES)
    except ValidationError as error:
        return f"its {FINISHED} is damaged ({'.'.join(map(str, error.errors()[0]['loc']))})"
    except (OSError, ValueError) as error:
        return f"its {file} cannot be read ({type(error).__name__})"
    if missing := [column for column in METRIC_COLUMNS if column not in table]:
        return f"its {METRICS} lacks the columns {', '.join(missing)}"
    return table.assign(seeds=table["seeds"].fillna(1).astype(int) if "seeds" in table else 1)


def span(numbers: pd.Series) -> str:
    """The smallest and the largest of some whole numbers, in words."""
    if numbers.dropna().empty:
        return "no"
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, with the same line ends on every machine."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
