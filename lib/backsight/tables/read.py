"""All finished runs below one folder: their pooled tables, and the values of single images behind these."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
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
    """folder: where the runs lie; tables: {run: its metrics.csv, with the columns `seeds` and `run`}; notebooks:
    {run: which notebook made it}; left_out: {run: why it is not read}."""

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    notebooks: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def rows(self, notebook: str, measures: Sequence[str]) -> pd.DataFrame:
        """The pooled rows of all runs of one notebook and of some measures; `inverse` is "" where a row is of none."""
        runs = [table for run, table in self.tables.items() if self.notebooks[run] == notebook]
        rows = pd.concat(runs, ignore_index=True) if runs else pd.DataFrame(columns=[*METRIC_COLUMNS])
        rows = rows[rows["measure"].isin(measures)].dropna(axis="columns", how="all")
        return rows.reindex(columns=rows.columns.union([*METRIC_COLUMNS], sort=False)).fillna({"inverse": ""})

    def values(self, notebooks: Collection[str]) -> pd.DataFrame:
        """One value an image (`tables.values`) of all runs of these notebooks, with the column `notebook`."""
        parts = [
            pd.read_parquet(self.folder / run / VALUES).assign(notebook=notebook)
            for run, notebook in sorted(self.notebooks.items())
            if notebook in notebooks and (self.folder / run / VALUES).is_file()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["target", "notebook"])

    def overview(self) -> pd.DataFrame:
        """One row a run: its notebook, targets, rows, and the fewest and most images and training seeds of a row."""
        lines = []
        for run, table in self.tables.items():
            targets = ", ".join(sorted(set(table["target"].dropna())))
            counts = {"rows": len(table), "n": span(table["n"]), "seeds": span(table["seeds"])}
            lines.append({"run": run, "notebook": self.notebooks[run], "targets": targets, **counts})
        return pd.DataFrame(lines).sort_values(["notebook", "run"], ignore_index=True)

    @property
    def name(self) -> str:
        """The folder as a text that is the same on every machine: its path in the project, else its name."""
        text = shown(self.folder)
        return self.folder.name if Path(text).is_absolute() else text


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
    tables, notebooks, left_out = {}, {}, {}
    for place in sorted(folder.iterdir()):
        record = read_json(place / FINISHED)
        notebook = str((record or read_json(place / STARTED) or {}).get("notebook", ""))
        if not notebook or notebook == FIGURES:
            continue
        try:
            if (table := _table(place, record)) is not None:
                tables[place.name], notebooks[place.name] = table, notebook
        except BacksightError as error:
            left_out[place.name] = str(error)
    if not tables:
        raise BacksightError(f"{shown(folder)} holds no finished run: make one with `make run` or name another folder.")
    return Study(folder, tables, notebooks, left_out)


def _table(place: Path, record: dict[str, Any] | None) -> pd.DataFrame | None:
    """A run's table, None where it has none. Raises BacksightError, why the run is left out."""
    if record is None:
        raise BacksightError("it was started and did not finish")
    try:
        Record.model_validate(record)
    except ValidationError as error:
        at = ".".join(map(str, error.errors()[0]["loc"]))
        raise BacksightError(f"its {FINISHED} is damaged ({at})") from error
    if not (place / METRICS).is_file():
        return None
    try:
        numbers = dict.fromkeys(("value", "low", "high"), float)
        table = pd.read_csv(place / METRICS, low_memory=False, dtype=numbers)
    except (OSError, ValueError) as error:
        raise BacksightError(f"its {METRICS} cannot be read ({type(error).__name__})") from error
    if missing := [column for column in METRIC_COLUMNS if column not in table]:
        raise BacksightError(f"its {METRICS} lacks the columns {', '.join(missing)}")
    return table.assign(seeds=table["seeds"].fillna(1).astype(int) if "seeds" in table else 1, run=place.name)


def span(numbers: pd.Series) -> str:
    """The smallest and the largest of some whole numbers, in words."""
    if numbers.dropna().empty:
        return "no"
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, with the same line ends on every machine."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def save_table(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a table as CSV, atomically; returns its path."""
    return write_text(path, table.to_csv(index=False, lineterminator="\n"))
