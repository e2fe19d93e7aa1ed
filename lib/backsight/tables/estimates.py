"""Numbers of tables with their intervals, and differences of two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, the images and training seeds behind it, and the runs that it comes from."""

    value: float
    low: float
    high: float
    n: int
    seeds: int
    runs: tuple[str, ...]


def estimate_of(rows: pd.DataFrame) -> Estimate | None:
    """The number of one row; of several, their mean, whose interval is the mean of theirs (never too narrow, since
    the rows are of the same images); None where there is no row with a value."""
    rows = rows[rows["value"].notna()]
    if rows.empty:
        return None
    value, low, high = (float(rows[column].mean(skipna=False)) for column in ("value", "low", "high"))
    runs = tuple(sorted(set(rows["run"])))
    return Estimate(value, low, high, int(rows["n"].min()), int(rows["seeds"].min()), runs)


def difference(first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """first − second, with the interval that follows from theirs (Zou & Donner 2008, MOVER, for independent ones).

    Scores of the same images are correlated, mostly positively: the interval is then wider than need be.
    """
    if first is None or second is None:
        return None
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    runs = tuple(dict.fromkeys((*first.runs, *second.runs)))
    return Estimate(value, low, high, min(first.n, second.n), min(first.seeds, second.seeds), runs)


def flipped(estimate: Estimate, start: float = 0.0) -> Estimate:
    """start − the estimate."""
    return replace(estimate, value=start - estimate.value, low=start - estimate.high, high=start - estimate.low)


def log_ratio(first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """log2(first / second) with its interval (MOVER on logarithms); None unless both intervals are above zero."""
    if first is None or second is None or not (first.low > 0 and second.low > 0):
        return None
    logs = [
        Estimate(math.log2(e.value), math.log2(e.low), math.log2(e.high), e.n, e.seeds, e.runs) for e in (first, second)
    ]
    return difference(*logs)
