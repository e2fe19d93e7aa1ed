"""A claim is data: which values it reads, against what, how large an effect has to be; one verdict a target.

agreed       the 95 % interval lies beyond the smallest effect that matters (or, for `within`, inside the margin)
disagreed    it lies on the other side
cannot tell  it holds the border, or a trained inverse has fewer than LEAST_SEEDS training seeds
at the floor the values are not above their null: such values decide nothing
Intervals decide after Holm's correction over all rows that are judged together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from backsight.tables.pooling import LEVEL, LEVEL_Z, differences, pool

AGREED, DISAGREED, UNDECIDED, FLOOR = "agreed", "disagreed", "cannot tell", "at the floor"
LEAST_SEEDS = 3  # training seeds behind a number of a trained inverse, before it may decide


@dataclass(frozen=True)
class Claim:
    """claim: its name; source: where it is made, or "ours"; text: in words; notebook: whose values decide, "" for any;
    rows: {column: value or list of values} of the table; tap: "first", "last" (before the predictions), "all" (the mean
    over taps), a name, or "" where values have none; against: what the rows are compared with (as of `pool`; {"tap":
    "first"} is the shallowest); above, below, within: the one border, in `unit`; floor: the null that the values must
    be better than (errors: below it) to say anything, at `floor_tap`, by default at `tap`; trained: whether
    training seeds count; caution: what must not be concluded; pictures: "scenes" or "real", which its rows are of."""

    claim: str
    source: str
    rows: Mapping[str, Any]
    caution: str
    text: str = ""
    notebook: str = ""
    tap: str = "last"
    against: Mapping[str, Any] = field(default_factory=dict)
    above: float | None = None
    below: float | None = None
    within: float | None = None
    unit: str = ""
    floor: str = ""
    floor_tap: str = ""
    trained: bool = True
    pictures: str = "scenes"


def judge(values: pd.DataFrame, claims: Sequence[Claim], seed: int = 0) -> pd.DataFrame:
    """One row a claim and target: tap, value, low, high, n, seeds, photographs, p (corrected), border, verdict, why.

    values: as of `Values.table`, of all runs that are judged together, with a column `notebook` where claims name one.
    A claim whose rows are not there has none.
    """
    rows = []
    for claim in claims:
        same = {name: value for name, value in claim.rows.items() if name not in {"target", "inverse", *claim.against}}
        own = _chosen(values, same | ({"notebook": claim.notebook} if claim.notebook else {}))
        own = own.drop(columns="notebook", errors="ignore").dropna(axis="columns", how="all")
        for target in np.atleast_1d(claim.rows.get("target", sorted(values["target"].unique()))):
            rows += _row(claim, own, {**claim.rows, "target": target}, seed)
    return decide(pd.DataFrame(rows))


def decide(rows: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on rows with value, low, high, seeds, border, agrees (the side), p, floor and few."""
    if rows.empty:
        return rows
    rows = rows.assign(p=holm(rows["p"]))
    verdicts = [_verdict(row) for row in rows.to_dict("records")]
    return rows.assign(**pd.DataFrame(verdicts, rows.index, ["verdict", "why"]))


def _row(claim: Claim, values: pd.DataFrame, own: Mapping[str, Any], seed: int) -> list[dict[Any, Any]]:
    """The row of a claim and a target, if what it reads was measured."""
    if (compared := _compared(values, own, claim.against, claim.tap)).empty:
        return []
    (row,) = pool(compared, ["target"], seed=seed).to_dict("records")
    taps = _taps(_chosen(values, own), claim.tap)
    about = {"claim": claim.claim, "tap": taps[0] if len(taps) == 1 else claim.tap}
    few, at_floor = claim.trained and row["seeds"] < LEAST_SEEDS, False
    if claim.floor:
        beside = _compared(values, own, {"inverse": claim.floor}, claim.floor_tap or claim.tap)
        above = pool(beside, ["target"], seed=seed)
        least = -above["high"] if "error" in str(own["measure"]) else above["low"]
        at_floor = not (least > 0).all()
    return [{**about, **row, **compare(claim, row), "floor": at_floor, "few": few}]


