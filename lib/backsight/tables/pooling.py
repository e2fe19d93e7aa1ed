"""Means of values with their intervals: the only place where an interval is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from backsight.errors import BacksightError
from backsight.tables.names import DIFFERENCES_OF_SHARES, SHARES
from backsight.tables.values import MEASURED, METRIC_COLUMNS, NO_SEED, UNITS

DRAWS = 1000
LEVEL = 0.95
LEVEL_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
FEW_SEEDS = 5  # up to so many, the interval of the seeds' means by Student's t counts where it is the wider one
# What is another one of another target, tap or inverse, and not part of what a pair has in common.
DIFFER = {
    "target": ("weights", "tap", "depth", "pairs"),
    "tap": ("depth",),
    "inverse": ("family", "flops", "seconds"),
}
CEILING = "_ceiling"  # a measure of this ending, of the true images, is the column `ceiling` of the measure


def pool(
    values: pd.DataFrame, by: Sequence[str] | None = None, against: Mapping[str, Any] | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row a group: the mean over training seeds and images with its 95 % interval.

    values: one value an image and training seed (`Values.table`), NaN where an image has none, and its weight. by:
    columns that make a group, default all but UNITS. against: {column: value} of the rows to compare with, such as
    {"inverse": "direct"} or {"tap": "blocks.0"}: the rows are then differences to them, of the same image by the same
    seed (or by none, where a null knows no seed); what has no partner is left out, and so are the partners themselves.
    seed: of the bootstrap. With one training seed the interval is of images alone: `seeds` says so.
    Columns: by, value, low, high, n (images), seeds, photographs, and with `against` a column of its value(s).
    """
    by = [name for name in values.columns if name not in (*UNITS, *MEASURED)] if by is None else list(by)
    values = values[values["value"].notna()]
    if against:
        values, by = differences(values, against), [*by, "against"]
    groups = values.groupby(by, sort=False, dropna=False)
    rows = [dict(zip(by, key, strict=True)) | _row(group, seed) for key, group in groups]
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "seeds", "photographs"])


