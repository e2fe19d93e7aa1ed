"""Benchmarks as tidy tables: ratios to a baseline measured in the same run, interleaved, median of at least five.

A benchmark is a file beside this one that calls `write`; `python benchmarks/table.py` prints all that were written.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from backsight.project import project_root

COLUMNS = ("benchmark", "case", "measure", "value", "unit", "baseline", "ratio", "goal")


@dataclass(frozen=True)
class Row:
    """One measurement; ratio: value / baseline, in the same unit; goal: what the ratio should be, in words."""

    benchmark: str
    case: str
    measure: str
    value: float
    unit: str
    baseline: float
    ratio: float
    goal: str


def compare(benchmark: str, case: str, measure: str, value: float, unit: str, baseline: float, goal: str) -> Row:
    """A row with its ratio."""
    return Row(benchmark, case, measure, value, unit, baseline, value / baseline, goal)


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """{name: median seconds}: one unmeasured round, then `repeats` rounds in which each runs once.

    Interleaving lets a slow spell of the machine fall on all of them.
    """
    if repeats < 5:
        raise ValueError(f"a median of at least 5 repeats is reported, not of {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for measured in (False, *([True] * repeats)):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if measured:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def write(name: str, rows: Sequence[Row]) -> Path:
    """Print the rows and write them to results/bench/<name>.csv."""
    path = project_root() / "results" / "bench" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))
    partial = path.with_suffix(".csv.partial")
    table.to_csv(partial, index=False)
    os.replace(partial, path)
    show(table)
    return path


def show(table: pd.DataFrame) -> None:
    """Print a table to three significant digits."""
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


def main() -> None:
    """Print every table in results/bench as one."""
    written = sorted((project_root() / "results" / "bench").glob("*.csv"))
    if not written:
        print("no benchmark has been written yet; run `make bench`")
        return
    show(pd.concat([pd.read_csv(path) for path in written], ignore_index=True))


if __name__ == "__main__":
    main()