def _compared(values: pd.DataFrame, own: Mapping[str, Any], against: Mapping[str, Any], tap: str) -> pd.DataFrame:
    """The rows `own` at a tap, or what they differ by from those that are the same but for `against`."""
    rows, against = _at(values, own, tap), dict(against)
    if not against:
        return rows
    if against.get("tap") == "first":
        against["tap"] = next(iter(_taps(_chosen(values, own), "first")), None)
    partner = _at(values, {**own, **against}, "" if "tap" in against else tap)
    rows = rows[~rows.index.isin(partner.index)]
    if rows.empty or partner.empty:
        return rows.iloc[:0]
    return differences(pd.concat([rows, partner]).dropna(axis="columns", how="all"), against)


def _at(values: pd.DataFrame, columns: Mapping[str, Any], tap: str) -> pd.DataFrame:
    """Nulls are rows only where they are asked for."""
    rows = _chosen(values, columns)
    if "inverse" in rows and "inverse" not in columns:
        rows = rows[~rows["inverse"].astype(str).str.startswith("null_")]
    return _chosen(rows, {"tap": _taps(rows, tap)}) if tap else rows


def _taps(rows: pd.DataFrame, which: str) -> list[str]:
    """Names of taps, in forward order; what a model says at its end is none of its layers."""
    taps = list(rows.sort_values("depth", kind="stable")["tap"].dropna().unique()) if "tap" in rows else []
    taps = [tap for tap in taps if tap != "predictions"] or taps
    return {"first": taps[:1], "last": taps[-1:], "all": taps, "": []}.get(which, [which])


def _chosen(rows: pd.DataFrame, columns: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that have one of the values given of each column; none where a column is not there."""
    if not columns.keys() <= set(rows):
        return rows.iloc[:0]
    return rows[np.logical_and.reduce([rows[column].isin(np.atleast_1d(value)) for column, value in columns.items()])]


def compare(claim: Claim, row: Mapping[Any, Any]) -> dict[str, Any]:
    """agrees: on which side of the border the value lies; p: two-sided, that it does by chance, from the interval."""

    def beyond(border: float, side: int) -> float:
        """p of lying above (side 1) or below (-1) of the border by chance; of equal values nobody knows it."""
        half = row["value"] - row["low"] if side > 0 else row["high"] - row["value"]
        return float(2 * stats.norm.sf(LEVEL_Z * side * (row["value"] - border) / half)) if half > 0 else 1.0

    given = (claim.above, 1), (claim.below, -1)
    if claim.within is not None:
        given = (-claim.within, 1), (claim.within, -1)
    borders = [(at, side) for at, side in given if at is not None]
    inside = max(beyond(at, side) for at, side in borders)
    outside = min(beyond(at, -side) for at, side in borders)
    border = f"{'±' * (claim.within is not None)}{borders[-1][0]:g}"
    return {"agrees": inside <= outside, "p": min(1.0, inside, outside), "border": border}


def _verdict(row: Mapping[Any, Any]) -> tuple[str, str]:
    if not row["low"] < row["high"]:
        return UNDECIDED, "no interval"
    if row["floor"]:
        return FLOOR, "the values are not beyond their null"
    if row["few"]:
        return UNDECIDED, f"{row['seeds']} training seed{'s' * (row['seeds'] > 1)}, {LEAST_SEEDS} are needed"
    if row["p"] > 1 - LEVEL:
        return UNDECIDED, f"corrected for the number of rows, the interval holds {row['border']}"
    side = "on the claim's side of" if row["agrees"] else "on the other side of"
    return AGREED if row["agrees"] else DISAGREED, f"interval {side} {row['border']}"


def holm(p: pd.Series) -> pd.Series:
    """p values corrected for their number. Source: Holm, Scandinavian Journal of Statistics 6, 1979."""
    ranked = p.sort_values(kind="stable")
    return (ranked * np.arange(len(p), 0, -1)).cummax().clip(upper=1)[p.index]
