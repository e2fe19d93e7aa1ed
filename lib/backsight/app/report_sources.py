"""Where every number of the page comes from: a file, the lines of it, and what stands there.

A Source is one line of a CSV file, or one entry of a model card. The page's numbers carry their sources; a Ledger
notes those that the page really shows and is written into it, so that they can be read without the files.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from backsight.project import METRICS

LINE = "line"  # the column that holds a row's line in its CSV file, the header being line 1


@dataclass(frozen=True)
class Source:
    """One place: the file by its name in the ledger ("<run>/metrics.csv"), and the line or entry, from 1."""

    file: str
    place: int


@dataclass(frozen=True)
class Traced:
    """A number as the page shows it: the mean of `column` over `sources`, less the mean over `minus`."""

    text: str
    interval: str = ""  # the least `low` and the largest `high` of the sources
    sources: tuple[Source, ...] = ()
    minus: tuple[Source, ...] = ()
    column: str = "value"


@dataclass(frozen=True)
class CitedFile:
    """A file that numbers come from: the link from the page ("" where it lies elsewhere), and its rows by place.

    unit: what a place is called, "line" or "entry"; a row's fields are texts, as they stand in the file.
    """

    link: str
    unit: str
    columns: Sequence[str]
    rows: Mapping[int, Sequence[str]]


@dataclass
class Ledger:
    """The files that the page may cite, by name, and the places that it has cited so far."""

    files: Mapping[str, CitedFile]
    cited: dict[str, set[int]] = field(default_factory=dict)

    def cite(self, sources: Iterable[Source]) -> str:
        """The places as the page's script reads them, "<file>:<place> …"; from now on the ledger holds them."""
        order = list(self.files)
        for source in sources:
            self.cited.setdefault(source.file, set()).add(source.place)
        return " ".join(f"{order.index(source.file)}:{source.place}" for source in sources)

    def link(self, sources: Sequence[Source]) -> str:
        """Where a number leads without the script: the file of its first source."""
        return self.files[sources[0].file].link

    def told(self, sources: Sequence[Source]) -> str:
        """The places in words: "quality/metrics.csv, lines 17 and 42"."""
        parts = []
        for name in dict.fromkeys(source.file for source in sources):
            places = [str(source.place) for source in sources if source.file == name]
            plural = "s" if len(places) > 1 else ""
            parts.append(f"{name}, {self.files[name].unit}{plural} {listed(places)}")
        return "; ".join(parts)

    def content(self) -> str:
        """The cited rows as JSON that may stand inside a script element: a list of files, in the order of `cite`."""
        told: list[dict[str, Any]] = []
        for name, file in self.files.items():
            rows = {str(place): list(file.rows[place]) for place in sorted(self.cited.get(name, ()))}
            about = {"name": name, "link": file.link, "unit": file.unit, "columns": list(file.columns)}
            told.append(about | {"rows": rows} if rows else {})
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def read_lines(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a CSV file and {line on which a row begins: its fields as they stand}. Blank lines are no rows."""
    rows: dict[int, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        before = 0
        for fields in reader:
            if fields:
                rows[before + 1] = fields
            before = reader.line_num
    header = rows.pop(min(rows)) if rows else []
    return header, rows


def sources_of(rows: pd.DataFrame) -> tuple[Source, ...]:
    """The sources of tidy rows with the columns `run` and LINE that hold a value; none where a table has no lines."""
    if LINE not in rows or "run" not in rows:
        return ()
    defined = rows[rows["value"].notna()]
    return tuple(Source(f"{run}/{METRICS}", int(line)) for run, line in zip(defined["run"], defined[LINE], strict=True))
