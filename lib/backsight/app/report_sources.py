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

LINE = "line"  # the column that holds a row's line in its CSV file, the header being line 1


@dataclass(frozen=True)
class Source:
    """One place: the file by its name in the ledger ("<run>/metrics.csv"), and the line or entry, from 1."""

    file: str
    place: int


@dataclass(frozen=True)
class Traced:
    """A number as the page shows it, with the places it is made of.

    The number is the mean of `column` over `sources`, less the mean over `minus` where there are any; an interval is
    the least `low` and the largest `high` of the sources.
    """

    text: str
    interval: str = ""
    sources: tuple[Source, ...] = ()
    minus: tuple[Source, ...] = ()
    column: str = "value"


@dataclass(frozen=True)
class CitedFile:
    """A file that numbers come from: the link from the page ("" where it lies elsewhere), and its rows by place.

    unit: what a place is called, "line" or "entry"; a row's fields are texts, as they stand in the file.
    """

    name: str
    link: str
    unit: str
    columns: Sequence[str]
    rows: Mapping[int, Sequence[str]]


@dataclass
class Ledger:
    """The files that the page may cite, and the places that it has cited so far."""

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
            listed = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
            parts.append(f"{name}, {self.files[name].unit}{'s' if len(places) > 1 else ''} {listed}")
        return "; ".join(parts)

    def content(self) -> str:
        """The cited rows as JSON that may stand inside a script element: a list of files, in the order of `cite`."""
        listed: list[dict[str, Any]] = []
        for name, file in self.files.items():
            rows = {str(place): list(file.rows[place]) for place in sorted(self.cited.get(name, ()))}
            shown = {"name": file.name, "link": file.link, "unit": file.unit, "columns": list(file.columns)}
            listed.append(shown | {"rows": rows} if rows else {})
        return json.dumps(listed, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def read_lines(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a CSV file and {line on which a row begins: its fields as they stand}. Blank lines are no rows.

    Raises OSError, UnicodeDecodeError or csv.Error where the file cannot be read.
    """
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


def with_lines(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table as pandas read it from `path`, with each row's line. Raises ValueError where the two do not agree."""
    _, rows = read_lines(path)
    if len(rows) != len(table):
        raise ValueError(f"{len(rows)} rows by line, {len(table)} in the table")
    return table.assign(**{LINE: list(rows)})


def sources_of(rows: pd.DataFrame, file: str = "metrics.csv") -> tuple[Source, ...]:
    """The sources of tidy rows with the columns `run` and LINE that hold a value; none where a table has no lines."""
    if LINE not in rows or "run" not in rows:
        return ()
    defined = rows[rows["value"].notna()] if "value" in rows else rows
    pairs = zip(defined["run"], defined[LINE], strict=True)
    return tuple(Source(f"{run}/{file}", int(line)) for run, line in pairs)
