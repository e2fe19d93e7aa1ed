"""Rows of a study in the making: what they have in common is said once, and every number brings its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backsight.tables.pool import as_table, bootstrap_statistic, metrics_row, pooled_rows
from backsight.targets.base import Target


@dataclass
class TidyRows:
    """Tidy rows about one target: common: columns of all of them; seed: of the bootstraps."""

    target: Target
    common: Mapping[str, Any]
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def places(self, tap: str | None, inverse: str | None, **columns: Any) -> dict[str, Any]:
        """The columns of a row about this tap and this inverse."""
        depth = None if tap is None else self.target.depth(tap)
        return {**self.common, "tap": tap, "depth": depth, "inverse": inverse, **columns}

    def pooled(self, values: Any, measure: str, tap: str | None, inverse: str | None, **columns: Any) -> None:
        """The mean over seeds and images. values: {seed: (N,)}, (S, N) or (N,)."""
        self.rows += pooled_rows(values, measure, self.seed, **self.places(tap, inverse, **columns))

    def median(self, values: Any, measure: str, tap: str | None, inverse: str | None, **columns: Any) -> None:
        """One unsolved sample can be off by any factor: of errors the median counts. values: as of `pooled`."""
        table = as_table(values)
        low, high = bootstrap_statistic(lambda drawn: float(np.nanmedian(table[:, drawn])), table.shape[1], self.seed)
        interval = (float(np.nanmedian(table)), float(low), float(high))
        self.one(interval, measure, tap, inverse, table.shape[1], seeds=len(table), **columns)

    def one(
        self,
        value: tuple[float, float, float],
        measure: str,
        tap: str | None,
        inverse: str | None,
        n: int,
        **columns: Any,
    ) -> None:
        """A row of (value, low, high) of n images."""
        self.rows.append(metrics_row(measure, *value, n, self.seed, **self.places(tap, inverse, **columns)))
