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
    """claim: what is said; source: version and section of the paper, or "ours"; rows: {column: value or list of values}
    of the table; tap: "first", "last", "all" (the mean over taps) or a name; against: what the rows are compared with
    (as of `pool`; {"tap": "first"} is the shallowest); above, below, within: the one border of the claim, in the
    measure's unit; floor: the null that the values must be above (below, for a claim of `below`) to say anything;
    trained: whether training seeds count."""

    claim: str
    source: str
    rows: Mapping[str, Any]
    caution: str
    tap: str = "last"
    against: Mapping[str, Any] = field(default_factory=dict)
    above: float | None = None
    below: float | None = None
    within: float | None = None
    floor: str = ""
    trained: bool = True


def judge(values: pd.DataFrame, claims: Sequence[Claim], seed: int = 0) -> pd.DataFrame:
    """One row a claim and target: value, low, high, n, seeds, photographs, p (corrected), verdict, why.

    values: as of `Values.table`, of all runs that are judged together. A claim whose rows are not there has none.
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
    null = {"inverse": claim.floor} if claim.floor else {}
    for target, of_target in values.groupby("target", sort=True):
        chosen = _chosen(of_target, {**claim.rows, **({"target": target} if "target" in claim.rows else {})})
        taps = list(dict.fromkeys(chosen.sort_values("depth", kind="stable")["tap"].dropna()))
        if not taps:
            continue
        named = {"first": taps[0], "last": taps[-1]}
        against = {column: named.get(value, value) for column, value in claim.against.items()}
        wanted = taps if claim.tap == "all" else [named.get(claim.tap, claim.tap)]
        pooled = values if "target" in against else of_target
        pooled = _chosen(pooled, {k: v for k, v in claim.rows.items() if k not in against})
        own = pooled["tap"].isin(wanted)
        for column, value in against.items():
            own |= pooled[column] == value
        compared = differences(pooled[own], against) if against else pooled[own]
        compared = _chosen(compared, {**claim.rows, "target": target})
        if compared.empty:
            continue
        (row,) = pool(compared, ["target"], seed=seed).to_dict("records")
        at_floor = False
        if null:
            beside = _chosen(of_target, {**claim.rows, "inverse": [*np.atleast_1d(claim.rows["inverse"]), claim.floor]})
            above = pool(differences(beside[beside["tap"].isin(wanted)], null), ["target"], seed=seed)
            sign = -1 if claim.below is not None else 1
            at_floor = bool(len(above) and not min(sign * above["low"][0], sign * above["high"][0]) > 0)
        few = claim.trained and row["seeds"] < LEAST_SEEDS
        yield {"claim": claim.claim, **row, **compare(claim, row), "floor": at_floor, "few": few}


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
        return float(2 * stats.norm.sf(z * distance / half)) if half > 0 else 0.0 if distance > 0 else 1.0

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
    if not np.isfinite([row["value"], row["low"], row["high"]]).all():
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
