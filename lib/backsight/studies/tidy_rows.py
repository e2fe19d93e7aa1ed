"""Rows of a study in the making: what they have in common is said once, and every number brings its interval.

Intervals are over images, and over training seeds where there are several: Wilson's for shares of images, widened by
the bootstrap over seeds; the bootstrap for the rest. Source: Wilson, JASA 22, 1927.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from backsight.tables.pool import Values, as_table, bootstrap_statistic, metrics_row, pooled_ratio, pooled_rows
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets.base import Target

LARGEST = 1e9  # an error above this is no number that a median could use
BySeed = Mapping[int, Values] | Values  # {seed: (N,)}, (S, N) or (N,); NaN: an image without a value


@dataclass
class TidyRows:
    """Tidy rows about one target: common: columns of all of them; seed: of the bootstraps."""

    target: Target
    common: Mapping[str, Any]
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def about(cls, target: Target, dataset: str | None, split: str | None, seed: int, **common: Any) -> TidyRows:
        place = {"target": target.name, "weights": target.weights, "dataset": dataset, "split": split}
        return cls(target, {**place, **common}, seed)

    def places(self, tap: str | None, inverse: str | None, **columns: Any) -> dict[str, Any]:
        """The columns of a row about this tap and this inverse."""
        depth = None if tap is None else self.target.depth(tap)
        return {**self.common, "tap": tap, "depth": depth, "inverse": inverse, **columns}

    def pooled(self, values: BySeed, measure: str, tap: str | None, inverse: str | None, **columns: Any) -> None:
        """The mean over seeds and images."""
        self.rows += pooled_rows(values, measure, self.seed, **self.places(tap, inverse, **columns))

    def median(self, values: BySeed, measure: str, tap: str | None, inverse: str | None, **columns: Any) -> None:
        """One unsolved sample can be off by any factor: of errors the median counts."""
        table = np.minimum(as_table(values), LARGEST)
        images = int((~np.isnan(table)).any(0).sum())
        interval = (math.nan, math.nan, math.nan)
        if images:
            low, high = bootstrap_statistic(lambda drawn: _median(table[:, drawn]), table.shape[1], self.seed)
            interval = (_median(table), low, high)
        self.one(interval, measure, tap, inverse, images, seeds=len(table), **columns)

    def share(
        self, hits: BySeed, measure: str, tap: str | None, inverse: str | None, of: Any = None, **columns: Any
    ) -> None:
        """A share of images; of: trials of each image, as `hits` (default: one each)."""
        table = as_table(hits)
        trials = np.ones_like(table) if of is None else as_table(of)
        images = int((trials > 0).any(0).sum())
        value, low, high = pooled_ratio(table, trials, self.seed)
        if images and (of is None or value in (0.0, 1.0) or images == 1):
            # A bootstrap of equal values has no length; an image counts once, however many seeds or tokens it has.
            wide = wilson_interval(value * images, images)
            low, high = wide if len(table) == 1 else (min(low, wide[0]), max(high, wide[1]))
        self.one((value, low, high), measure, tap, inverse, images, seeds=len(table), **columns)

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

    def table(self, *columns: str) -> pd.DataFrame:
        """All rows; columns: of the study itself, which come behind METRIC_COLUMNS, there or not."""
        table = pd.DataFrame(self.rows)
        ordered = [*METRIC_COLUMNS, *columns]
        return table.reindex(columns=[*ordered, *(name for name in table.columns if name not in ordered)])


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % interval of a proportion; also of 0 and of all hits it has a length."""
    z, share = 1.959964, hits / count  # hits may be a mean over seeds, which scipy does not take
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
