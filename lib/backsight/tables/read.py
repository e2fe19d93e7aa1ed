"""All finished runs below one folder as one table.

A run is a sub-folder with a metrics.csv. It counts as finished where its run.json says so; a folder without any
record, as in the committed results/reference, is taken as it is. Nothing here computes a score again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError

from backsight.errors import BacksightError
from backsight.project import FINISHED, METRICS, STARTED, project_root, read_json, shown, write_atomically
from backsight.tables.values import METRIC_COLUMNS

QUALITY, CROSS_LAYER, COLOUR = "03_quality", "04_cross_layer", "05_colour"
EFFICIENCY, TRADEOFF, TRAINING = "06_modular_vs_direct", "10_tradeoff", "02_train_inverse"
EXACT, NOISE = "11_exact", "12_noise"
FIGURES = "07_figures"
STUDIES = (QUALITY, CROSS_LAYER, COLOUR, EFFICIENCY, TRADEOFF)  # whose tables pool training seeds in every row
# What the folder of a run is called where no run.json says which notebook made it: the notebook's name without its
# number, or the first word of it ("quality-scenes-vit-scenes", "cross_layer-scenes-detr", "colour-…").
_FIRST_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "train": TRAINING,
        "quality": QUALITY,
        "cross": CROSS_LAYER,
        "colour": COLOUR,
        "modular": EFFICIENCY,
        "efficiency": EFFICIENCY,
        "tradeoff": TRADEOFF,
        "exact": EXACT,
        "noise": NOISE,
        "targets": "18_targets",
        "quickstart": "00_quickstart",
    }
)
# The column that only one study writes.
_SIGNATURES: Mapping[str, str] = MappingProxyType(
    {
        "sigma": NOISE,
        "study": EXACT,
        "source_tap": CROSS_LAYER,
        "perturbation": COLOUR,
        "flops": EFFICIENCY,
        "t": TRADEOFF,
    }
)


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

    def rows(self, notebook: str, measure: str | Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of all runs of one study (and of some measures), with METRIC_COLUMNS and what else they use.

        `inverse` is "" where a row is of no inverse.
        """
        tables = []
        for run in self.runs(notebook):
            table = self.tables[run]
            if measure is not None:
                table = table[table["measure"].isin([measure] if isinstance(measure, str) else list(measure))]
            if len(table):
                tables.append(table)
        if not tables:
            return pd.DataFrame(columns=[*METRIC_COLUMNS, "seeds", "run"])
        rows = used_columns(pd.concat(tables, ignore_index=True))
        return rows.assign(inverse=rows["inverse"].astype(object).fillna(""))

    def runs(self, notebook: str) -> list[str]:
        """The names of the runs of one study."""
        return sorted(run for run, made_by in self.notebooks.items() if made_by == notebook)

    def overview(self) -> pd.DataFrame:
        """One row a run: its notebook, targets, rows, and the fewest and most images and training seeds of a row."""
        lines = []
        for run, table in self.tables.items():
            counted = table["n"].dropna().astype(int)
            lines.append(
                {
                    "run": run,
                    "notebook": self.notebooks[run],
                    "targets": ", ".join(sorted(set(table["target"].dropna()))),
                    "rows": len(table),
                    "n": span(counted),
                    "seeds": span(table["seeds"]),
                }
            )
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
    """Read every finished run in the sub-folders of `folder`.

    `seeds`, the number of training seeds pooled in a row, is 1 where a table does not say it. A run that is not
    finished, or whose table cannot be read, is left out and named in `left_out`; runs without a table count for
    nothing. Raises BacksightError where the folder does not exist or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BacksightError(f"{shown(folder)} is not a folder: give the folder that holds the runs.")
    tables, notebooks, left_out = {}, {}, {}
    for place in sorted(folder.iterdir()):
        if place.name.startswith(".") or not any((place / name).is_file() for name in (METRICS, STARTED)):
            continue
        record = read_json(place / FINISHED)
        try:
            Record.model_validate(record or {})
        except ValidationError as error:
            left_out[place.name] = f"its {FINISHED} is damaged ({'.'.join(map(str, error.errors()[0]['loc']))})"
            continue
        if (record or read_json(place / STARTED) or {}).get("notebook") == FIGURES:
            continue  # what is made of a study is no part of it
        if record is None and (place / STARTED).is_file():
            left_out[place.name] = "it was started and did not finish"
            continue
        if not (place / METRICS).is_file():
            continue
        table, problem = read_metrics(place)
        if table is None:
            left_out[place.name] = problem
            continue
        notebooks[place.name] = notebook_of(place.name, table, record)
        seeds = table["seeds"].fillna(1).astype(int) if "seeds" in table else 1
        tables[place.name] = table.assign(seeds=seeds, run=place.name)
    if not tables:
        raise BacksightError(f"{shown(folder)} holds no finished run: make one with `make run` or name another folder.")
    return Study(folder, tables, notebooks, left_out)


def read_metrics(folder: Path) -> tuple[pd.DataFrame | None, str]:
    """The table of a run, or None and why it cannot be used."""
    try:
        table = pd.read_csv(folder / METRICS, low_memory=False, dtype=dict.fromkeys(("value", "low", "high"), float))
    except (OSError, ValueError) as error:
        return None, f"its {METRICS} cannot be read ({type(error).__name__})"
    if missing := [column for column in METRIC_COLUMNS if column not in table.columns]:
        return None, f"its {METRICS} lacks the columns {', '.join(missing)}"
    return table, ""


def used_columns(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with METRIC_COLUMNS and those other columns that hold anything in them."""
    empty = [name for name in rows if name not in METRIC_COLUMNS and rows[name].isna().all()] if len(rows) else []
    return rows.drop(columns=empty)


def notebook_of(run: str, table: pd.DataFrame, record: Mapping[str, Any] | None = None) -> str:
    """Which notebook made a run: from its record, else from the columns that only one has, else from its name."""
    if record and record.get("notebook"):
        return str(record["notebook"])
    for column, notebook in _SIGNATURES.items():
        if column in table.columns and table[column].notna().any():
            return notebook
    word = run.replace("_", "-").split("-")[0]
    return _FIRST_WORDS.get(word, "")


def fullest_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Of several runs on the same target and images, the rows of the one with most seeds, then images; never a mix."""
    if rows.empty:
        return rows
    kept = []
    for _, group in rows.groupby(["target", "dataset"], sort=False, dropna=False):
        sizes = group.groupby("run")[["seeds", "n"]].max().sort_index()
        best = sizes.sort_values(["seeds", "n"], ascending=False, kind="stable").index[0]
        kept.append(group[group["run"] == best])
    return pd.concat(kept, ignore_index=True)


def counted(numbers: pd.Series, unit: str) -> str:
    return f"{span(numbers)} {unit[:-1] if (numbers == 1).all() else unit}"


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
    return write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))
