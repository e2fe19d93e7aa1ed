"""A claim is data: which values it reads, against what, how large an effect has to be; one verdict a target.

agreed       the 95 % interval lies beyond the smallest effect that matters (or, for `within`, inside the margin)
disagreed    it lies on the other side
cannot tell  it holds the border, or a trained inverse has fewer than LEAST_SEEDS training seeds
at the floor the values are not above their null: such values decide nothing
Intervals decide after Holm's correction over all rows that are judged together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from backsight.tables.pooling import LEVEL, differences, pool

AGREED, DISAGREED, UNDECIDED, FLOOR = "agreed", "disagreed", "cannot tell", "at the floor"
LEAST_SEEDS = 3  # training seeds behind a number of a trained inverse, before it may decide


@dataclass(frozen=True)
class Claim:
    """claim: its name; source: where it is made, or "ours"; text: in words; notebook: whose values decide, "" for any;
    rows: {column: value or list of values} of the table; tap: "first", "last" (before the predictions), "all" (the mean
    over taps), a name, or "" where values have none; against: what the rows are compared with (as of `pool`; {"tap":
    "first"} is the shallowest); above, below, within: the one border, in `unit`; floor: the null that the values must
    be better than (errors: below it) to say anything, at `floor_tap`, by default at `tap`; trained: whether
    training seeds count; caution: what must not be concluded."""

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


def judge(values: pd.DataFrame, claims: Sequence[Claim], seed: int = 0) -> pd.DataFrame:
    """One row a claim and target: tap, value, low, high, n, seeds, photographs, p (corrected), border, verdict, why.

    values: as of `Values.table`, of all runs that are judged together, with a column `notebook` where claims name one.
    A claim whose rows are not there has none.
    """
    return decide(pd.DataFrame([row for claim in claims for row in _rows(claim, values, seed)]))


def decide(rows: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on rows with value, low, high, seeds, border, agrees (the side), p, floor and few."""
    if rows.empty:
        return rows
    rows = rows.assign(p=holm(rows["p"]))
    told = [_verdict(row) for row in rows.to_dict("records")]
    return rows.assign(verdict=[verdict for verdict, _ in told], why=[why for _, why in told])


def _rows(claim: Claim, values: pd.DataFrame, seed: int) -> Iterable[dict[Any, Any]]:
    if claim.notebook:
        values = _chosen(values, {"notebook": claim.notebook}).drop(columns="notebook", errors="ignore")
    own, against = dict(claim.rows), dict(claim.against)
    targets = np.atleast_1d(own.pop("target", sorted(values["target"].unique())))
    shared = _chosen(values, {column: value for column, value in own.items() if column not in against})
    if shared.empty:
        return
    shared = shared.dropna(axis="columns", how="all")  # of other studies
    for target in targets:
        rows = _chosen(shared, {"target": target})
        wanted, named = _taps(_chosen(rows, own), claim.tap), dict(against)
        if against.get("tap") == "first":
            named["tap"] = next(iter(_taps(_chosen(rows, own), "first")), None)
            rows = rows[rows["tap"].isin([*wanted, named["tap"]])] if [named["tap"]] != wanted else rows.iloc[:0]
        else:
            rows = rows[rows["tap"].isin(wanted)] if claim.tap else rows
        if "target" in against:
            partner = _chosen(shared, {**own, "target": against["target"]})
            partner = partner[partner["tap"].isin(_taps(partner, claim.tap))] if claim.tap else partner
            rows = pd.concat([rows, partner]) if len(partner) else rows.iloc[:0]
        if named and all(column in rows for column in named):
            compared = differences(rows, named)
        else:
            compared = rows.iloc[: 0 if named else None]
        compared = _chosen(compared, {**own, "target": target})
        if compared.empty:
            continue
        (row,) = pool(compared, ["target"], seed=seed).to_dict("records")
        few = claim.trained and row["seeds"] < LEAST_SEEDS
        about = {"claim": claim.claim, "tap": ", ".join(wanted) if len(wanted) == 1 else claim.tap}
        floor = _at_floor(claim, _chosen(values, {"target": target}), own, seed)
        yield {**about, **row, **compare(claim, row), "floor": floor, "few": few}


def _taps(rows: pd.DataFrame, which: str) -> list[str]:
    """Names of taps, in forward order; what a model says at its end is none of its layers."""
    taps = list(dict.fromkeys(rows.sort_values("depth", kind="stable")["tap"].dropna())) if "tap" in rows else []
    taps = [tap for tap in taps if tap != "predictions"] or taps
    return {"first": taps[:1], "last": taps[-1:], "all": taps, "": []}.get(which, [which])


def _at_floor(claim: Claim, rows: pd.DataFrame, own: Mapping[str, Any], seed: int) -> bool:
    """Are the values not beyond their null?"""
    if not claim.floor:
        return False
    taps = _taps(_chosen(rows, own), claim.floor_tap or claim.tap)
    beside = _chosen(rows, {**own, "inverse": [*np.atleast_1d(own["inverse"]), claim.floor], "tap": taps})
    beside = beside.dropna(axis="columns", how="all")
    above = pool(differences(beside, {"inverse": claim.floor}), ["target"], seed=seed)
    sign = -1 if "error" in str(own["measure"]) else 1
    return bool(len(above) and not min(sign * above["low"][0], sign * above["high"][0]) > 0)


def _chosen(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in wanted.items():
        rows = rows[rows[column].isin(np.atleast_1d(value))] if column in rows else rows.iloc[:0]
    return rows


def compare(claim: Claim, row: Mapping[Any, Any]) -> dict[str, Any]:
    """agrees: on which side of the border the value lies; p: two-sided, that it does by chance, from the interval."""
    value, low, high = row["value"], row["low"], row["high"]
    z = stats.norm.ppf((1 + LEVEL) / 2)

    def beyond(border: float, upwards: bool) -> float:
        half = (value - low) if upwards else (high - value)
        distance = (value - border) if upwards else (border - value)
        return float(2 * stats.norm.sf(z * distance / half)) if half > 0 else 1.0  # equal values: how sure, none knows

    if claim.within is not None:
        inside = max(beyond(-claim.within, True), beyond(claim.within, False))
        outside = min(beyond(-claim.within, False), beyond(claim.within, True))
        border = f"±{claim.within:g}"
    else:
        border_at = claim.above if claim.above is not None else claim.below
        assert border_at is not None
        upwards = claim.above is not None
        inside, outside, border = beyond(border_at, upwards), beyond(border_at, not upwards), f"{border_at:g}"
    return {"agrees": inside <= outside, "p": min(1.0, inside, outside), "border": border}


def _verdict(row: Mapping[Any, Any]) -> tuple[str, str]:
    if not row["low"] < row["high"]:
        return UNDECIDED, "no interval"
    if row["floor"]:
        return FLOOR, "the values are not beyond their null"
    if row["few"]:
        return UNDECIDED, f"{row['seeds']} training seed{'s' * (row['seeds'] > 1)}, {LEAST_SEEDS} are needed"
    if row["p"] > 1 - LEVEL:
        return UNDECIDED, f"interval holds {row['border']}"
    side = "on the claim's side of" if row["agrees"] else "on the other side of"
    return AGREED if row["agrees"] else DISAGREED, f"interval {side} {row['border']}"


def holm(p: pd.Series) -> np.ndarray:
    """p values corrected for their number. Source: Holm, Scandinavian Journal of Statistics 6, 1979."""
    order = np.argsort(p.to_numpy(), kind="stable")
    corrected = np.maximum.accumulate(p.to_numpy()[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(corrected, 1)
    return out