def metrics(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The tidy table of a run, METRIC_COLUMNS first: its values, pooled, with their ceilings beside them."""
    pooled = pool(values, seed=seed).assign(seed=seed)
    ceilings = pooled[pooled["measure"].str.endswith(CEILING)].set_index("measure")["value"]
    if len(ceilings):
        pooled = pooled[~pooled["measure"].isin(ceilings.index)]
        pooled = pooled.assign(ceiling=(pooled["measure"] + CEILING).map(ceilings.to_dict()))
    return pooled[[*METRIC_COLUMNS, *(name for name in pooled if name not in METRIC_COLUMNS)]]


def differences(values: pd.DataFrame, against: Mapping[str, Any]) -> pd.DataFrame:
    """Each value minus that of the same image and seed in the rows `against`.

    Of another target its taps, of another tap its depth, of another inverse its family differ; all else is the same.
    """
    if absent := [name for name in against if name not in values]:
        raise BacksightError(f"the table has no column {', '.join(absent)} to compare by.")
    partner = (values[[*against]] == pd.Series(dict(against))).all(axis="columns")
    other = {*against, *(name for column in against for name in DIFFER.get(column, ()))}
    if "inverse" in against and "family" in values and values[partner]["inverse"].str.startswith("null_").all():
        other -= set() if values[partner]["family"].isna().any() else {"family"}  # the null of that very family
    same = [name for name in values.columns if name not in {"value", "weight", "photograph", *other}]
    first, second = values[~partner], values[partner]
    if (second["train_seed"] == NO_SEED).all() or (first["train_seed"] == NO_SEED).all():
        same.remove("train_seed")  # nothing was trained there: the same for every seed
    if second.duplicated(same).any():
        raise BacksightError(f"{dict(against)} names several values an image: choose one of each before comparing.")
    base = second[[*same, "value"]].rename(columns={"value": "base"})
    joined = first.merge(base, on=same, how="inner")
    joined["value"] -= joined.pop("base")
    return joined.assign(against=", ".join(map(str, against.values())))


def _row(group: pd.DataFrame, seed: int) -> dict[str, Any]:
    value, weight = (group[name].to_numpy(float) for name in MEASURED)
    seeds, by_seed = np.unique(group["train_seed"], return_inverse=True)
    names, by_photograph = np.unique(group["photograph"].astype(str), return_inverse=True)
    above, below = np.zeros((2, len(seeds), len(names)))
    np.add.at(above, (by_seed, by_photograph), weight * value)
    np.add.at(below, (by_seed, by_photograph), weight)
    measures = set(group["measure"])
    shares = measures <= SHARES and "against" not in group
    cases = shares and bool(np.isin(value, (0.0, 1.0)).all())
    mean, *bounds = interval(above, below, seed, measures <= SHARES | DIFFERENCES_OF_SHARES, cases)
    low, high = np.clip(bounds, 0, 1) if shares and (value == value.clip(0, 1)).all() else bounds
    counts = {"n": group["image"].nunique(), "seeds": len(seeds), "photographs": len(names)}
    return {"value": mean, "low": low, "high": high, **counts}


def interval(
    above: np.ndarray, below: np.ndarray, seed: int = 0, shares: bool = False, cases: bool = False
) -> tuple[float, float, float]:
    """(value, low, high) of the ratio sum(above) / sum(below), both (S, C): of S training seeds and C photographs.

    A crossed bootstrap: each draw takes S seeds and C photographs with replacement, the same photographs for all
    seeds. Quantiles lie as much further out as Student's t for C lies beyond the normal law (else intervals of few are
    too short). With 2 to FEW_SEEDS seeds the t interval of the seeds' own values counts where it is wider. Equal values
    cannot vary in a bootstrap: of cases, ones and zeros, Wilson's interval of C trials counts likewise; where shares or
    their differences are all the same, or these are of cases, as many of C as Wilson's bound of none allows may lie up
    to 1 beside them.
    Sources: Davison & Hinkley, Bootstrap Methods, 3.8; Hesterberg, The American Statistician 69, 2015, 5.2.
    """
    total = below.sum()
    if not total > 0:
        return np.nan, np.nan, np.nan
    value, (seeds, units) = float(above.sum() / total), above.shape
    bounds: list[Any] = []
    if units > 1:
        by_seed, by_unit = _draws(seed, seeds, units)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = ((by_seed @ above) * by_unit).sum(1) / ((by_seed @ below) * by_unit).sum(1)
        tail = stats.norm.cdf(-np.sqrt(units / (units - 1)) * stats.t.ppf((1 + LEVEL) / 2, units - 1))
        bounds.append(np.quantile(drawn[np.isfinite(drawn)], [tail, 1 - tail]))
    if 2 <= seeds <= FEW_SEEDS:
        half = stats.sem(above.sum(1) / below.sum(1)) * stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
        bounds.append((value - half, value + half))
    z = LEVEL_Z
    if cases:
        centre, scale = value + z * z / (2 * units), 1 + z * z / units
        half = z * np.sqrt(value * (1 - value) / units + z * z / (4 * units * units))
        bounds.append(((centre - half) / scale, (centre + half) / scale))
    elif shares and units > 1:
        shown = above[below > 0] / below[below > 0]
        if np.ptp(shown) == 0 or np.isin(shown, (-1, 0, 1)).all():
            bounds.append((value - z * z / (units + z * z), value + z * z / (units + z * z)))
    if not bounds:
        return value, np.nan, np.nan  # one image by one seed says nothing of how much it would vary
    lows, highs = np.transpose(bounds)
    return value, float(lows.min()), float(highs.max())


@lru_cache(maxsize=16)
def _draws(seed: int, seeds: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw takes each seed (DRAWS, S) and each photograph (DRAWS, C)."""
    generator = np.random.default_rng(seed)
    return tuple(generator.multinomial(k, np.full(k, 1 / k), DRAWS).astype(float) for k in (seeds, units))  # type: ignore[return-value]


def influence(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """(N, …) what each of `count` images contributes to a statistic that is no mean, such as an average precision.

    statistic: (R, …) values of weights (R, N), how often each image counts in each of R draws. The contributions are
    jackknife pseudo-values, moved so that their mean is the statistic of all images: pooled as any other values they
    give it and its interval. Source: Efron & Tibshirani, An Introduction to the Bootstrap, 11.5.
    """
    whole = np.asarray(statistic(np.ones((1, count)))[0], float)
    if count < 2:
        return whole[None]
    without = np.asarray(statistic(1 - np.eye(count)), float)
    known = ~np.isnan(without)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, without, 0).sum(0) / known.sum(0)
    return whole + (count - 1) * (mean - without)
